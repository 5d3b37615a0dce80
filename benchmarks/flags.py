"""What the command lines of all benchmarks have in common."""

import argparse
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
