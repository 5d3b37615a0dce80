"""Resizing images and labels as OpenCV does, whole or only a window of them.

Images are uint8 (H, W, 3), labels uint8 (H, W). Sizes are (height, width) in
pixels.
"""

import cv2
import numpy as np

# Rows and columns of an array.
Window = tuple[slice, slice]


def keep_ratio_size(
  height: int, width: int, long_edge: int, short_edge: int
) -> tuple[int, int]:
  """Returns the largest (height, width) of the same aspect within two edges.

  Args:
    height: the image's height.
    width: the image's width.
    long_edge: bound on the longer side.
    short_edge: bound on the shorter side.

  Returns:
    Height and width, each rounded half up and at least 1.
  """
  scale = min(long_edge / max(height, width), short_edge / min(height, width))
  return (
    max(int(height * scale + 0.5), 1),
    max(int(width * scale + 0.5), 1),
  )


def resized_size(
  height: int, width: int, ratio: float, image_scale: tuple[int, int]
) -> tuple[int, int]:
  """Returns the size within `image_scale` (two edges, any order) * `ratio`."""
  edges = [int(edge * ratio) for edge in image_scale]
  return keep_ratio_size(height, width, max(edges), min(edges))


def scaled_size(height: int, width: int, ratio: float) -> tuple[int, int]:
  """Returns the size of an image of `height` and `width` scaled by `ratio`.

  Twice rounded, as mmsegmentation 1.x does it: the aspect ratio is kept within
  the rounded edges.
  """
  edges = int(height * ratio + 0.5), int(width * ratio + 0.5)
  return keep_ratio_size(height, width, max(edges), min(edges))


def padded_size(size: tuple[int, int], bucket: int) -> tuple[int, int]:
  """Rounds height and width up to multiples of `bucket`."""
  return (-(-size[0] // bucket) * bucket, -(-size[1] // bucket) * bucket)


def bilinear_taps(length: int, new: int, axis: int) -> np.ndarray:
  """What OpenCV's bilinear resize of 8-bit images makes a pixel of.

  Args:
    length: pixels of one axis.
    new: how many it gets.
    axis: 0 for rows, 1 for columns; OpenCV treats their edges differently.

  Returns:
    int32 (new, 4): the two pixels, and their weights in units of 1/2048.
  """
  # In OpenCV's order of operations and precision.
  place = ((np.arange(new) + 0.5) * (1 / (new / length)) - 0.5).astype('f4')
  low = np.floor(place).astype(np.int64)
  weight = place - low.astype(np.float32)
  if axis == 1:
    weight[(low < 0) | (low >= length - 1)] = 0
    low = np.clip(low, 0, length - 1)
  weights = [np.rint(x * np.float32(2048)) for x in (1 - weight, weight)]
  pixels = [np.clip(low + i, 0, length - 1) for i in (0, 1)]
  return np.stack([*pixels, *weights], -1).astype(np.int32)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes an image to `size` (height, width), bilinear in OpenCV's sense."""
  return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def resize_image_window(
  image: np.ndarray, size: tuple[int, int], window: Window
) -> np.ndarray:
  """Returns `resize_image(image, size)[window]` without computing all of it.

  What lies below the window or right of it is left out. What lies above and
  left of it is not: OpenCV rounds a pixel's weights after it has computed its
  place from the image's corner, so another corner gives other weights.

  Args:
    image: uint8 (H, W, 3).
    size: height and width that the whole image would get.
    window: rows and columns of the resized image.

  Returns:
    uint8 (rows, columns, 3), which may be a view.
  """
  factors, ends = [], []
  for length, new, part in zip(image.shape[:2], size, window, strict=True):
    factors.append(new / length)
    # The pixels that the last one lies between, with room for rounding.
    ends.append(min(length, int((part.stop + 1) * length / new) + 3))
  if ends == list(image.shape[:2]):
    return resize_image(image, size)[window]
  corner = image[: ends[0], : ends[1]]
  fy, fx = factors
  return cv2.resize(corner, None, fx=fx, fy=fy, interpolation=cv2.INTER_LINEAR)[
    window
  ]


def resize_label_window(
  label: np.ndarray, size: tuple[int, int], window: Window
) -> np.ndarray:
  """Resizes a label to `size`, nearest in OpenCV's sense, and cuts a window.

  Only the window's pixels are looked up.

  Args:
    label: uint8 (H, W).
    size: height and width that the whole label would get.
    window: rows and columns of the resized label.

  Returns:
    uint8 (rows, columns), contiguous.
  """
  rows, columns = (
    nearest_pixels(length, new, part)
    for length, new, part in zip(label.shape, size, window, strict=True)
  )
  left = columns[0]
  strip = label[rows, left : columns[-1] + 1]
  return strip.take(columns - left, axis=1)


def nearest_pixels(length: int, new: int, part: slice) -> np.ndarray:
  """Where OpenCV's nearest resize takes the pixels of `part` from.

  Args:
    length: pixels of one axis.
    new: how many it gets.
    part: of the new ones; `start` and `stop` are within 0 to `new`.

  Returns:
    int (stop - start,), from 0 to `length` - 1.
  """
  # In OpenCV's order of operations: length / new may round differently.
  step = 1 / (new / length)
  places = np.floor(np.arange(part.start, part.stop) * step).astype(np.intp)
  return np.minimum(places, length - 1)
