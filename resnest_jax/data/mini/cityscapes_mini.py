"""Writes a mini Cityscapes: procedural streets in the release's own layout.

    python -m resnest_jax.data.mini_cityscapes --out FOLDER

Writes leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip with the
folders, names and formats of the official files (8-bit RGB PNG pictures, 8-bit
PNG masks of label ids; without coloured masks, instances and polygons), so that
the same builder reads them. The test split is a tenth as large as the
validation split, and its masks are dummies as in the release. The files are a
function of --seed, --images and --size alone. --size draws smaller pictures
than the release's for quick trials.
"""

import argparse
import itertools
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from resnest_jax.data import cityscapes
from resnest_jax.data.mini import ade20k_mini
from resnest_jax.data.mini.ade20k_mini import Counts
from resnest_jax.data.mini.city import draw_scene
from resnest_jax.drawing import encoded
from resnest_jax.errors import UserError
from resnest_jax.files import explain_refusal, whole_file
from resnest_jax.progress import progress_bar
from resnest_jax.threads import map_in_threads

# As in the release. Drawing an image takes about three seconds of a core.
DEFAULT_SIZE = 2048, 1024
DEFAULT_COUNTS = {'train': 60, 'validation': 12}

Size = tuple[int, int]  # Width, height.

# Raise it when the same seed draws other scenes than before.
VERSION = 1

_NAME = 'mini_cityscapes'
# A few cities of the release's splits; more folders would be nearly empty.
_CITIES = {
  'train': ('aachen', 'bochum', 'zurich'),
  'validation': ('frankfurt', 'lindau', 'munster'),
  'test': ('berlin',),
}
# The release's test masks only keep the label ids below, up to out of roi.
_DUMMY_IDS = 4


def main() -> None:
  out = 'FOLDER', 'folder of the two zip files to write'
  parser = ade20k_mini.make_parser(_NAME, __doc__, DEFAULT_COUNTS, *out)
  add_size_argument(parser)
  args = parser.parse_args()
  counts, *_ = what = arguments(args)
  write_archives(args.out, *what)
  ade20k_mini.print_written(args.out, counts, *_paths(args.out))


def add_size_argument(parser: argparse.ArgumentParser) -> None:
  told = 'pixels of the images of a mini Cityscapes (default: {} {}, as in the '
  parser.add_argument(
    '--size',
    type=int,
    nargs=2,
    metavar=('WIDTH', 'HEIGHT'),
    help=told.format(*DEFAULT_SIZE) + 'release)',
  )


def arguments(args: argparse.Namespace) -> tuple[dict[str, int], int, Size]:
  """Images per split, seed and size; raises `UserError` for unusable ones."""
  width, height = args.size or DEFAULT_SIZE
  if not 32 <= min(width, height) <= max(width, height) <= 8192:
    raise UserError(
      f'--size {width} {height}: both must be from 32 to 8192 pixels'
    )
  counts, seed = ade20k_mini.arguments(args, DEFAULT_COUNTS)
  test = {'test': max(counts['validation'] // 10, 1)}
  return counts | test, seed, (width, height)


def archive_comment(counts: Counts, seed: int, size: Size) -> str:
  return ade20k_mini.archive_comment(counts, seed, _NAME, VERSION, size=size)


def _paths(folder: Path) -> list[Path]:
  return [folder / cityscapes.IMAGES, folder / cityscapes.MASKS]


def write_archives(folder: Path, counts: Counts, seed: int, size: Size) -> None:
  """Writes both archives unless they exist with the same arguments."""
  comment = archive_comment(counts, seed, size).encode()
  paths, told = _paths(folder), ('--images, --size', 'folder')
  there = [ade20k_mini.is_there(path, comment, *told) for path in paths]
  # A process killed between the two renames leaves one; then both are written.
  if all(there):
    return
  with (
    explain_refusal(f'to {folder}', 'give another folder'),
    whole_file(paths[0]) as of_images,
    whole_file(paths[1]) as of_masks,
    ZipFile(of_images, 'w') as images,
    ZipFile(of_masks, 'w') as masks,
  ):
    images.comment = masks.comment = comment
    _write_contents(images, masks, counts, seed, size)


def _write_contents(
  images: ZipFile, masks: ZipFile, counts: Counts, seed: int, size: Size
) -> None:
  (width, height), done = size, itertools.count(1)
  with progress_bar('drawing streets') as report:
    for number, (split, folder) in enumerate(cityscapes.FOLDERS.items()):
      seeds = [(seed, number, i) for i in range(counts[split])]
      samples = map_in_threads(lambda s: draw_scene(s, height, width), seeds)
      for i, (image, mask) in enumerate(samples):
        name = sample_name(split, i, len(seeds))
        path = f'{folder}/{name.split("_")[0]}/{name}'
        if split == 'test':
          mask = np.where(mask < _DUMMY_IDS, mask, np.uint8(0))
        entry = f'leftImg8bit/{path}{cityscapes.IMAGE_SUFFIX}'
        ade20k_mini.add_entry(images, entry, encoded('.png', image))
        entry = f'gtFine/{path}{cityscapes.MASK_SUFFIX}'
        ade20k_mini.add_entry(masks, entry, encoded('.png', mask))
        report(next(done), sum(counts.values()))


def sample_name(split: str, index: int, count: int) -> str:
  """CITY_SEQUENCE_FRAME of the sample `index` of `count`."""
  # Names ascend with the index, because the cities are sorted. Frame 19 is the
  # annotated one of each sequence in the release.
  cities = _CITIES[split]
  return f'{cities[index * len(cities) // count]}_{index:06d}_000019'
