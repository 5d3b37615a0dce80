"""Pairs images with masks, in folders or lists, and draws splits."""

import collections
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
  """A sample's unique name and its files."""

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
  """Draws the samples of a split by a hash of seed and name.

  Args:
    pairs: all samples.
    split: one of `names`, or a `UserError` is raised.
    names: of the training and the evaluation split.
    fraction: approximate share of the evaluation split, 0 to 1 (exclusive).
    seed: selects another draw.
  """
  if split not in names:
    raise UserError(
      f'there is no split {split!r}; {names[0]!r} and {names[1]!r} are drawn '
      'from all samples. Make a sub folder of this name for another one.'
    )

  # A hash: a sample keeps its split when others are added or removed, or when
  # its file comes from a list, and a larger fraction keeps a smaller one's.
  def is_drawn(pair: Pair) -> bool:
    name = pair.name.rpartition('/')[2]
    digest = hashlib.sha256(f'{seed}/{name}'.encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64

  for_training = split == names[0]
  return [pair for pair in pairs if is_drawn(pair) != for_training]


def match_pairs(
  images: Path, masks: Path, image_suffix: str = '', mask_suffix: str = ''
) -> list[Pair]:
  """Pairs the files of two trees, or of one, that have the same name.

  The name, by which pairs are sorted, is the path below the folder without the
  suffix: the end of file names, with or without extension; '' accepts any.
  """
  found = find_files(images, image_suffix, IMAGE_SUFFIXES, 'image')
  partners = find_files(masks, mask_suffix, MASK_SUFFIXES, 'mask')
  # Not dropped: an orphan usually means a wrong suffix or a lost file.
  problems = []
  for have, lack, what in (
    (found, partners, f'images in {images} have no mask in {masks}'),
    (partners, found, f'masks in {masks} have no image in {images}'),
  ):
    if missing := sorted(have.keys() - lack.keys()):
      first = _first([os.path.basename(have[x]) for x in missing])
      problems.append(f'{len(missing)} {what} ({first})')
  if problems:
    raise UserError(
      f'{"; ".join(problems)}. The names must be the same up to the '
      'extension: remove these files, or set '
      'config.data.folder.image_suffix and mask_suffix to the ends of the '
      'names.'
    )
  return [Pair(name, found[name], partners[name]) for name in sorted(found)]


def _first(names: Sequence[str]) -> str:
  more = ', ...' if len(names) > SHOWN else ''
  return ', '.join(names[:SHOWN]) + more


def find_files(
  folder: Path, suffix: str, extensions: Sequence[str], what: str
) -> dict[str, str]:
  """Name -> path of the files in a tree; `what` is 'image' or 'mask'.

  See `match_pairs`. The case of suffix and extensions does not matter.

  Raises:
    UserError: two files have one name, or there is no file.
  """
  found: dict[str, str] = {}
  others = collections.Counter()
  for path in walk(folder):
    inside = path.relative_to(folder)
    stem = _stem(inside.name, suffix, extensions)
    if stem is None:
      others[inside.suffix.lower() or 'no extension'] += 1
      continue
    name = (inside.parent / stem).as_posix()
    if name in found:
      raise UserError(
        f'{found[name]} and {path} have the same name, but a sample has one '
        f'{what}. Remove one, or set '
        f'config.data.folder.{what}_suffix to the end of the names.'
      )
    found[name] = str(path)
  if not found:
    endings = f'*{suffix}' if suffix else enumeration(iter(extensions))
    there = ', '.join(f'{count} {kind}' for kind, count in others.items())
    jpeg = ''
    if what == 'mask' and others.keys() & {'.jpg', '.jpeg'}:
      jpeg = ' JPEG changes the values of masks; export them as PNG.'
    raise UserError(
      f'there are no {what}s in {folder} ({endings}); it has '
      f'{there or "no files"}.{jpeg}'
    )
  return found


def _stem(name: str, suffix: str, extensions: Sequence[str]) -> str | None:
  """The name without suffix and extension; None if the file does not match."""
  stem, extension = os.path.splitext(name)
  if extension.lower() not in extensions:
    return None
  for text in (stem, name):
    if text.lower().endswith(suffix.lower()):
      return text[: len(text) - len(suffix)]
  return None


def walk(folder: Path) -> list[Path]:
  """All files of a tree, sorted; links are followed, hidden files skipped."""
  # Hidden: macOS leaves `._name.jpg` next to files on foreign file systems.
  files, seen = [], set()
  for current, folders, names in os.walk(folder, followlinks=True):
    real = os.path.realpath(current)
    folders[:] = [x for x in folders if not x.startswith('.')]
    if real in seen:  # A link back up would never end.
      folders.clear()
      continue
    seen.add(real)
    files += [Path(current, x) for x in names if not x.startswith('.')]
  return sorted(files)


def read_list(path: Path) -> list[Pair]:
  """Reads a list of samples.

  Each line has the paths of an image and of its mask, relative to the list and
  separated by blanks, or by a tab if paths contain blanks. Empty lines and
  lines with # are skipped. A sample has its image's path as name.

  Raises:
    UserError: the list cannot be read or is empty, a line is not a pair, an
      image occurs twice, or files are missing.
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
        'Put a tab between paths that contain blanks.'
      )
    image, mask = (word.strip() for word in words)
    # Names become paths of overlays: they must stay below the output folder.
    parts = [x for x in PurePosixPath(image).parts if x not in ('..', '/')]
    name = os.path.splitext('/'.join(parts))[0]
    if name in pairs:
      raise UserError(f'{path}, line {number}: a second image named {name}.')
    pairs[name] = Pair(name, str(path.parent / image), str(path.parent / mask))
  if not pairs:
    raise UserError(f'{path} has no samples.')
  # All files at once, so that the user repairs the list in one go.
  files = [file for pair in pairs.values() for file in pair[1:]]
  if missing := [file for file in files if not os.path.isfile(file)]:
    raise UserError(
      f'{path}: {len(missing)} files are missing ({_first(missing)}).'
    )
  return list(pairs.values())
