"""Predicts a class for every pixel of pictures.

    python predict.py --weights ade20k_pspnet --out predictions street.jpg
    python predict.py --weights runs/pspnet --out predictions holiday/

--weights is a published name, a file, an address (see docs/weights.md) or the
workdir of a training. For each picture --out gets NAME.png, 8-bit with the
class numbers of the label list, NAME_overlay.png with their colours, and
classes.json with the list. Where a street.png stands beside a street.jpg, NAME
is the whole file name. Pictures that cannot be read are left out and listed at
the end; the exit status is 1 then.
"""

import argparse
from pathlib import Path

from resnest_jax.config import Parser
from resnest_jax.errors import UserError, run


def main() -> None:
  """Reads the command line and predicts."""
  parser = Parser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    'pictures',
    nargs='+',
    type=Path,
    metavar='PICTURE',
    help='a file, or a folder whose pictures are all meant (not those of its '
    'sub folders)',
  )
  parser.add_argument(
    '--weights',
    required=True,
    metavar='SOURCE',
    help='the workdir of a training, a published name, a path, an address',
  )
  parser.add_argument(
    '--out', required=True, type=Path, metavar='DIR', help='made if needed'
  )
  parser.add_argument(
    '--checkpoint',
    default='latest',
    metavar='WHICH',
    help='of a workdir: latest (default), best, or a step',
  )
  parser.add_argument(
    '--image_scale',
    nargs=2,
    type=int,
    metavar=('LONG', 'SHORT'),
    help='pixels that pictures are resized to fit into before the network sees '
    "them (predictions have the pictures' size); default: as in training",
  )
  parser.add_argument(
    '--batch_size',
    type=int,
    default=1,
    metavar='N',
    help='pictures at a time, over all devices (default: 1)',
  )
  parser.add_argument(
    '--overwrite',
    action='store_true',
    help='write into --out though it is not empty; files of the same names '
    'are replaced',
  )
  flags = parser.parse_args()
  if flags.batch_size < 1:
    raise UserError(f'--batch_size is {flags.batch_size}; give 1 or more.')
  if flags.image_scale and min(flags.image_scale) < 1:
    raise UserError('--image_scale needs two positive numbers of pixels.')
  # They take seconds, which a mistake in the command line need not.
  from resnest_jax import runtime
  from resnest_jax.evaluation.pictures import predict_pictures

  runtime.set_up()
  predict_pictures(
    flags.pictures,
    flags.weights,
    flags.out,
    checkpoint=flags.checkpoint,
    image_scale=flags.image_scale,
    batch_size=flags.batch_size,
    overwrite=flags.overwrite,
  )


if __name__ == '__main__':
  run(main)
