"""A user's own images and index masks, read in place.

An image and its mask have the same name, apart from suffixes, in two trees of
folders, or share a line of a list. Masks are 8-bit PNG files with one channel,
and a classes file defines their values. Other masks are refused with the
command that converts them.

A photograph's EXIF orientation is applied, as mmsegmentation and most viewers
do. Masks are read unchanged: draw them on the upright picture.
"""

import dataclasses
import hashlib
import itertools
import json
import operator
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from resnest_jax.data.archives import ending, enumeration
from resnest_jax.data.images import decode_image, is_turned, png_kind
from resnest_jax.data.own import pairing
from resnest_jax.data.own.classes import Classes, read_classes
from resnest_jax.data.own.pairing import Pair
from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.threads import map_in_threads


@dataclasses.dataclass(eq=False, repr=False)
class FolderSplit:
  """A sequence of samples that threads can share and that can be pickled.

  `split[i]` is a dict as in `datasets.PreparedSplit`: `image` uint8 (H, W, 3)
  RGB, `label` uint8 (H, W) train ids and 255, `name`.

  Attributes:
    labels: the `LabelSet` of the classes file.
    pairs: the `Pair` of each sample.
    known_values: bool (256,), the mask values in the classes file, and 255.
    classes_file: its path.
    masks: folder of the masks of all splits.
  """

  split: str
  pairs: Sequence[Pair]
  classes: dataclasses.InitVar[Classes]
  classes_file: str
  masks: str

  name = 'folder'  # `config.data.name` that selects this class.

  def __post_init__(self, classes: Classes):
    self.pairs = tuple(self.pairs)
    self.labels = classes.labels
    self.known_values = classes.known()

  def __len__(self) -> int:
    return len(self.pairs)

  @property
  def fingerprint(self) -> str:
    """Differs if files have other names, sizes or places in the order."""

    def facts(pair: Pair) -> tuple:
      files = map(Path, (pair.image, pair.mask))
      return pair.name, *(x.stat().st_size if x.exists() else -1 for x in files)

    files = list(map_in_threads(facts, self.pairs))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]

  def __getitem__(self, index: int) -> dict[str, Any]:
    pair = self._pair(index)
    image, mask = _read_image(pair), self._read_mask(pair)
    # Not cut to 8: which bits hold the picture depends on the camera.
    if image.dtype != np.uint8:
      raise UserError(
        f'{pair.image} has {8 * image.dtype.itemsize} bits per channel; images '
        'have 8. Convert it.'
      )
    if image.shape[:2] != mask.shape:
      raise _different_sizes(pair, image, mask)
    label = self.labels.to_train_id[mask]
    return {'image': image, 'label': label, 'name': pair.name}

  def location(self, index: int) -> str:
    """The files that `split[index]` reads, in words."""
    pair = self.pairs[index]
    return f'{pair.image} with {pair.mask}'

  def label(self, index: int) -> np.ndarray:
    """The label of `split[index]`, without reading the image."""
    return self.labels.to_train_id[self._read_mask(self._pair(index))]

  def raw(self, index: int) -> dict[str, Any]:
    """The stored sample, unchecked, for the label doctor.

    `image` (H, W, 3) RGB has any depth, `mask` any shape and type.

    Raises:
      UnreadableSample: a file is missing or damaged.
    """
    pair = self._pair(index)
    image = _read_image(pair)
    mask, _ = _decode_file(pair.mask, cv2.IMREAD_UNCHANGED)
    return {'image': image, 'mask': mask, 'name': pair.name}

  def _pair(self, index: int) -> Pair:
    # A negative index is a sampler's mistake, not a sample from the end.
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f'{index} is not in 0 .. {len(self) - 1}')
    return self.pairs[index]

  def _read_mask(self, pair: Pair) -> np.ndarray:
    """Raises `UserError` unless it is an index mask of known values."""
    path = pair.mask
    mask, png = _decode_file(path, cv2.IMREAD_UNCHANGED)
    needed = 'Masks are 8-bit PNG files with one channel, the class number.'
    # Not the pixels: OpenCV turns palettes into colours, and few bits into 8.
    with ending(needed):
      bits, colour = png_kind(png, path)
    if (bits, colour) != (8, 'grey'):
      words = ['--masks', self.masks, '--classes', self.classes_file]
      words += ['--out', f'{self.masks}_ids']
      raise UserError(
        f'{path} is a {bits}-bit {colour} picture. {needed} This converts all '
        'files there:\n  python -m resnest_jax.data.prepare '
        f'palette2id {shlex.join(words)}{_HOW.get(colour, "")}'
      )
    if (unknown := ~self.known_values[mask]).any():
      values = np.unique(mask[unknown]).tolist()
      listed = enumeration(map(str, values[:10]))
      known = np.flatnonzero(self.known_values).tolist()
      raise UserError(
        f'{path} has {np.count_nonzero(unknown)} pixels with values that '
        f'{self.classes_file} does not have: {listed}'
        f'{" and more" if len(values) > 10 else ""}; it has '
        f'{_ranges(known)}. Give each a class ("{values[0]}: name") or '
        f'ignore it ("ignore: {values[0]}").'
      )
    return mask


