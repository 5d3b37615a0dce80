"""Flags that several commands share."""

import argparse
import sys
from typing import Any

from resnest_jax.errors import UserError


class Parser(argparse.ArgumentParser):
  """Reports a wrong command line as a `UserError`, without its long usage."""

  def __init__(self, **arguments: Any):
    if sys.argv[0].startswith('resnest-jax '):
      arguments['prog'] = sys.argv[0]
    # Abbreviations would let a mistyped flag mean another one.
    super().__init__(
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      **arguments,
    )

  def error(self, message: str):
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
    '--workdir',
    required=required,
    metavar='SOURCE',
    help='the workdir of a training, a published name, a path, an address',
  )
  add_checkpoint_flag(parser)
