"""Zip files for the test servers of Cityscapes and ADE20K: docs/submission.md.

    python -m resnest_jax.evaluation.submission cityscapes \\
      --predictions predictions --out cityscapes.zip
    python -m resnest_jax.evaluation.submission ade20k \\
      --predictions predictions --out ade20k.zip --images release_test/testing
    python -m resnest_jax.evaluation.submission validate ade20k.zip

--predictions is the --out of predict.py. `validate` checks a zip file of any
origin, without the server.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from resnest_jax.errors import run_module

if __name__ == '__main__':
  # Before the imports below, so that Ctrl-C during them is told in a line.
  run_module(__spec__.name)

from resnest_jax.evaluation.submission import rules
from resnest_jax.evaluation.submission.check import validate
from resnest_jax.evaluation.submission.rules import BENCHMARKS
from resnest_jax.evaluation.submission.write import show, write
from resnest_jax.flags import Parser


def main(arguments: Sequence[str] | None = None) -> None:
  parser = Parser(
    prog='python -m resnest_jax.evaluation.submission',
    description=__doc__.splitlines()[0],
  )
  commands = parser.add_subparsers(dest='command', required=True)
  for name in BENCHMARKS:
    command = commands.add_parser(name, help=f'write a zip file for {name}')
    command.add_argument(
      '--predictions',
      required=True,
      type=Path,
      metavar='DIR',
      help='what predict.py has written of the test images',
    )
    command.add_argument('--out', required=True, type=Path, metavar='ZIP')
  command = commands.add_parser('validate', help='say what is wrong with one')
  command.add_argument('zip', type=Path)
  command.add_argument(
    '--benchmark', choices=list(BENCHMARKS), help='default: as the names say'
  )
  for command in commands.choices.values():
    command.add_argument(
      '--images',
      type=Path,
      metavar='PATH',
      help='folder or zip file of the test images: names and sizes',
    )
  flags = parser.parse_args(arguments)
  if flags.command == 'validate':
    benchmark = BENCHMARKS.get(flags.benchmark)
    verdict = validate(flags.zip, benchmark, flags.images)
    show(flags.zip, verdict)
    # Not raised, so that findings are printed in full.
    if verdict.errors:
      sys.exit(1)
    return
  benchmark = BENCHMARKS[flags.command]
  images = flags.images and rules.read_images(benchmark, flags.images)
  number = write(benchmark, flags.predictions, flags.out, images)
  size = flags.out.stat().st_size / 1e6
  print(f'{number} masks, {size:.1f} MB, in {flags.out}')