# What palette2id needs for a PNG colour type. Palettes may mean either.
_HOW = {
  'palette': '\nAdd --indices if the indices of its palette are the classes.',
  'grey': ' --indices',
  'grey-alpha': ' --indices',
}


def _read_image(pair: Pair) -> np.ndarray:
  # COLOR applies the EXIF orientation, unlike UNCHANGED for masks. ANYDEPTH
  # keeps 16 bits, which OpenCV would silently cut to 8.
  return _decode_file(pair.image, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH)[0]


def _decode_file(path: str, flags: int) -> tuple[np.ndarray, bytes]:
  # Not `cv2.imread`, which fills the end of a truncated JPEG with grey.
  try:
    encoded = Path(path).read_bytes()
  except OSError as error:
    raise UnreadableSample(
      f'{path} cannot be read ({error.strerror}).'
    ) from error
  pixels = decode_image(encoded, flags)
  if pixels is None:
    raise UnreadableSample(
      f'{path} cannot be decoded: its {len(encoded)} bytes are damaged, '
      'truncated, or not of the format that its name says. Repair it, or '
      'remove it and its partner.'
    )
  return pixels, encoded


def _different_sizes(pair: Pair, image, mask) -> UserError:
  (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
  hint = 'Repair the pair or remove it.'
  if (height, width) == (mask_width, mask_height):
    hint = 'The mask is transposed or rotated: rotate it back.'
    if is_turned(pair.image):
      hint = (
        'The photograph is turned by its EXIF orientation and the mask is not: '
        'rotate the mask, or save the photograph without that entry.'
      )
  return UserError(
    f'{pair.image} is {width}x{height} pixels but {pair.mask} is '
    f'{mask_width}x{mask_height}; both must have the same size. {hint}'
  )


def _ranges(values: Sequence[int]) -> str:
  """'0 to 3, 7 and 255'."""
  # Of consecutive values the distance to their positions is the same.
  runs = itertools.groupby(enumerate(values), lambda item: item[1] - item[0])
  parts = [[value for _, value in run] for _, run in runs]
  return enumeration(
    f'{part[0]} to {part[-1]}' if len(part) > 2 else ', '.join(map(str, part))
    for part in parts
  )


def make_folder_split(data_config: Any, split: str) -> FolderSplit:
  """Opens a split of the folders or lists that a configuration names.

  Args:
    data_config: `config.data`; its section `folder` explains the rules.
    split: `data_config.train_split`, `eval_split`, or the name of another sub
      folder or list.

  Raises:
    UserError: a folder, list or classes file is missing, an image or mask has
      no partner, a name occurs twice, or there are no samples.
  """
  root, options = Path(data_config.data_dir), data_config.folder
  classes_file = root / options.classes
  classes = read_classes(classes_file)
  names = (data_config.train_split, data_config.eval_split)
  # `given`: the user divided the samples into splits; otherwise they are drawn.
  if options.lists:
    given = '{split}' in options.lists
    source = root / options.lists.replace('{split}', split)
    pairs = pairing.read_list(source)
    all_masks = os.path.dirname(pairs[0].mask)
  else:
    source, masks = (
      root / path.replace('{split}', split)
      for path in (options.images, options.masks)
    )
    all_masks = str(masks)
    given = '{split}' in options.images
    # One of the two suffices: one that is misspelt must not mix both splits.
    if not given and any((source / name).is_dir() for name in names):
      given, source, masks = True, source / split, masks / split
    _check_folder('images', source, given)
    _check_folder('masks', masks, given)
    pairs = pairing.match_pairs(
      source, masks, options.image_suffix, options.mask_suffix
    )
  if not given:
    total = len(pairs)
    pairs = pairing.draw_split(
      pairs, split, names, options.eval_fraction, options.split_seed
    )
    if not pairs:
      raise UserError(
        f'of the {total} samples in {source} none was drawn for the split '
        f'{split!r}. Change config.data.folder.eval_fraction or split_seed, or '
        f'make sub folders {names[0]} and {names[1]}.'
      )
  return FolderSplit(split, pairs, classes, str(classes_file), all_masks)


def _check_folder(key: str, folder: Path, given: bool) -> None:
  """Raises `UserError` if it is missing; `given`: it belongs to one split."""
  if folder.is_dir():
    return
  flags = f'config.data.data_dir and config.data.folder.{key}'
  listed = ''
  if given:
    flags += ', or config.data.train_split and eval_split to their names'
    if folder.parent.is_dir():
      inside = sorted(x.name for x in folder.parent.iterdir() if x.is_dir())
      listed = f' In {folder.parent} there are: {", ".join(inside) or "none"}.'
  raise UserError(f'there is no folder {folder}.{listed} Set {flags}.')
