"""A user's own images and index masks, read in place.

An image and its mask have the same name, apart from suffixes, in two trees of
folders, or share a line of a list. Masks are PNG files of 8 or 16 bits with one
channel, and a classes file defines their values. Other masks are refused with
the command that converts them.

A photograph's EXIF orientation is applied, as mmsegmentation and most viewers
do. Masks are read unchanged: draw them on the upright picture.
"""

import contextlib
import dataclasses
import hashlib
import json
import operator
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from resnest_jax.data import headers, images, pictures
from resnest_jax.data.own import masks as own_masks
from resnest_jax.data.own import splits
from resnest_jax.data.own.classes import read_classes
from resnest_jax.data.own.pairing import Pair
from resnest_jax.data.preprocess import IMAGENET, Normalization
from resnest_jax.data.rasters import as_image
from resnest_jax.data.tiled import TiledImage
from resnest_jax.errors import UserError
from resnest_jax.text import listed
from resnest_jax.threads import map_in_threads


@dataclasses.dataclass(eq=False, repr=False)
class FolderSplit:
  """A sequence of samples that threads can share and that can be pickled.

  `split[i]` is a dict of `image` uint8 (H, W, 3) RGB, or of `bands`, `label`
  uint8 (H, W) train ids and 255, `name`. `labels` is the `LabelSet` of the
  classes file, `known_values`, bool (65536,), the mask values there, and 255.
  """

  split: str
  pairs: Sequence[Pair]
  conversion: own_masks.Conversion  # Of masks of other kinds.
  max_pixels: int = images.MAX_PIXELS
  normalization: Normalization = IMAGENET  # It has the bands of the images.

  name = 'folder'  # `config.data.name` that selects this class.

  def __post_init__(self):
    self.pairs = tuple(self.pairs)
    self.labels = self.conversion.classes.labels
    self.known_values = self.conversion.classes.known()
    self.bands = self.normalization.bands

  def __len__(self) -> int:
    return len(self.pairs)

  @property
  def fingerprint(self) -> str:
    """Differs if files have other names, sizes or places in the order."""
    return fingerprint_of(self.pairs)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.labelled(index, self.raw(index))

  def in_parts(self, index: int) -> dict[str, Any]:
    """`split[index]`, but the image is a `TiledImage` if it has tiles."""
    pair = item_of(self.pairs, index)
    usable = not self.bands and pair.image.lower().endswith(('.tif', '.tiff'))
    # Reading it whole says why, if it cannot be read in parts.
    with contextlib.suppress(UserError):
      if usable and (image := TiledImage(pair.image)).has_tiles:
        mask = self._read_mask(pair)
        sample = {'image': image, 'mask': mask.pixels, 'stored': mask}
        return self.labelled(index, sample)
    return self[index]

  def location(self, index: int) -> str:
    """The files that `split[index]` reads, in words."""
    pair = self.pairs[index]
    return f'{pair.image} with {pair.mask}'

  def label(self, index: int) -> np.ndarray:
    """The label of `split[index]`, without reading the image."""
    pair = item_of(self.pairs, index)
    return self._to_label(pair.mask, self._read_mask(pair))

  def raw(self, index: int) -> dict[str, Any]:
    """The stored sample, unchecked, for the label doctor.

    `image` (H, W, 3) RGB has any depth, `mask` any shape and type; `stored`,
    an `own.masks.Stored`, tells its kind; `channels` are those of the image.

    Raises:
      UnreadableSample: a file is missing or damaged.
    """
    pair, channels = item_of(self.pairs, index), 0
    if self.bands:
      image = self.image(index)
    else:
      image, encoded = read_picture(pair.image, self.max_pixels, _PAIR)
      channels = headers.channels(encoded)
    mask = self._read_mask(pair)
    return {
      'image': image,
      'channels': channels,
      'mask': mask.pixels,
      'stored': mask,
      'name': pair.name,
    }

  def image(self, index: int) -> np.ndarray:
    """The image of `split[index]` alone, of a split with bands."""
    path = item_of(self.pairs, index).image
    return as_image(path, self.normalization, self.max_pixels)

  def labelled(self, index: int, sample: dict[str, Any]) -> dict[str, Any]:
    """What `split[index]` makes of `raw(index)`, or a `UserError`."""
    pair, image = item_of(self.pairs, index), sample['image']
    label = self._to_label(pair.mask, sample['stored'])
    if not self.bands:
      check_depth(pair.image, image, f' {headers.BANDS}')
    if image.shape[:2] != sample['mask'].shape:
      (height, width), mask = image.shape[:2], sample['mask'].shape
      raise UserError(
        f'{pair.image} is {width}x{height} pixels but {pair.mask} is '
        f'{mask[1]}x{mask[0]}; both must have the same size. Repair the pair '
        'or remove it; python -m resnest_jax.data.doctor says whether one of '
        'them is turned.'
      )
    return {'image': image, 'label': label, 'name': pair.name}

  def _read_mask(self, pair: Pair) -> own_masks.Stored:
    options = cv2.IMREAD_UNCHANGED, self.max_pixels, _REPAIR.format(_PAIR)
    mask, encoded = pictures.decode_file(pair.mask, *options)
    return own_masks.stored_mask(mask, encoded, self.known_values)

  def _to_label(self, path: str, mask: own_masks.Stored) -> np.ndarray:
    """Raises `UserError` unless it is an index mask of known values."""
    if mask.kind not in own_masks.INDEX_MASKS:
      no_png = 'bit' not in mask.kind
      what = (
        f'not a PNG but {mask.kind}' if no_png else f'a {mask.kind} picture'
      )
      raise UserError(
        f'{path} is {what}. Masks are PNG files of 8 or 16 bits with one '
        f'channel, the class number.\n{self.conversion.of_mask(mask)}'
      )
    if (unknown := ~self.known_values[mask.pixels]).any():
      values = np.unique(mask.pixels[unknown]).tolist()
      known = np.flatnonzero(self.known_values).tolist()
      raise UserError(
        f'{path} has {np.count_nonzero(unknown)} pixels with values that '
        f'{self.conversion.classes_file} does not have: {listed(values, 10)}; '
        f'it has {listed(known, 20)}. Give each a class '
        f'({self.conversion.naming(values[0])}), or ignore it '
        f'("ignore: {values[0]}").'
      )
    return self.labels.to_train_id[mask.pixels]


