"""Which image belongs to which mask: folders of files, lists, drawn splits."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from resnest_jax.data.archives import enumeration
from resnest_jax.errors import UserError

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
MASK_SUFFIXES = ('.png',)
SHOWN = 3  # How many files a message names.


class Pair(NamedTuple):
  """A sample: its name, which no other has, and its files."""

  name: str
  image: str
  mask: str


def draw_split(
  pairs: Sequence[Pair],
  split: str,
  names: Sequence[str],
  fraction: float,
  seed: int,
) -> list[Pair]:
  """Divides samples by a hash of seed and name.

  So a sample stays where it is when others come or go, and when folders are
  written as a list.

  Args:
    pairs: all samples.
    split: one of `names`.
    names: of the training and the evaluation split.
    fraction: of the evaluation split, about; 0 to 1 (both excluded).
    seed: any number.

  Raises:
    UserError: another split.
  """
  if split not in names:
    raise UserError(
      f'there is no split {split!r}; {names[0]!r} and {names[1]!r} are drawn '
      'from all samples. Make a sub folder of this name for another one.'
    )

  def is_drawn(pair: Pair) -> bool:
    name = pair.name.rpartition('/')[2]
    digest = hashlib.sha256(f'{seed}/{name}'.encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64

  for_training = split == names[0]
  return [pair for pair in pairs if is_drawn(pair) != for_training]


def match_pairs(
  images: Path, masks: Path, image_suffix: str = '', mask_suffix: str = ''
) -> list[Pair]:
  """Pairs the files of two trees that have the same name.

  Args:
    images: folder of images.
    masks: folder of masks, with the same sub folders; may be the same.
    image_suffix: how the names of images end, with or without extension; ''
      for any image. What comes before it is the name.
    mask_suffix: the same for masks.

  Returns:
    Sorted by name, which is the path below the folder without suffix.
  """
  found = find_files(images, image_suffix, IMAGE_SUFFIXES, 'image')
  partners = find_files(masks, mask_suffix, MASK_SUFFIXES, 'mask')
  problems = []
  for have, lack, what in (
    (found, partners, f'images in {images} have no mask in {masks}'),
    (partners, found, f'masks in {masks} have no image in {images}'),
  ):
    if missing := sorted(have.keys() - lack.keys()):
      more = ', ...' if len(missing) > SHOWN else ''
      first = ', '.join(os.path.basename(have[x]) for x in missing[:SHOWN])
      problems.append(f'{len(missing)} {what} ({first}{more})')
  if problems:
    raise UserError(
      f'{"; ".join(problems)}. The names must be the same up to the '
      'extension: move these files away, or set '
      'config.data.folder.image_suffix and mask_suffix to how the names end.'
    )
  return [Pair(name, found[name], partners[name]) for name in sorted(found)]


def find_files(
  folder: Path, suffix: str, extensions: Sequence[str], what: str
) -> dict[str, str]:
  """Name -> path of the files in a tree, hidden ones left out.

  Args:
    folder: to look in, with its sub folders.
    suffix: see `match_pairs`; upper and lower case are the same.
    extensions: that are accepted.
    what: 'image' or 'mask', for messages.

  Raises:
    UserError: two files of one name, or no file at all.
  """
  found: dict[str, str] = {}
  others: dict[str, int] = {}
  for path in walk(folder):
    inside = path.relative_to(folder)
    stem = _stem(inside.name, suffix, extensions)
    if stem is None:
      kind = inside.suffix.lower() or 'no extension'
      others[kind] = others.get(kind, 0) + 1
      continue
    name = (inside.parent / stem).as_posix()
    if name in found:
      raise UserError(
        f'{found[name]} and {path} have the same name, but there is one '
        f'{what} a sample. Move one away, or set '
        f'config.data.folder.{what}_suffix to how the names end.'
      )
    found[name] = str(path)
  if not found:
    endings = f'*{suffix}' if suffix else enumeration(iter(extensions))
    there = ', '.join(f'{count} {kind}' for kind, count in others.items())
    jpeg = (
      ' JPEG changes the values of masks: export them as PNG.'
      if what == 'mask' and others.keys() & {'.jpg', '.jpeg'}
      else ''
    )
    raise UserError(
      f'there are no {what}s in {folder} ({endings}); it has '
      f'{there or "no files"}.{jpeg}'
    )
  return found


def _stem(name: str, suffix: str, extensions: Sequence[str]) -> str | None:
  """The name without suffix and extension; None for another file."""
  stem, extension = os.path.splitext(name)
  if extension.lower() not in extensions:
    return None
  for text in (stem, name):
    if text.lower().endswith(suffix.lower()):
      return text[: len(text) - len(suffix)]
  return None


def walk(folder: Path) -> list[Path]:
  """All files of a tree, sorted; links are followed, hidden ones left out."""
  files, seen = [], set()
  for current, folders, names in os.walk(folder, followlinks=True):
    real = os.path.realpath(current)
    folders[:] = [x for x in folders if not x.startswith('.')]
    if real in seen:  # A link back up.
      folders.clear()
      continue
    seen.add(real)
    files += [Path(current, x) for x in names if not x.startswith('.')]
  return sorted(files)


def read_list(path: Path) -> list[Pair]:
  """Reads a list of samples.

  Every line has the paths of an image and of its mask, relative to the list,
  with blanks between them, or a tab where paths have blanks. Empty lines and
  lines with # are left out. A sample is named like its image.

  Raises:
    UserError: no such list, the line that is not a pair, an image that stands
      there twice, files that are not there, or no sample at all.
  """
  try:
    lines = path.read_text('utf-8-sig').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f'the list {path} cannot be read ({error}). Set config.data.data_dir '
      'and config.data.folder.lists.'
    ) from error
  pairs: dict[str, Pair] = {}
  for number, line in enumerate(lines, 1):
    if not line.strip() or line.startswith('#'):
      continue
    words = line.split('\t') if '\t' in line else line.split()
    if len(words) != 2:
      raise UserError(
        f'{path}, line {number}: {line!r} is not an image and its mask. '
        'Put a tab between paths that have blanks.'
      )
    image, mask = (word.strip() for word in words)
    parts = [x for x in PurePosixPath(image).parts if x not in ('..', '/')]
    name = os.path.splitext('/'.join(parts))[0]
    if name in pairs:
      raise UserError(f'{path}, line {number}: a second image named {name}.')
    pairs[name] = Pair(name, str(path.parent / image), str(path.parent / mask))
  missing = [
    file
    for pair in pairs.values()
    for file in pair[1:]
    if not os.path.isfile(file)
  ]
  if missing or not pairs:
    more = ', ...' if len(missing) > SHOWN else ''
    raise UserError(
      f'{path}: {len(missing)} files are not there '
      f'({", ".join(missing[:SHOWN])}{more}).'
      if missing
      else f'{path} has no samples.'
    )
  return list(pairs.values())
