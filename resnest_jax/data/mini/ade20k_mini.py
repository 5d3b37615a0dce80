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

import cv2
import numpy as np

from resnest_jax.data.mini.scene import draw_scene
from resnest_jax.errors import UserError
from resnest_jax.files import explain_refusal, whole_file
from resnest_jax.labels import ADE20K
from resnest_jax.progress import progress_bar
from resnest_jax.threads import map_in_threads

DEFAULT_COUNTS = {'train': 400, 'validation': 60}

# Raise it when the same seed draws other scenes than before: archives of an
# earlier version are then refused instead of reused.
VERSION = 1

_ROOT = 'ADEChallengeData2016'
# Split: (folder, prefix of file names, number in the seeds of its scenes).
# The number keeps the splits from sharing a scene.
_SPLITS = {
  'train': ('training', 'ADE_train', 0),
  'validation': ('validation', 'ADE_val', 1),
}


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m resnest_jax.data.mini',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--out', type=Path, required=True, metavar='ZIP', help='file to write'
  )
  add_arguments(parser)
  args = parser.parse_args()
  counts = counts_from_arguments(args)
  write_archive(args.out, counts, args.seed)
  print(
    f'{args.out}: {counts["train"]} training and {counts["validation"]} '
    f'validation images, {args.out.stat().st_size / 1e6:.1f} MB'
  )


def add_arguments(parser: argparse.ArgumentParser, default: str = '') -> None:
  """Adds --images (None if not given) and --seed.

  Args:
    parser: of a command that draws scenes.
    default: shown as the default of --images; '': `DEFAULT_COUNTS`.
  """
  default = default or '{} {}'.format(*DEFAULT_COUNTS.values())
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


def counts_from_arguments(
  args: argparse.Namespace, default: Mapping[str, int] = DEFAULT_COUNTS
) -> dict[str, int]:
  """Images per split; raises `UserError` for numbers that are too small."""
  images = args.images or tuple(default.values())
  if min(images) < 1 or args.seed < 0:
    raise UserError(
      f'--images {images[0]} {images[1]} --seed {args.seed}: the numbers of '
      'images must be at least 1, the seed at least 0'
    )
  return dict(zip(_SPLITS, images, strict=True))


def archive_comment(counts: Mapping[str, int], seed: int) -> str:
  """The zip file's comment, which identifies the contents."""
  return json.dumps(
    {
      'generator': 'resnest_jax.data.mini',
      'version': VERSION,
      'seed': seed,
      'images': dict(counts),
    }
  )


def write_archive(path: Path, counts: Mapping[str, int], seed: int) -> None:
  """Writes the archive unless it exists with the same counts and seed.

  Args:
    path: of the zip file, which appears whole or not at all.
    counts: images for 'train' and 'validation'.
    seed: non-negative.

  Raises:
    UserError: `path` exists with other contents, or cannot be written.
  """
  # The comment is enough to recognise the archive: a file under this name is
  # complete, because it is renamed after its last byte.
  comment = archive_comment(counts, seed).encode()
  if path.exists():
    if has_comment(path, comment):
      return
    raise UserError(
      f'{path} exists and was not written for these --images and this '
      '--seed. Nothing was changed; give another name or delete it.'
    )
  with (
    explain_refusal(path, 'give another folder'),
    whole_file(path) as temporary,
    zipfile.ZipFile(temporary, 'w') as archive,
  ):
    archive.comment = comment
    _write_contents(archive, counts, seed)


def has_comment(path: Path, comment: bytes) -> bool:
  if not zipfile.is_zipfile(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return archive.comment == comment


def _write_contents(
  archive: zipfile.ZipFile, counts: Mapping[str, int], seed: int
) -> None:
  """Draws all scenes and writes them with the two lists."""
  # `seen[split]`: images with each mask value, (256,); `pixels`: of all splits.
  scene_lines, seen, pixels = [], {}, np.zeros(256, np.int64)
  total, done = sum(counts.values()), 0
  with progress_bar('drawing scenes') as report:
    for split, (folder, prefix, number) in _SPLITS.items():
      images = f'{_ROOT}/images/{folder}/'
      masks = f'{_ROOT}/annotations/{folder}/'
      add_entry(archive, images, b'')
      add_entry(archive, masks, b'')
      # Every scene has its own seed, so threads do not change it, and a larger
      # archive begins with the scenes of a smaller one.
      seeds = [(seed, number, i) for i in range(counts[split])]
      seen[split] = np.zeros(256, np.int64)
      samples = map_in_threads(_make_sample, seeds)
      for i, (jpeg, png, mask, kind) in enumerate(samples, 1):
        stem = f'{prefix}_{i:08d}'
        add_entry(archive, f'{images}{stem}.jpg', jpeg)
        add_entry(archive, f'{masks}{stem}.png', png)
        scene_lines.append(f'{stem} {kind}\n')
        values = np.bincount(mask.ravel(), minlength=256)
        seen[split] += values > 0
        pixels += values
        done += 1
        report(done, total)
  add_entry(
    archive, f'{_ROOT}/sceneCategories.txt', ''.join(scene_lines).encode()
  )
  info = _object_info(pixels, seen['train'], seen['validation'])
  add_entry(archive, f'{_ROOT}/objectInfo150.txt', info.encode())


def add_entry(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
  """Adds an entry, stored without compression."""
  # A fixed date: zip files store one, and equal arguments must give equal
  # bytes.
  info = zipfile.ZipInfo(name, date_time=(2016, 7, 26, 0, 0, 0))
  # The upper 16 bits are the Unix mode; without it, unzip creates files that
  # nobody may read.
  mode = 0o40755 if name.endswith('/') else 0o100644
  info.external_attr = mode << 16
  archive.writestr(info, data)


def _make_sample(seed: tuple[int, ...]) -> tuple[bytes, bytes, np.ndarray, str]:
  """JPEG, PNG, mask and kind of one scene."""
  # Size and encoding have their own generator: a change of these draws leaves
  # the draws of the scene as they are.
  rng = np.random.default_rng((*seed, 1))
  height, width = _choose_size(rng)
  image, mask, kind = draw_scene((*seed, 0), height, width)
  if rng.random() < 0.04:  # The release has a few grey photographs.
    image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
  else:
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
  quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(85, 96))]
  jpeg = cv2.imencode('.jpg', image, quality)[1].tobytes()
  png = cv2.imencode('.png', mask)[1].tobytes()
  return jpeg, png, mask, kind


def _choose_size(rng: np.random.Generator) -> tuple[int, int]:
  """Height and width, 96 to 224 pixels."""
  short = int(rng.integers(96, 150))
  aspect = rng.choice([1, 5 / 4, 4 / 3, 3 / 2, 16 / 9])
  long = min(int(short * aspect), 224)
  # Photographs are mostly landscapes.
  return (short, long) if rng.random() < 0.75 else (long, short)


def _object_info(
  pixels: np.ndarray, train: np.ndarray, validation: np.ndarray
) -> str:
  """objectInfo150.txt: each class's share of pixels, and images with it."""
  lines = ['Idx\tRatio\tTrain\tVal\tName\n']
  # Shares are of the labelled pixels: 0 is "other" and does not count.
  ratios = pixels / max(pixels[1:].sum(), 1)
  for i, name in enumerate(ADE20K.classes, 1):
    lines.append(f'{i}\t{ratios[i]:.4f}\t{train[i]}\t{validation[i]}\t{name}\n')
  return ''.join(lines)
