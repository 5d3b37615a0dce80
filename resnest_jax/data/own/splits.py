"""The samples of a split: in folders, in lists, or drawn."""

import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from resnest_jax.bands import ARRAY
from resnest_jax.data.own import pairing
from resnest_jax.data.own.pairing import Affixes, Pair, tell
from resnest_jax.errors import UserError
from resnest_jax.text import listed, plural

# Words for the same split, in any case.
_WORDS = (
  {'train', 'training'},
  {'val', 'valid', 'validation', 'dev', 'eval', 'evaluation'},
  {'test', 'testing'},
)


def draw_split(
  pairs: Sequence[Any], split: str, fraction: float, seed: int
) -> list[Any]:
  """Draws the samples of a split, whatever has a `name`, by a hash of the name.

  Args:
    split: 'train' or 'val'; a `UserError` is raised for another.
    fraction: share of the evaluation split, 0 to 1 (exclusive), which has the
      nearest number of samples; each split has at least one of two.
    seed: selects another draw.
  """
  # Under other names the same samples would pass for others.
  if split not in ('train', 'val'):
    raise UserError(
      f"there is no split {split!r}; 'train' and 'val' are drawn from all "
      'samples. Use these names (config.data.train_split and eval_split), or '
      'make sub folders or lists (docs/own-data.md).'
    )

  # Those with the smallest hashes: a sample that is added or removed moves one
  # other at most, and a larger fraction keeps a smaller one's.
  def rank(name: str) -> tuple[bytes, str]:
    text = f'{seed}/{name.rpartition("/")[2]}'.encode(errors='surrogateescape')
    return hashlib.sha256(text).digest()[:8], name

  number = math.floor(fraction * len(pairs) + 0.5)
  number = min(max(number, 1), len(pairs) - 1)
  drawn = {*sorted((pair.name for pair in pairs), key=rank)[:number]}
  return [x for x in pairs if (x.name in drawn) != (split == 'train')]


def find_pairs(
  data_config: Any, split: str, convert: Callable[[str, str], str]
) -> tuple[list[Pair], str]:
  """The samples of a split, and the folder of the masks of all splits.

  See `folder.make_folder_split`. `convert(folder, suffix)` says how masks whose
  names end in `suffix` become index masks.
  """
  root, options = Path(data_config.data_dir), data_config.folder
  names = (data_config.train_split, data_config.eval_split)
  for name in (split, *names):
    path = PurePath(name.strip())
    if not path.parts or path.is_absolute() or '..' in path.parts:
      raise UserError(
        f'a split is called {name!r}, which is no name of a folder. Set '
        'config.data.train_split and eval_split, for example to train and val.'
      )
  images, of_split = (
    _of_split(root, path, split) for path in (options.images, options.masks)
  )
  masks, drawn = of_split, '{split}' not in options.lists
  if not options.lists:
    given = '{split}' in options.images
    images, of_split, drawn = _folders(images, masks, given, split, names)

  def how(ending: str) -> str:
    among = images.is_relative_to(masks)
    return convert(str(masks), ending if among else '')

  of_images = Affixes(options.image_prefix, options.image_suffix)
  of_masks = Affixes(options.mask_prefix, options.mask_suffix)
  where = images, of_split, of_images, of_masks, how
  arrays = (ARRAY,) if data_config.get('bands') else ()
  kinds = pairing.IMAGE_SUFFIXES + arrays
  trees = functools.cache(lambda: pairing.read_trees(*where, kinds))
  if options.lists:
    source = root / options.lists.replace('{split}', split)
    there = os.path.isdir(images) and os.path.isdir(of_split)
    pairs = pairing.read_list(source, trees if there else None)
    folders = [os.path.dirname(os.path.abspath(pair.mask)) for pair in pairs]
    masks = Path(os.path.commonpath(folders))
    if masks.is_relative_to(own := os.path.abspath(of_split)):
      masks = own
  else:
    source, pairs = images, pairing.match_pairs(trees(), how)
  if drawn:
    total = len(pairs)
    pairs = draw_split(pairs, split, options.eval_fraction, options.split_seed)
    if not pairs:
      raise UserError(
        f'there is {plural(total, "sample")} in {source}, for train, and none '
        'for the split val. Add samples, or make sub folders train and val.'
      )
  return pairs, str(masks)


