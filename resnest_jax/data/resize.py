"""Resizes images and labels as OpenCV does, whole or only a window of them.

PyTorch-Encoding resizes in Pillow, which takes means where it reduces.

Images are (H, W, C), uint8 RGB or of other bands, labels uint8 (H, W), sizes
(height, width).
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

from resnest_jax.data.preprocess import resize_one

Window = tuple[slice, slice]  # (rows, columns)


def keep_ratio_size(
  height: int, width: int, long_edge: int, short_edge: int
) -> tuple[int, int]:
  """Returns the largest size of the same aspect ratio within two edges."""
  # As mmcv's rescale_size, which rounds half up but may return 0.
  scale = min(long_edge / max(height, width), short_edge / min(height, width))
  return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resized_size(
  height: int, width: int, ratio: float, image_scale: tuple[int, int]
) -> tuple[int, int]:
  """Returns the size within the two edges of `image_scale` times `ratio`."""
  # Truncated, as mmcv's RandomResize does.
  edges = [int(edge * ratio) for edge in image_scale]
  return keep_ratio_size(height, width, max(edges), min(edges))


def long_edge_size(height: int, width: int, long: int) -> tuple[int, int]:
  """Returns the size of the same aspect ratio whose longer edge is `long`."""
  # As PyTorch-Encoding, which fails where an edge becomes 0.
  longer = max(height, width)
  height, width = (int(x * long / longer + 0.5) for x in (height, width))
  return max(height, 1), max(width, 1)


def scaled_size(height: int, width: int, ratio: float) -> tuple[int, int]:
  # Rounded twice, as in mmsegmentation 1.x.
  edges = int(height * ratio + 0.5), int(width * ratio + 0.5)
  return keep_ratio_size(height, width, max(edges), min(edges))


def padded_size(size: Sequence[int], bucket: int) -> tuple[int, ...]:
  """Rounds height and width up to multiples of `bucket`."""
  return tuple(-(-length // bucket) * bucket for length in size)


def bilinear_taps(length: int, new: int, axis: int) -> np.ndarray:
  """Returns the taps of OpenCV's bilinear 8-bit resize, int32 (new, 4).

  Each row has two pixels of the old axis and their weights in units of 1/2048.
  """
  # In OpenCV's order of operations and precision: 1 / (new / length) may differ
  # from length / new in the last bit.
  place = ((np.arange(new) + 0.5) * (1 / (new / length)) - 0.5).astype('f4')
  low = np.floor(place).astype(np.int64)
  weight = place - low.astype(np.float32)
  # Beyond a border, columns take one pixel. Rows take the border's pixel twice,
  # with both weights, whose products are rounded apart.
  if axis == 1:
    weight[(low < 0) | (low >= length - 1)] = 0
    low = np.clip(low, 0, length - 1)
  weights = [np.rint(x * np.float32(2048)) for x in (1 - weight, weight)]
  pixels = [np.clip(low + i, 0, length - 1) for i in (0, 1)]
  return np.stack([*pixels, *weights], -1).astype(np.int32)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
  return resized.reshape(*size, -1)  # OpenCV drops the axis of one channel.


def resize_in_pillow(
  array: np.ndarray, size: tuple[int, int], resampling: Image.Resampling
) -> np.ndarray:
  """Returns an image or a label, read-only."""
  picture = Image.fromarray(array)
  return np.asarray(picture.resize(size[::-1], resampling))


def resize_image_window(
  image: np.ndarray, size: tuple[int, int], window: Window
) -> np.ndarray:
  """Returns `resize_image(image, size)[window]`, computing little more."""
  if not isinstance(image, np.ndarray):
    return _resize_region(image, size, window)
  # What is above and left of the window must stay: OpenCV computes the place of
  # a pixel from the corner of the image before it rounds its weights.
  sides = list(zip(image.shape[:2], size, window, strict=True))
  # The source pixels around the window's last one, with room for rounding.
  ends = [min(n, int((part.stop + 1) * n / new) + 3) for n, new, part in sides]
  # From the corner's size, OpenCV would compute another scale.
  fy, fx = (new / length for length, new, _ in sides)
  # OpenCV copies where the result has the size of what it is given: near a
  # factor of 1 that is true of corners whose image does change its size.
  copied = [round(end * f) for end, f in zip(ends, (fy, fx), strict=True)]
  if ends in (list(image.shape[:2]), copied):
    return resize_image(image, size)[window]
  corner = image[: ends[0], : ends[1]]
  resized = cv2.resize(
    corner, None, fx=fx, fy=fy, interpolation=cv2.INTER_LINEAR
  )
  return resized.reshape(*resized.shape[:2], -1)[window]


def _resize_region(
  image: Any, size: tuple[int, int], window: Window
) -> np.ndarray:
  """`resize_image_window` of what gives regions of uint8, reading one."""
  parts, taps = [], []
  for axis, part in enumerate(window):
    of_axis = bilinear_taps(image.shape[axis], size[axis], axis)[part]
    start, end = int(of_axis[:, 0].min()), int(of_axis[:, 1].max()) + 1
    parts.append(slice(start, end))
    taps.append(of_axis - np.array([start, start, 0, 0], np.int32))
  return resize_one(image[*parts], *taps)


def resize_label_window(
  label: np.ndarray, size: tuple[int, int], window: Window
) -> np.ndarray:
  """Resizes a label to `size`, nearest in OpenCV's sense, and cuts `window`."""
  rows, columns = (
    nearest_pixels(length, new, part)
    for length, new, part in zip(label.shape, size, window, strict=True)
  )
  # Four times as fast as label[rows[:, None], columns], and contiguous.
  left = columns[0]
  strip = label[rows, left : columns[-1] + 1]
  return strip.take(columns - left, axis=1)


def nearest_pixels(length: int, new: int, part: slice) -> np.ndarray:
  """Returns which pixels OpenCV's nearest resize takes in `part` of an axis."""
  step = 1 / (new / length)  # As in `bilinear_taps`.
  places = np.floor(np.arange(part.start, part.stop) * step).astype(np.intp)
  return np.minimum(places, length - 1)
