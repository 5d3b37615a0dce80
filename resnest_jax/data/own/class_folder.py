"""A user's own pictures, read in place: one folder for each class.

    DATA_DIR/CLASS/pictures, of which a part is drawn for evaluation, or
    DATA_DIR/train/CLASS/pictures and DATA_DIR/val/CLASS/pictures

A photograph's EXIF orientation is applied.
"""

import dataclasses
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from resnest_jax.data import images
from resnest_jax.data.own import pairing, splits
from resnest_jax.data.own.folder import (
  check_depth,
  fingerprint_of,
  read_picture,
)
from resnest_jax.errors import UserError
from resnest_jax.labels import class_names
from resnest_jax.text import listed, plural, readable

_FEW = 5  # Pictures of a class that are hardly enough.
_LAYOUT = (
  'Make a folder for each class with its pictures in it, or folders train and '
  'val with those folders inside (docs/classify.md).'
)


class Picture(NamedTuple):
  name: str  # From the split's folder on: 'cat/12.jpg'.
  path: str
  label: int


@dataclasses.dataclass(eq=False, repr=False)
class ClassFolderSplit:
  """A sequence of samples that threads can share and that can be pickled.

  `split[i]` is a dict of `image` uint8 (H, W, 3) RGB, `label`, the position in
  `labels.classes`, and `name`.
  """

  split: str
  pictures: Sequence[Picture]
  classes: Sequence[str]
  max_pixels: int = images.MAX_PIXELS

  name = 'class_folder'  # `config.data.name` that selects this class.

  def __post_init__(self):
    self.labels = class_names('own', map(readable, self.classes))

  def __len__(self) -> int:
    return len(self.pictures)

  @property
  def fingerprint(self) -> str:
    """Differs if files have other names, sizes or places in the order."""

    return fingerprint_of([(x.name, x.path) for x in self.pictures])

  def __getitem__(self, index: int) -> dict[str, Any]:
    picture = self._picture(index)
    image, _ = read_picture(picture.path, self.max_pixels, partner='')
    check_depth(picture.path, image)
    return {'image': image, 'label': picture.label, 'name': picture.name}

  def location(self, index: int) -> str:
    return self.pictures[index].path

  def label(self, index: int) -> int:
    return self._picture(index).label

  def _picture(self, index: int) -> Picture:
    # A negative index is a sampler's mistake, not a sample from the end.
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f'{index} is not in 0 .. {len(self) - 1}')
    return self.pictures[index]


def make_class_folder_split(data_config: Any, split: str) -> ClassFolderSplit:
  """Opens a split of the folders in `data_config.data_dir`.

  Raises:
    UserError: a folder is missing, there are less than two classes, or a class
      has no pictures.
  """
  root = Path(data_config.data_dir)
  if not os.path.isdir(root):
    raise UserError(
      f'there is no folder {root}; set config.data.data_dir to the folder of '
      'your classes.'
    )
  training, evaluation = data_config.train_split, data_config.eval_split
  folder, classes = root, root
  # A class may be called train, but has no folders in it.
  outer = [x for x in splits.sub_folders(root) if splits.sub_folders(root / x)]
  names = {
    x: splits.find_folder(root, x, outer) for x in (training, evaluation, split)
  }
  if given := any(names.values()):
    for name in (training, split):
      if not names[name]:
        raise UserError(
          f'there is no folder {root / name}, the split {name!r}. In {root} '
          f'there are: {listed(splits.sub_folders(root))}. Set '
          'config.data.train_split and eval_split to the names of two folders.'
        )
    folder, classes = root / names[split], root / names[training]
  known = _classes(classes)
  if unknown := {*splits.sub_folders(folder)} - {*known}:
    raise UserError(
      f'{folder} has folders that {classes} has not: {listed(sorted(unknown))}.'
      ' Both need the same classes.'
    )
  pictures = [_pictures(folder, x, i) for i, x in enumerate(known)]
  _check(folder, known, pictures)
  if not given:
    options = data_config.folder.eval_fraction, data_config.folder.split_seed
    pictures = [splits.draw_split(x, split, *options) for x in pictures]
  pictures = [x for of_class in pictures for x in of_class]
  if not pictures:
    raise UserError(f'{folder} has no picture for the split {split!r}.')
  max_pixels = data_config.get('max_pixels', images.MAX_PIXELS)
  return ClassFolderSplit(split, pictures, known, max_pixels)


def _classes(folder: Path) -> list[str]:
  names = splits.sub_folders(folder)
  if len(names) < 2:
    has = listed(names) or 'none'
    raise UserError(
      f'{folder} has too few folders to be classes: {has}. {_LAYOUT}'
    )
  return names


def _pictures(folder: Path, name: str, label: int) -> list[Picture]:
  if not os.path.isdir(folder / name):  # Of a class that only train has.
    return []
  files = pairing.walk(folder / name)
  files = [x for x in files if x.suffix.lower() in pairing.IMAGE_SUFFIXES]
  return [
    Picture(x.relative_to(folder).as_posix(), str(x), label) for x in files
  ]


def _check(
  folder: Path, names: Sequence[str], pictures: Sequence[Sequence[Picture]]
) -> None:
  numbers = dict(zip(names, map(len, pictures), strict=True))
  here = {x: n for x, n in numbers.items() if os.path.isdir(folder / x)}
  if empty := [x for x, n in here.items() if not n]:
    kinds = ', '.join(pairing.IMAGE_SUFFIXES)
    raise UserError(
      f'{plural(len(empty), "class")} in {folder} have no picture: '
      f'{listed(empty)}. Add pictures ({kinds}), or remove the folders.'
    )
  if few := [f'{x} ({n})' for x, n in here.items() if n < _FEW]:
    pairing.tell(f'few pictures of classes in {folder}: {listed(few)}')
  if absent := [x for x in names if x not in here]:
    pairing.tell(f'{folder} has no pictures of: {listed(absent)}')
