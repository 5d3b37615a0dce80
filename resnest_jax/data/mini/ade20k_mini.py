"""Writes a mini ADE20K: procedural scenes in the release's own layout.

    python -m resnest_jax.data.mini --out ADEChallengeData2016_mini.zip

The zip file has the folders, names and formats of ADEChallengeData2016.zip
(JPEG pictures of many sizes, some grey; 8-bit index PNG masks, 0-150;
objectInfo150.txt and sceneCategories.txt), so that the same builder reads it.
It is a function of --seed and --images alone.
"""

import argparse
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import cv2
import numpy as np
from numpy.random import Generator

from resnest_jax.data.archives import enumeration
from resnest_jax.data.mini.scene import draw_scene
from resnest_jax.drawing import encoded
from resnest_jax.errors import UserError
from resnest_jax.files import explain_refusal, whole_file
from resnest_jax.flags import Parser
from resnest_jax.labels import ADE20K
from resnest_jax.progress import progress_bar
from resnest_jax.threads import map_in_threads

DEFAULT_COUNTS = {'train': 400, 'validation': 60}

Counts = Mapping[str, int]  # Images per split.

# Raise it when a seed draws other scenes: older archives are then refused.
VERSION = 1

_ROOT = 'ADEChallengeData2016'
# Split: folder, prefix of file names, and a number in the seeds of its scenes,
# which keeps the splits from sharing one.
_SPLITS = {
  'train': ('training', 'ADE_train', 0),
  'validation': ('validation', 'ADE_val', 1),
}


def main() -> None:
  parser = make_parser('mini', __doc__, DEFAULT_COUNTS, 'ZIP', 'file to write')
  args = parser.parse_args()
  counts, _ = what = arguments(args)
  write_archives(args.out, *what)
  print_written(args.out, counts, args.out)


def make_parser(
  module: str, description: str, counts: Counts, what: str, out: str
) -> Parser:
  """Flags of a command that draws scenes: --out, --images, --seed."""
  parser = Parser(
    prog=f'python -m resnest_jax.data.{module}', description=description
  )
  parser.add_argument('--out', type=Path, required=True, metavar=what, help=out)
  add_arguments(parser, '{} {}'.format(*counts.values()))
  return parser


def print_written(out: Path, counts: Counts, *files: Path) -> None:
  numbers = enumeration(
    f'{number} {"training" if split == "train" else split}'
    for split, number in counts.items()
  )
  size = sum(file.stat().st_size for file in files)
  print(f'{out}: {numbers} images, {size / 1e6:.1f} MB')


def add_arguments(parser: argparse.ArgumentParser, default: str) -> None:
  """Adds --images (None if not given; `default` is for its help) and --seed."""
  parser.add_argument(
    '--images',
    type=int,
    nargs=2,
    metavar=('TRAIN', 'VALIDATION'),
    help=f'number of scenes to draw (default: {default})',
  )
  parser.add_argument(
    '--seed', type=int, default=0, help='seed of the scenes (default: 0)'
  )


def arguments(
  args: argparse.Namespace, default: Counts = DEFAULT_COUNTS
) -> tuple[dict[str, int], int]:
  """Images per split, and the seed; raises `UserError` if too small."""
  images = args.images or tuple(default.values())
  if min(images) < 1 or args.seed < 0:
    raise UserError(
      f'--images {images[0]} {images[1]} --seed {args.seed}: the numbers of '
      'images must be at least 1, the seed at least 0'
    )
  return dict(zip(_SPLITS, images, strict=True)), args.seed


def archive_comment(
  counts: Counts,
  seed: int,
  generator: str = 'mini',
  version: int = VERSION,
  **more: Any,
) -> str:
  """The archive's comment, which identifies the contents."""
  facts = {'generator': f'resnest_jax.data.{generator}', 'version': version}
  return json.dumps(facts | {'seed': seed, 'images': dict(counts)} | more)


def write_archives(path: Path, counts: Counts, seed: int) -> None:
  """Writes the zip file, whole or not at all.

  One of the same counts and seed stays; other contents are a `UserError`.
  """
  comment = archive_comment(counts, seed).encode()
  if is_there(path, comment, '--images', 'name'):
    return
  with (
    explain_refusal(path, 'give another folder'),
    whole_file(path) as temporary,
    ZipFile(temporary, 'w') as archive,
  ):
    archive.comment = comment
    _write_contents(archive, counts, seed)


