"""How a classifier sees pictures: the crops of training and of evaluation.

Bit for bit as PyTorch-Encoding, torchvision and GluonCV do it, for the same
draw. Boxes are (left, top, right, bottom) in pixels.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageEnhance

from resnest_jax.data import policies

TRIES = 10
_INTERPOLATIONS = {
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
}
_ENHANCERS = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
# The directions in which the colours of ImageNet vary, and how far.
_EIGENVECTORS = np.array(
  [
    [-0.5675, 0.7192, 0.4009],
    [-0.5808, -0.0045, -0.8140],
    [-0.5836, -0.6948, 0.4203],
  ]
)
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])

Box = tuple[float, float, float, float]


class Draw(NamedTuple):
  """All that chance decides of a sample; uniform numbers are in [0, 1)."""

  policy: np.ndarray  # (11,), uniform: `policies.UNITS`
  tries: np.ndarray  # (10, 2), uniform: shape and area of each try of a crop
  corner: np.ndarray  # (2,), uniform: left and top
  flip: float  # uniform
  jitter: np.ndarray  # (3,), uniform: brightness, contrast, saturation
  order: np.ndarray  # (3,), in which these are changed
  lighting: np.ndarray  # (3,), normal


def draw(rng: np.random.Generator) -> Draw:
  # The order is part of every run's result; no option changes the amount.
  return Draw(
    policy=rng.random(policies.UNITS),
    tries=rng.random((TRIES, 2)),
    corner=rng.random(2),
    flip=rng.random(),
    jitter=rng.random(3),
    order=rng.permutation(3),
    lighting=rng.standard_normal(3),
  )


def center_box(width: int, height: int, size: int) -> Box:
  """The middle square, size / (size + 32) of the short edge (Encoding)."""
  side = size / (size + 32) * min(width, height)
  left, top = round((width - side) / 2), round((height - side) / 2)
  return left, top, left + side, top + side


def _placed(width: int, height: int, w: int, h: int, corner: np.ndarray) -> Box:
  left = int(corner[0] * (width - w + 1))
  top = int(corner[1] * (height - h + 1))
  return left, top, left + w, top + h


def encoding_box(
  width: int, height: int, tries: np.ndarray, corner: np.ndarray
) -> Box | None:
  """A tenth to all of the area, of a ratio of 3/4 to 4/3; None: in vain."""
  # TensorFlow's sample_distorted_bounding_box, as PyTorch-Encoding has it.
  area = width * height
  for shape, share in tries:
    ratio = 3 / 4 + (4 / 3 - 3 / 4) * shape
    least, most = (round(math.sqrt(x * area / ratio)) for x in (0.1, 1))
    if most * ratio > width:
      most = int((width + 0.5 - 1e-7) / ratio)
      most -= most * ratio > width
    most = min(most, height)
    least = min(least, most)
    h = round(least + (most - least) * share)
    w = round(h * ratio)
    if 0.1 * area <= w * h <= area and w <= width and h <= height:
      whole = (w, h) == (width, height)
      return None if whole else _placed(width, height, w, h, corner)
  return None


def resized_box(
  width: int, height: int, tries: np.ndarray, corner: np.ndarray
) -> Box:
  """8 % to all of the area, of a ratio of 3/4 to 4/3 (torchvision)."""
  low, high = math.log(3 / 4), math.log(4 / 3)
  for shape, share in tries:
    ratio = math.exp(low + (high - low) * shape)
    part = width * height * (0.08 + 0.92 * share)
    w, h = round(math.sqrt(part * ratio)), round(math.sqrt(part / ratio))
    if 0 < w <= width and 0 < h <= height:
      return _placed(width, height, w, h, corner)
  # The largest part in the middle that is not too narrow or wide.
  w = min(width, round(height * (4 / 3)))
  h = min(height, round(width / (3 / 4)))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def augment(
  image: np.ndarray,
  label: int,
  draw: Draw,
  *,
  crop_size: tuple[int, int],
  policy: str,
  random_crop: str,
  interpolation: str,
  flip_probability: float,
  color_jitter: float,
  lighting: float,
) -> dict[str, np.ndarray]:
  """Makes a sample of a classifier's training; the options are of `data`.

  Returns:
    `image` uint8 (size, size, 3); `label` int32 (); `size` int32 (2,); `shift`
    float32 (3,), to be added to the colours, which are 0 to 1.
  """
  size = crop_size[0]
  picture = policies.POLICIES[policy](Image.fromarray(image), draw.policy)
  find = {'encoding': encoding_box, 'resized': resized_box}[random_crop]
  box = find(*picture.size, draw.tries, draw.corner)
  picture = _cut(picture, box, size, interpolation)
  if draw.flip < flip_probability:
    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  for i in draw.order if color_jitter else ():
    factor = 1 + color_jitter * (2 * draw.jitter[i] - 1)
    picture = _ENHANCERS[i](picture).enhance(factor)
  return {
    'image': np.array(picture),
    'label': np.array(label, np.int32),
    'size': np.full(2, size, np.int32),
    'shift': shift(lighting * draw.lighting).astype(np.float32),
  }


def shift(alpha: np.ndarray) -> np.ndarray:
  """The change of red, green and blue, (3,), for a share of each direction."""
  return _EIGENVECTORS @ (alpha * _EIGENVALUES)


def _cut(
  picture: Image.Image, box: Box | None, size: int, interpolation: str
) -> Image.Image:
  # Not by Pillow's `box`, which lets pixels around the box count.
  picture = picture.crop(box or center_box(*picture.size, size))
  return picture.resize((size, size), _INTERPOLATIONS[interpolation])


def center_crop(image: np.ndarray, size: int, rule: str) -> np.ndarray:
  """The part that is classified, uint8 (size, size, 3); see data.center_crop.

  Raises nothing: a picture may have any size.
  """
  if rule == 'encoding' or size >= 320:
    return np.array(_cut(Image.fromarray(image), None, size, 'bicubic'))
  short = math.ceil(size / 0.875)
  height, width = (short * n // min(image.shape[:2]) for n in image.shape[:2])
  image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
  top, left = (height - size) // 2, (width - size) // 2
  return image[top : top + size, left : left + size]