def _folders(
  images: Path, masks: Path, given: bool, split: str, names: Sequence[str]
) -> tuple[Path, Path, bool]:
  """Folders of the split's images and masks; whether the split is drawn."""
  _check_folder('images', images, given)
  if not given:
    # One of the two suffices: one that is misspelt must not mix both splits.
    inside, whole = sub_folders(images), (images, masks)
    near = [_near(inside, name) for name in names]
    given = all(near) or any(
      os.path.isdir(images / name) or name.lower() in map(str.lower, found)
      for name, found in zip(names, near, strict=True)
    )
    if given:
      images, masks = (_of_split(x, '{split}', split) for x in whole)
      _check_folder('images', images, given)
    for folder in filter(os.path.isdir, whole if given else whole[:1]):
      _tell_rest(folder, (split, *names) if given else (), {*whole})
  _check_folder('masks', masks, given)
  return images, masks, not given


def _tell_rest(folder: Path, names: Sequence[str], apart: set[Path]) -> None:
  """Says what lies in a folder but in no split; without names, all is drawn."""
  inside = sub_folders(folder)
  known = {x for name in names for x in _near(inside, name.split('/')[0])}
  others = [x for x in inside if x not in known and folder / x not in apart]
  # Not `walk`, which refuses folders that are closed.
  count = {x: sum(len(y[2]) for y in os.walk(folder / x)) for x in others}
  found = [f'{x} ({plural(count[x], "file")})' for x in others]
  how = f'train and val are drawn from {folder} with all its sub folders'
  if names:
    how = f'left out of {folder}, beside the splits'
    files = pairing.walk(folder, deep=False)
    loose = [x for x in files if x.suffix.lower() in pairing.IMAGE_SUFFIXES]
    found += [plural(len(loose), 'picture')] if loose else []
  if found:
    tell(f'{how}: {listed(found)}')


def _of_split(root: Path, path: str, split: str) -> Path:
  """The path with the folder that holds the split in place of {split}."""
  before, found, rest = path.partition('{split}')
  whole = before[-1:] in ('', '/') and rest[:1] in ('', '/')
  if found and whole and os.path.isdir(root / before):
    split = find_folder(root / before, split) or split
  return root / path.replace('{split}', split)


def find_folder(
  folder: Path, split: str, among: Sequence[str] | None = None
) -> str:
  """The name of the sub folder that holds the split; '' if there is none."""
  among = sub_folders(folder) if among is None else among
  near = [split] if split in among else _near(among, split)
  if len(near) > 1:
    raise UserError(
      f'several folders in {folder} may be the split {split!r}: '
      f'{listed(near)}. Set config.data.train_split and eval_split to the '
      'names of two folders.'
    )
  if near and near != [split]:
    tell(f'{folder / near[0]} is the split {split!r}')
  return near[0] if near else ''


def _near(folders: Sequence[str], split: str) -> list[str]:
  """Those that the split may mean: Train, training_set, val2017."""
  words = next((x for x in _WORDS if split.lower() in x), {split.lower()})
  near = []
  for name in folders:
    parts = {*re.findall('[a-z]+', name.lower())}
    if [x for x in _WORDS if x & parts] == [words]:
      near.append(name)
  same = [x for x in folders if x.lower() == split.lower()]
  return same or [x for x in near if x.lower() in words] or near


def split_of(path: str) -> str:
  """'train', 'val' or 'test' if a part of the path is called so, else ''."""
  parts = path.split('/')[::-1]
  called = ((x, y) for x in parts for y in ('train', 'val', 'test'))
  return next((y for x, y in called if _near([x], y)), '')


def sub_folders(folder: Path) -> list[str]:
  try:
    with os.scandir(folder) as entries:
      return sorted(
        x.name for x in entries if x.is_dir() and not x.name.startswith('.')
      )
  except OSError as error:
    raise UserError(
      f'the folder {folder} cannot be read ({error.strerror}). Give yourself '
      'the right to read it.'
    ) from error


def _check_folder(key: str, folder: Path, given: bool) -> None:
  """Raises `UserError` if it is missing; `given`: it belongs to one split."""
  if os.path.isdir(folder):
    return
  flags = f'config.data.data_dir and config.data.folder.{key}'
  there = ''
  if given:
    flags += ', or config.data.train_split and eval_split to their names'
    parent = next(x for x in folder.parents if os.path.isdir(x))
    inside = ', '.join(sub_folders(parent)) or 'none'
    there = f' In {parent} there are: {inside}.'
  raise UserError(f'there is no folder {folder}.{there} Set {flags}.')
