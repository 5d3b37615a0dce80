"""Predicts a class for every pixel of pictures and videos, or for pictures.

    python predict.py --weights ade20k_pspnet --out predictions street.jpg
    python predict.py --weights runs/pspnet --out predictions holiday/
    python predict.py --weights runs/pspnet --out predictions drive.mp4
    python predict.py --weights resnest50 --out predictions holiday/

--weights is the workdir of a training, a published name, a file or an address
(docs/weights.md). Each picture becomes NAME.png (8-bit class numbers),
NAME_color.png (the classes' colours) and NAME_overlay.png (colours over the
picture); each video NAME_color.mp4 and NAME_overlay.mp4. classes.json lists the
classes, predictions.json the settings. Of a classifier predictions.json has the
five most probable classes of each picture, and nothing else is written.
Unreadable files are skipped and listed at the end, with exit status 1. See
docs/prediction.md.
"""

import argparse
from pathlib import Path

from resnest_jax.config_keys import PROTOCOLS
from resnest_jax.errors import UserError, run
from resnest_jax.flags import Parser, add_source_flags

# Files get their names when they are complete; only large pictures resume.
STOPPED = (
  'stopped; every file that has its name is complete. The same command with '
  '--overwrite begins again, but for TIFF files that are read in parts, which '
  'it resumes.'
)


def main() -> None:
  flags = make_parser().parse_args()
  for name in ('batch_size', 'max_pixels'):
    if (value := getattr(flags, name)) is not None and value < 1:
      raise UserError(f'--{name} is {value}; give 1 or more.')
  # Imported late: these take seconds, and a mistyped flag should fail at once.
  from resnest_jax import runtime
  from resnest_jax.prediction.files import predict_files

  runtime.set_up()
  arguments = vars(flags)  # Flags are named as arguments.
  predict_files(arguments.pop('sources'), **arguments)


def make_parser() -> argparse.ArgumentParser:
  parser = Parser(description=__doc__)
  add_source_flags(parser)
  add = parser.add_argument
  add(
    'sources',
    nargs='+',
    metavar='SOURCE',
    help='a picture; a video (mp4, avi, mov, mkv, webm); a folder of pictures '
    "and videos; a pattern in quotes, like 'trip/**/*.jpg'",
  )
  add('--out', required=True, type=Path, metavar='DIR', help='made if needed')
  add(
    '--recursive',
    action='store_true',
    help='search folders with their subfolders, which --out gets as well',
  )
  add(
    '--save',
    nargs='+',
    action='extend',
    choices=('masks', 'colors', 'overlays'),
    help='what to write (default: all; for videos colors and overlays). The '
    'masks of a video are NAME/000000.png, NAME/000001.png, ...',
  )
  add(
    '--polygons',
    choices=('coco', 'labelme'),
    help="write each picture's regions as polygons with class and confidence, "
    'to be loaded into an annotation tool: coco.json, or NAME.json for labelme',
  )
  add(
    '--confidence',
    action='store_true',
    help='write how probable the class of each pixel is: NAME_confidence.png',
  )
  add(
    '--opacity',
    type=float,
    default=0.5,
    help='of the colours in overlays, 0 to 1 (default: 0.5)',
  )
  add(
    '--legend',
    action='store_true',
    help='name the classes of a picture in a strip below its overlay',
  )
  add(
    '--overwrite',
    action='store_true',
    help='write into --out even if not empty, and replace files of those names',
  )
  add(
    '--batch_size',
    type=int,
    metavar='N',
    help='pictures at a time, over all devices (default: 1 on a CPU, 4 for '
    'each GPU or TPU)',
  )
  add(
    '--max_pixels',
    type=int,
    # Not imported from where files are decoded, which takes seconds.
    default=10**8,
    metavar='N',
    help='pictures and videos of more pixels are not decoded but listed as '
    'unreadable (default: %(default)s, such as 10,000 x 10,000)',
  )
  add_protocol_flags(parser)
  return parser


def add_protocol_flags(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument_group(
    'protocol', 'how pictures are shown to the network; docs/evaluation.md'
  ).add_argument
  add(
    '--protocol',
    default='whole',
    choices=PROTOCOLS,
    help='whole (default); slide: in windows; ms_flip_0x, ms_flip_1x: mirrored '
    'and at several scales of image_scale or of the original size; encoding: '
    "PyTorch-Encoding's, in windows of several scales",
  )
  add(
    '--image_scale',
    nargs=2,
    type=int,
    metavar=('LONG', 'SHORT'),
    help='pixels that pictures are resized to fit into for the network '
    "(predictions have the pictures' size); 0 0: not resized, and slide reads "
    'TIFF files of any size in parts; default: as in training',
  )
  add(
    '--slide_crop',
    nargs=2,
    type=int,
    metavar=('HEIGHT', 'WIDTH'),
    help='slide, encoding: pixels of a window (default: the crop of the '
    'training)',
  )
  add(
    '--slide_stride',
    nargs=2,
    type=int,
    metavar=('DOWN', 'RIGHT'),
    help='slide, encoding: pixels from a window to the next (default: two '
    'thirds of a window)',
  )
  add(
    '--scales',
    nargs='+',
    type=float,
    metavar='SCALE',
    help='ms_flip, encoding (default: 0.5 0.75 1 1.25 1.5 1.75)',
  )
  # None means the protocol's default. `choose_protocol` refuses parameters that
  # a protocol does not have.
  add(
    '--no_flip',
    dest='flip',
    action='store_const',
    const=False,
    help='ms_flip, encoding: not mirrored',
  )


if __name__ == '__main__':
  run(main, STOPPED)
