"""What the command lines of all benchmarks have in common."""

import argparse
import re
from pathlib import Path

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')
# Of `config.model`, in a smoke run.
TINY = {
  'stage_sizes': (1, 1, 1, 1),
  'stem_width': 4,
  'width': 4,
  'head_channels': 8,
  'aux_channels': 4,
}
# Of memory, in GB.
UNITS = {'GB': 1, 'GIB': 2**30 / 1e9, 'MB': 1e-3, 'MIB': 2**20 / 1e9}
SMOKE = 'a smoke run: figures of something this small say nothing'


def positive(text: str) -> int:
  """A whole number from 1 on, for `type`."""
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f'{number}, and has to be 1 or more')
  return number


def natural(text: str) -> int:
  """A whole number from 0 on, for `type`."""
  number = int(text)
  if number < 0:
    raise argparse.ArgumentTypeError(f'{number}, and has to be 0 or more')
  return number


def gigabytes(text: str) -> float:
  """GB of '16GB', '80 GiB', '900MB', for `type`."""
  match = re.fullmatch(r'\s*([0-9.]+)\s*([A-Za-z]+)\s*', text)
  try:
    number = float(match[1]) * UNITS[match[2].upper()]
  except (TypeError, ValueError, KeyError):
    number = 0
  if not number > 0:
    raise argparse.ArgumentTypeError(
      f'{text!r}; give a number and a unit, as 16GB or 80GiB'
    )
  return number


def folder(text: str) -> Path:
  """A folder, which need not be there yet, for `type`."""
  path = Path(text)
  # Before anything is measured, not after it.
  if next(x for x in (path, *path.parents) if x.exists()).is_dir():
    return path
  raise argparse.ArgumentTypeError(f'{path} is or lies below a file')


def add_out(parser: argparse.ArgumentParser, what: str = 'the JSON') -> None:
  """The flag `--out`."""
  parser.add_argument(
    '--out', type=folder, metavar='DIR', help=f'folder for {what}'
  )


def add_smoke(parser: argparse.ArgumentParser) -> None:
  """The flag `--smoke`."""
  parser.add_argument(
    '--smoke',
    action='store_true',
    help='tiny and quick, to see that it runs; sizes and rounds are its own',
  )
