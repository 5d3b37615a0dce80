"""Flags that several commands share."""

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from os.path import expanduser
from typing import Any

from resnest_jax.errors import TRACEBACK, UserError
from resnest_jax.text import shorten


def command_line(arguments: Sequence[str] | None = None) -> list[str]:
  """The words of a command with home folders for ~, also after `--flag=`."""
  # Shells expand it at the beginning of a word alone: a folder named ~ would be
  # made, and the obvious command to remove it is the worst of all.
  return [
    re.sub(r'^(--[\w.]+=|)(~[^/]*)', lambda x: x[1] + expanduser(x[2]), word)
    for word in (sys.argv[1:] if arguments is None else arguments)
  ]


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
    self.add_argument(
      TRACEBACK,
      action='store_true',
      help='print the traceback of an error as well',
    )

  def parse_known_args(self, args=None, namespace=None):
    words = command_line(args)
    for before, word in itertools.pairwise(['', *words]):
      empty = not word or re.fullmatch(r'--\w+=', word)
      flag = word[:-1] or before
      # As a path it would be the current folder.
      if empty and self.get_default(flag.lstrip('-')) != '':
        name = flag if re.fullmatch(r'--\w+', flag) else 'an argument'
        raise UserError(f'{name} is empty; give it a value.')
    found, others = super().parse_known_args(words, namespace)
    vars(found).pop('traceback', None)  # `errors.run` looks for it.
    return found, others

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
  add = parser.add_mutually_exclusive_group(required=required).add_argument
  of = 'the workdir of a training, a published name, a path, an address'
  add('--weights', metavar='SOURCE', help=of)
  add('--workdir', dest='weights', metavar='SOURCE', help='the same')
  add_checkpoint_flag(parser)
