"""Augmentations that are off unless a key switches them on.

A transform of the user's, turns and rotation change the whole picture, before
it is resized and cropped; blur and erasing change the crop. Their draws have a
stream of their own: all others of a run stay what they are without them.
"""

import contextlib
import runpy
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np

from resnest_jax.data.transforms import check_sizes
from resnest_jax.errors import UserError
from resnest_jax.labels import IGNORE

SIGMAS = 0.1, 2.0  # Of the blur, in pixels of the crop (SimCLR).
ERASED = 0.02, 0.33  # Share of the crop (Zhong et al., AAAI 2020),
RATIO = 0.3  # and height / width of the rectangle, or the reverse, at least.

Sample = dict[str, Any]
Label = np.ndarray | int  # Of a classifier, the class of the picture.


class MoreAugmentation:
  """What these keys of `data` add to a way of augmentation."""

  def __init__(self, data: Any, classes: int = IGNORE):
    """Raises `UserError` if `data.transform` names no transform."""
    self._data, self._classes = data, classes
    if data.transform:
      with self._explained('before the first step'):
        file, _, name = data.transform.rpartition(':')
        functions = runpy.run_path(file or name)
        if name not in functions:
          raise UserError(f'{file} has no function {name}')
        self._make = functions[name]
        self._make().set_random_seed(0)

  def __reduce__(self):  # Functions of a user's file need not pickle.
    return MoreAugmentation, (self._data, self._classes)

  def __call__(
    self,
    sample: Sample,
    rng: np.random.Generator,
    augment: Callable[[np.ndarray, Label], Sample],
  ) -> Sample:
    """Augments a sample of a split, which `augment` resizes and crops."""
    # All is drawn, used or not: no key changes the draws of another.
    seed, turns = rng.integers((2**32, 4)).tolist()
    flip, angle, blurs, sigma, erases, *place = rng.random(9)
    data = self._data
    if data.transform:
      sample = sample | self._transformed(sample, seed)
    image, label = sample['image'], sample['label']
    flips = flip < data.vertical_flip_probability
    degrees = (2 * angle - 1) * data.rotation
    moves = turns * data.quarter_turns, flips, degrees
    image = move(image, *moves, cv2.INTER_LINEAR, 0)
    if not isinstance(label, int):
      label = move(label, *moves, cv2.INTER_NEAREST, IGNORE)
    sample = augment(image, label)
    if blurs < data.blur_probability:
      blur(sample, SIGMAS[0] + sigma * (SIGMAS[1] - SIGMAS[0]))
    if erases < data.erase_probability:
      erase(sample, *place)
    return sample

  def _transformed(self, sample: Sample, seed: int) -> Sample:
    image, label, name = (sample[key] for key in ('image', 'label', 'name'))
    mask = {} if isinstance(label, int) else {'mask': label}
    with self._explained(f'sample {name!r}'):
      # A new one each time: it keeps its random numbers in itself.
      transform = self._make()
      transform.set_random_seed(seed)
      found = {'mask': label} | transform(image=image, **mask)
      kind = image.dtype, image.shape[2]
      image, label = found['image'], found['mask']
      check_sizes(image, label, name, kind)
      others = {*np.unique(label).tolist()} - {*range(self._classes), IGNORE}
      if others or not image.size:
        raise ValueError(f'gives {image.shape} with classes {others or "{}"}')
    return {'image': image, 'label': label}

  @contextlib.contextmanager
  def _explained(self, where: str) -> Iterator[None]:
    try:
      yield
    # Of any kind: one that does not pickle would never leave a worker.
    except (Exception, SystemExit) as error:
      said = f'{type(error).__name__}: {error}'
      if isinstance(error, UserError):  # Its remedy is for files.
        said = str(error).partition('. ')[0]
      raise UserError(
        f'config.data.transform={self._data.transform}, {where}: {said}\nIt '
        'has to be FILE.py:FUNCTION; the function takes nothing and returns a '
        'transform of Albumentations (with set_random_seed) that keeps the '
        'type, the classes of masks, and one size for both.'
      ) from error


def move(
  array: np.ndarray, turns: int, flip: bool, angle: float, way: int, fill: int
) -> np.ndarray:
  """Turns a picture or mask by 90 degrees so many times, mirrors it top to
  bottom if asked to, and rotates it by an angle in degrees, all to the left.

  Rotation interpolates in OpenCV's `way`, keeps the size and fills corners.
  """
  if not (turns or flip or angle or isinstance(array, np.ndarray)):
    return array  # It is read where it is cropped.
  array = np.rot90(array, turns)
  array = np.ascontiguousarray(array[::-1] if flip else array)
  if not angle:
    return array
  size = array.shape[1::-1]
  middle = (size[0] - 1) / 2, (size[1] - 1) / 2
  matrix = cv2.getRotationMatrix2D(middle, angle, 1.0)
  turned = cv2.warpAffine(array, matrix, size, flags=way, borderValue=fill)
  return turned.reshape(array.shape)  # OpenCV drops the axis of one channel.


def blur(sample: Sample, sigma: float) -> None:
  """Blurs the part of an augmented picture that is no padding."""
  sample['image'] = sample['image'].copy()
  seen = sample['image'][*map(slice, sample['size'])]
  seen[...] = cv2.GaussianBlur(seen, (0, 0), sigma).reshape(seen.shape)


def erase(
  sample: Sample, share: float, ratio: float, top: float, left: float
) -> None:
  """Fills a rectangle with the mean colour, and its label with 255.

  Its area, the logarithm of its ratio, and its place are shares of what is
  possible, in [0, 1).
  """
  height, width = size = np.array(sample['size'])
  area = height * width * (ERASED[0] + share * (ERASED[1] - ERASED[0]))
  sides = np.sqrt(area * RATIO ** np.array([1 - 2 * ratio, 2 * ratio - 1]))
  sides = np.clip(np.round(sides).astype(int), 1, size)
  start = (np.array([top, left]) * (size - sides + 1)).astype(int)
  box = tuple(map(slice, start, start + sides))
  mean = sample['image'][:height, :width].mean((0, 1))
  for key, fill in ('image', mean), ('label', IGNORE):
    if sample[key].ndim:  # A classifier's label is a number.
      sample[key] = sample[key].copy()
      sample[key][box] = fill
