"""What every format of annotation is read as: pictures with shapes."""

import collections
import contextlib
import itertools
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from resnest_jax.bands import ARRAY
from resnest_jax.data.images import read_file
from resnest_jax.data.own.classes import Colour
from resnest_jax.data.own.pairing import IMAGE_SUFFIXES, walk
from resnest_jax.data.own.splits import split_of
from resnest_jax.errors import UserError
from resnest_jax.text import listed

KINDS = (*IMAGE_SUFFIXES, ARRAY)
# Folders of pictures, which are no part of a sample's name, and of masks.
_PLAIN = ('images', 'jpegimages', 'img', 'data')
_MASKS = ('panoptic', 'mask', 'segmentation', 'annotation')


class Fault(UserError):
  """A bad annotation; the text says what it is, without where."""


class Shape(NamedTuple):
  """An object. `draw(height, width)` is a bool mask, or raises `Fault`."""

  label: str
  where: str  # In messages.
  draw: Callable[[int, int], np.ndarray]


class Sample(NamedTuple):
  """A picture with its annotation, which are read late and may be a `Fault`."""

  where: str  # The annotation, in messages.
  picture: Callable[[], Path | bytes]
  shapes: Callable[[], list[Shape]]  # In drawing order.
  split: str = ''  # 'train', 'val', 'test'; '': as the picture's path says.
  size: tuple | None = None  # (height, width) that it claims.
  name: str = ''  # With folders, of a picture that is no file.


class Source(NamedTuple):
  """What the reader of a format found."""

  classes: Mapping[str, Colour | None]
  total: int
  samples: Iterable[Sample]
  overlaps: str = 'later'  # Shapes over earlier ones, or 'small' over large.
  unlabelled: str = ''  # 'ignore', or '' if a background is possible as well.
  faults: Sequence[tuple[str, str]] = ()  # (what, where), of no sample.
  values: Mapping[str, int] | None = None  # Of labels, if masks are alone.


class Finder:
  """Finds pictures below a folder by what annotations say of their place.

  They may lie in another folder than the annotations.
  """

  def __init__(self, folder: Path, pictures: Path | None = None):
    self.folder, self.files = folder, walk(folder)
    self._pictures = pictures or folder
    self._named = collections.defaultdict(list)
    for path in walk(pictures) if pictures else self.files:
      # A pipe would be waited for.
      if path.suffix.lower() in KINDS and path.is_file():
        self._named[_plain(path.stem)].append(path)

  def __call__(self, text: Any, near: Path, split: str = '') -> Path:
    """The picture of this name, or of this path from anywhere, or a `Fault`.

    Of several it is the one whose folders have the same names, then one that
    does not lie among masks, then one of the split, then the nearest to `near`.
    """
    # Whatever the text says, only files below the folder are found.
    wanted = PurePosixPath(_plain(str(text).replace('\\', '/')))
    ending = wanted.suffix.lower()
    exact = ending in KINDS
    named = self._named.get(wanted.stem if exact else wanted.name, ())
    found = [x for x in named if not exact or x.suffix.lower() == ending]

    def rank(path: Path) -> tuple:
      inside = self.inside(path.parent)
      folders = _plain(inside).split('/')[::-1]
      return (
        path.suffix.lower() != ARRAY,  # Next to a picture it may be anything.
        _common(folders, wanted.parts[-2::-1]),
        not any(x in inside.lower() for x in _MASKS),
        split_of(inside) == split,
        _common(path.parts, near.parts),
      )

    ranks = [*map(rank, found)]
    if not ranks:
      others = listed(sorted({x.suffix for x in named}))
      raise Fault(
        f'has no picture {ending}, only {others}: add it, or correct the name'
        if others
        else f'has no picture in {self._pictures}: add it, correct the name, '
        'or give its folder as --pictures'
      )
    if ranks.count(best := max(ranks)) > 1:
      raise Fault('has a picture whose name several have')
    return found[ranks.index(best)]

  def leave_out(self, pattern: str) -> None:
    """Files whose paths match are no pictures."""
    for paths in self._named.values():
      paths[:] = [x for x in paths if not re.match(pattern, self.inside(x))]

  def named(self, name: str) -> list[Path]:
    return [x for x in self.files if x.name == name]

  def inside(self, path: Path) -> str:
    among = path.is_relative_to(self._pictures)
    return path.relative_to(self._pictures if among else self.folder).as_posix()

  def others(self, used: Collection[Path]) -> list[str]:
    """Pictures that are not used and do not lie among masks."""
    paths = (x for named in self._named.values() for x in named)
    rest = sorted(self.inside(x) for x in {*paths} - {*used})
    return [x for x in rest if not any(mask in x.lower() for mask in _MASKS)]


def _plain(text: str) -> str:
  return unicodedata.normalize('NFC', text)  # macOS takes accents apart.


def _common(*parts: Sequence[str]) -> int:
  same = (x == y for x, y in zip(*parts, strict=False))
  return sum(itertools.takewhile(bool, same))


def name_of(path: str) -> str:
  """The sample's name for a picture's path, without splits."""
  *folders, file = path.split('/')
  kept = [x for x in folders if x.lower() not in _PLAIN and not split_of(x)]
  return '/'.join([*kept, file])


def start_of(path: Path, number: int) -> bytes:
  """So many bytes; none of what cannot be read, of which its reader tells."""
  # A pipe would be waited for.
  if path.is_file():
    with contextlib.suppress(OSError), path.open('rb') as file:
      return file.read(number)
  return b''


def read(path: Path) -> bytes:
  return read_file(path, 2**28)  # 2 GB; COCO's largest file has 0.5.


def text_of(path: Path) -> str:
  return read(path).decode('utf-8-sig', 'replace')


def read_lines(path: Path) -> list[str]:
  return [x.strip() for x in text_of(path).split('\n')]
