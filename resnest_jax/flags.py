"""Flags that several commands have."""

import argparse

from resnest_jax.errors import UserError


class Parser(argparse.ArgumentParser):
  """Reports a wrong command line as all other errors are reported."""

  def error(self, message: str):
    raise UserError(f'{message}; {self.prog} --help lists the flags.')


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
  """Which checkpoint of a training."""
  parser.add_argument(
    '--checkpoint',
    default='latest',
    metavar='WHICH',
    help='of a workdir: latest (default), best, or a step',
  )


def add_source_flags(
  parser: argparse.ArgumentParser, required: bool = True
) -> None:
  """Whose network is meant, of a command without a configuration."""
  parser.add_argument(
    '--weights',
    required=required,
    metavar='SOURCE',
    help='the workdir of a training, a published name, a path, an address',
  )
  add_checkpoint_flag(parser)
