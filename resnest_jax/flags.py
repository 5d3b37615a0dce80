"""Flags that several commands share."""

import argparse
from typing import Any

from resnest_jax.errors import UserError, shorten


class Parser(argparse.ArgumentParser):
  """Reports a wrong command line as a `UserError`, without its long usage."""

  def __init__(self, **arguments: Any):
    # Abbreviations would let a mistyped flag mean another one.
    super().__init__(
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      **arguments,
    )

  def error(self, message: str):
    message = shorten(message)
    raise UserError(f'{message}; {self.prog} --help lists the flags.')


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--checkpoint',
    default='latest',
    metavar='WHICH',
    help='of a workdir: latest (default), best, or a step',
  )


def add_source_flags(parser: Parser, required: bool = True) -> None:
  """Adds --weights and --checkpoint, for commands without a configuration."""
  parser.add_argument(
    '--weights',
    required=required,
    metavar='SOURCE',
    help='the workdir of a training, a published name, a path, an address',
  )
  add_checkpoint_flag(parser)
