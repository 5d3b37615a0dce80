"""A user's own pictures, read in place: one folder for each class.

    DATA_DIR/CLASS/pictures, of which a part is drawn for evaluation, or
    DATA_DIR/train/CLASS/pictures and DATA_DIR/val/CLASS/pictures

A photograph's EXIF orientation is applied.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from resnest_jax.data import images
from resnest_jax.data.own import folder as own_folder
from resnest_jax.data.own import pairing, splits
from resnest_jax.errors import UserError
from resnest_jax.labels import class_names
from resnest_jax.text import listed, plural, readable

_FEW = 5  # Pictures of a class that are hardly enough.


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
    return own_folder.fingerprint_of([x[:2] for x in self.pictures])

  def __getitem__(self, index: int) -> dict[str, Any]:
    name, path, label = own_folder.item_of(self.pictures, index)
    image, _ = own_folder.read_picture(path, self.max_pixels, 'it')
    own_folder.check_depth(path, image)
    return {'image': image, 'label': label, 'name': name}

  def location(self, index: int) -> str:
    return self.pictures[index].path

  def label(self, index: int) -> int:
    return own_folder.item_of(self.pictures, index).label


def make_class_folder_split(data_config: Any, split: str) -> ClassFolderSplit:
  """Opens a split of the folders in `data_config.data_dir`.

  Raises:
    UserError: a folder is missing, there are less than two classes, or a class
      has no pictures.
  """
  root = own_folder.root_of(data_config, 'classes')
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
        what = f'there is no folder {root / name}, the split {name!r}'
        if (root / name).is_dir():
          what = f'{root / name}, the split {name!r}, has no folders of classes'
        raise UserError(
          f'{what}. In {root} '
          f'there are: {listed(splits.sub_folders(root))}. Set '
          'config.data.train_split and eval_split to the names of two folders.'
        )
    folder, classes = root / names[split], root / names[training]
  known, here = splits.sub_folders(classes), splits.sub_folders(folder)
  if len(known) < 2:
    raise UserError(
      f'{classes} has too few folders to be classes: {listed(known) or "none"}.'
      ' Make a folder for each class with its pictures in it, or folders train '
      'and val with those folders inside (docs/classify.md).'
    )
  if unknown := {*here} - {*known}:
    raise UserError(
      f'{folder} has folders that {classes} has not: {listed(sorted(unknown))}.'
      ' Both need the same classes.'
    )
  found = _pictures(folder, {x: known.index(x) for x in here})
  _check(folder, known, found)
  options = data_config.folder.eval_fraction, data_config.folder.split_seed
  pictures = []
  for drawn in found.values():
    pictures += drawn if given else splits.draw_split(drawn, split, *options)
  if not pictures:
    raise UserError(f'{folder} has no picture for the split {split!r}.')
  max_pixels = data_config.get('max_pixels', images.MAX_PIXELS)
  return ClassFolderSplit(split, pictures, known, max_pixels)


def _pictures(
  folder: Path, labels: Mapping[str, int]
) -> dict[str, list[Picture]]:
  found: dict[str, list[Picture]] = {x: [] for x in labels}
  others = []
  for path in pairing.walk(folder):
    inside = path.relative_to(folder)
    name = inside.parts[0]
    # Not a loose one, which `labels` lacks.
    if name in labels and path.suffix.lower() in pairing.IMAGE_SUFFIXES:
      picture = Picture(inside.as_posix(), str(path), labels[name])
      found[name].append(picture)
    else:
      others.append(path)
  if others:
    pairing.tell(
      f'left out of {folder}, no pictures in folders of classes: '
      f'{pairing.endings(others)}'
    )
  return found


def _check(
  folder: Path, known: Sequence[str], found: Mapping[str, Sequence[Picture]]
) -> None:
  if empty := [x for x in found if not found[x]]:
    kinds = ', '.join(pairing.IMAGE_SUFFIXES)
    raise UserError(
      f'{folder} has {plural(len(empty), "class")} without a picture: '
      f'{listed(empty)}. Add pictures ({kinds}), or remove what is no class.'
    )
  if few := [f'{x} ({len(y)})' for x, y in found.items() if len(y) < _FEW]:
    pairing.tell(f'few pictures of classes in {folder}: {listed(few)}')
  if absent := [x for x in known if x not in found]:
    pairing.tell(f'{folder} has no pictures of: {listed(absent)}')