def is_there(path: Path, comment: bytes, flags: str, what: str) -> bool:
  """Whether an archive exists; raises `UserError` if it has other contents."""
  if not path.exists():
    return False
  # The comment is enough: a file that got this name is complete.
  if zipfile.is_zipfile(path):
    with ZipFile(path) as archive:
      if archive.comment == comment:
        return True
  raise UserError(
    f'{path} exists and was not written for these {flags} and this --seed. '
    f'Nothing was changed; give another {what} or delete it.'
  )


def _write_contents(archive: ZipFile, counts: Counts, seed: int) -> None:
  """Draws all scenes and writes them with the two lists."""
  scene_lines, total = [], sum(counts.values())
  # Images with each mask value, by split, and pixels with it, (256,).
  seen = {split: np.zeros(256, np.int64) for split in _SPLITS}
  pixels = np.zeros(256, np.int64)
  with progress_bar('drawing scenes') as report:
    for split, (folder, prefix, number) in _SPLITS.items():
      images = f'{_ROOT}/images/{folder}/'
      masks = f'{_ROOT}/annotations/{folder}/'
      add_entry(archive, images, b'')
      add_entry(archive, masks, b'')
      # Every scene has its own seed, so threads do not change it, and a larger
      # archive begins with the scenes of a smaller one.
      seeds = [(seed, number, i) for i in range(counts[split])]
      samples = map_in_threads(_make_sample, seeds)
      for i, (picture, png, mask, kind) in enumerate(samples, 1):
        stem = f'{prefix}_{i:08d}'
        add_entry(archive, f'{images}{stem}.jpg', picture)
        add_entry(archive, f'{masks}{stem}.png', png)
        scene_lines.append(f'{stem} {kind}\n')
        values = np.bincount(mask.ravel(), minlength=256)
        seen[split] += values > 0
        pixels += values
        report(len(scene_lines), total)
  scenes = ''.join(scene_lines).encode()
  add_entry(archive, f'{_ROOT}/sceneCategories.txt', scenes)
  info = _object_info(pixels, *seen.values()).encode()
  add_entry(archive, f'{_ROOT}/objectInfo150.txt', info)


def add_entry(archive: ZipFile, name: str, data: bytes) -> None:
  """Adds an entry, stored without compression."""
  # A fixed date, as equal arguments must give equal bytes.
  info = zipfile.ZipInfo(name, date_time=(2016, 7, 26, 0, 0, 0))
  # The Unix mode; without it, unzip creates files that nobody may read.
  mode = 0o40755 if name.endswith('/') else 0o100644
  info.external_attr = mode << 16
  archive.writestr(info, data)


def _make_sample(seed: tuple[int, ...]) -> tuple[bytes, bytes, np.ndarray, str]:
  """JPEG, PNG, mask and kind of one scene."""
  # A generator of its own, so that the scene's draws do not depend on these.
  rng = np.random.default_rng((*seed, 1))
  short = int(rng.integers(96, 150))
  aspect = rng.choice([1, 5 / 4, 4 / 3, 3 / 2, 16 / 9])
  height, width = short, min(int(short * aspect), 224)
  if rng.random() >= 0.75:  # Photographs are mostly landscapes.
    height, width = width, height
  image, mask, kind = draw_scene((*seed, 0), height, width)
  if rng.random() < 0.04:  # The release has a few grey photographs.
    image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
  return jpeg(rng, image), encoded('.png', mask), mask, kind


def jpeg(rng: Generator, image: np.ndarray) -> bytes:
  """Encodes a grey or RGB picture with some quality from 85 to 95."""
  quality = cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(85, 96))
  return encoded('.jpg', image, *quality)


def _object_info(
  pixels: np.ndarray, train: np.ndarray, validation: np.ndarray
) -> str:
  """objectInfo150.txt: each class's share of pixels, and images with it."""
  # Shares are of the labelled pixels: 0 is "other" and does not count.
  ratios = pixels / max(pixels[1:].sum(), 1)
  return 'Idx\tRatio\tTrain\tVal\tName\n' + ''.join(
    f'{i}\t{ratios[i]:.4f}\t{train[i]}\t{validation[i]}\t{name}\n'
    for i, name in enumerate(ADE20K.classes, 1)
  )