_REPAIR, _PAIR = 'Repair it, or remove {}.', 'it and its partner'


def fingerprint_of(samples: Sequence[tuple[str, ...]]) -> str:
  """Hashes names and the sizes of files; a sample is (name, *paths)."""

  def facts(sample: tuple[str, ...]) -> tuple:
    files = map(Path, sample[1:])
    return sample[0], *(x.stat().st_size if x.exists() else -1 for x in files)

  files = list(map_in_threads(facts, samples))
  return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def item_of(items: Sequence[Any], index: int) -> Any:
  # A negative index is a sampler's mistake, not a sample from the end.
  index = operator.index(index)
  if not 0 <= index < len(items):
    raise IndexError(f'{index} is not in 0 .. {len(items) - 1}')
  return items[index]


def read_picture(
  path: str, max_pixels: int, removed: str
) -> tuple[np.ndarray, bytes]:
  """A picture (H, W, 3) RGB of any depth, upright, and its file's bytes.

  `removed` is what the error for a damaged file tells to remove.
  """
  # COLOR applies the EXIF orientation, unlike UNCHANGED for masks. ANYDEPTH
  # keeps 16 bits, which OpenCV would silently cut to 8.
  flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH
  remedy = _REPAIR.format(removed)
  image, encoded = pictures.decode_file(path, flags, max_pixels, remedy)
  if image.dtype != np.uint8:
    # OpenCV 5.0 leaves the pixels of a 16-bit TIFF undefined in this order.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    image = images.decode_image(encoded, flags, path, max_pixels)[..., ::-1]
  return image, encoded


def check_depth(path: str, image: np.ndarray, more: str = '') -> None:
  # Not cut to 8: which bits hold the picture depends on the camera.
  if image.dtype != np.uint8:
    raise UserError(
      f'{path} has {8 * image.dtype.itemsize} bits per channel; images '
      f'have 8.\n{headers.to_8_bits(image.max().item())}{more}'
    )


def root_of(data_config: Any, things: str) -> Path:
  root = Path(data_config.data_dir)
  if not os.path.isdir(root):
    raise UserError(
      f'there is no folder {root}; set config.data.data_dir to the folder of '
      f'your {things}.'
    )
  return root


def make_folder_split(data_config: Any, split: str) -> FolderSplit:
  """Opens a split of the folders or lists that a configuration names.

  `split` is `data_config.train_split`, `eval_split`, or the name of another sub
  folder or list.

  Raises:
    UserError: a folder, list or classes file is missing, an image or mask has
      no partner, a name occurs twice, or there are no samples.
  """
  root, options = root_of(data_config, 'images and masks'), data_config.folder
  classes_file = root / options.classes
  classes = read_classes(classes_file)

  def conversion(masks: str, suffix: str) -> own_masks.Conversion:
    return own_masks.Conversion(
      masks,
      str(classes_file),
      classes,
      suffix=options.mask_suffix or suffix,
      then=_naming(root, options, masks, split),
    )

  pairs, masks = splits.find_pairs(
    data_config, split, lambda *where: conversion(*where).command('mask_values')
  )
  max_pixels = data_config.get('max_pixels', images.MAX_PIXELS)
  folder = os.path.join(os.path.abspath(masks), '')
  among = any(os.path.abspath(x.image).startswith(folder) for x in pairs)
  found = split, pairs, conversion(masks, '.png' if among else ''), max_pixels
  if bands := tuple(data_config.get('bands', ())):
    found += (Normalization(bands=bands, dtype=''),)
  return FolderSplit(*found)


def _naming(root: Path, options: Any, masks: str, split: str) -> str:
  """How converted masks are used, in words."""
  if options.lists:
    named = f'name the files of {masks}_ids in {root / options.lists}'
    folder = root / options.masks.replace('{split}', split)
    if os.path.abspath(folder) != os.path.abspath(masks):
      return named
    flag = shlex.quote(f'--config.data.folder.masks={options.masks}_ids')
    return f'{named}, or, if it has names alone, add {flag}'
  # For one split or, with {split} in the path, for all.
  folder = os.path.relpath(f'{root / options.masks}_ids', root)
  return 'add ' + shlex.quote(f'--config.data.folder.masks={folder}')
