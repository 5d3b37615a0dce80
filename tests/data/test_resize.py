"""Resizing, whole and of windows, against OpenCV."""

import cv2
import numpy as np
import pytest
from numpy.testing import assert_equal

from resnest_jax.data import resize

# As mmcv 2.1.0's rescale_size gives them.
FITTED = [
  ((512, 683), (2048, 512), (512, 683)),
  ((683, 512), (1024, 256), (342, 256)),
  ((37, 100), (2048, 512), (512, 1384)),
  ((500, 333), (1331, 333), (500, 333)),
  ((1024, 2048), (1126, 563), (563, 1126)),
  ((200, 3000), (2048, 512), (137, 2048)),
  ((1, 5000), (2048, 512), (1, 2048)),  # Which mmcv refuses: 0 rows.
]


@pytest.mark.parametrize(('size', 'edges', 'expected'), FITTED)
def test_keep_ratio_size(size, edges, expected):
  assert resize.keep_ratio_size(*size, *edges) == expected


def test_scaled_size():
  # Times 1.25 it is 38 x 46 when rounded; within both edges 46 / 37 decides,
  # and 30 * 46 / 37 is 37.3.
  assert resize.scaled_size(30, 37, 1.25) == (37, 46)
  assert resize.scaled_size(1, 1, 0.25) == (1, 1)


class Parts:
  """An image that gives regions alone, as `scenes.TiledImage`."""

  def __init__(self, image):
    self.shape, self._image = image.shape, image

  def __getitem__(self, part):
    return self._image[part]


def assert_windows_equal_whole(rng, shape, size, *windows, number=3):
  """Those of a random picture and as many random ones, of a pixel or of all."""
  image = rng.integers(0, 256, (*shape, 3), np.uint8)
  label = rng.integers(0, 150, shape, np.uint8)
  resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
  labels = cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST)
  assert_equal(resize.resize_image(image, size), resized)
  starts = rng.integers(0, size, (number, 2))
  ends = rng.integers(starts, size) + 1
  windows += tuple(
    tuple(map(slice, *x)) for x in zip(starts, ends, strict=True)
  )
  for window in windows:
    what = f'{shape} -> {size}, {window}'
    found = resize.resize_image_window(image, size, window)
    assert_equal(found, resized[window], what)
    found = resize.resize_image_window(Parts(image), size, window)
    assert_equal(found, resized[window], what)
    found = resize.resize_label_window(label, size, window)
    assert_equal(found, labels[window], what)
    assert found.flags.c_contiguous


def test_windows_equal_opencvs_whole_image():
  """400 sizes, from a tenth to six times as large, three windows each."""
  rng = np.random.default_rng(2)
  for _ in range(400):
    shape = rng.integers(1, 120, 2)
    factors = np.exp(rng.uniform(np.log(0.1), np.log(6), 2))
    size = np.maximum(1, np.round(shape * factors)).astype(int).tolist()
    assert_windows_equal_whole(rng, shape, tuple(size))


def test_windows_of_pictures_that_hardly_change_their_size():
  """OpenCV copies what keeps its size, as corners of a larger picture may."""
  rng = np.random.default_rng(5)
  for shape, size, window in (
    ((302, 112), (301, 112), (slice(24, 120), slice(9, 105))),
    ((1024, 1024), (1023, 1023), (slice(189, 445), slice(203, 459))),
    ((400, 2000), (400, 2001), (slice(0, 400), slice(107, 619))),
  ):
    assert_windows_equal_whole(rng, shape, size, window, number=0)
  for _ in range(150):
    shape = rng.integers(1, 500, 2)
    change = rng.integers(-3, 4, 2) * rng.integers(0, 2, 2)
    size = tuple(np.maximum(1, shape + change).tolist())
    corner = tuple(slice(0, max(1, n // 3)) for n in size)
    assert_windows_equal_whole(rng, shape, size, corner)


@pytest.mark.parametrize('factor', [0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3])
def test_windows_where_opencv_has_ways_of_its_own(factor):
  """At a half it takes means of four pixels, at 1 it copies."""
  rng, size = np.random.default_rng(3), (int(96 * factor), int(160 * factor))
  assert_windows_equal_whole(rng, (96, 160), size, number=10)


def test_nearest_pixels_of_long_axes_equal_opencvs():
  """1000 lengths: rounding differs where a pixel lies on a border."""
  rng = np.random.default_rng(4)
  for length, new in rng.integers(1, 5000, (1000, 2)).tolist():
    row = np.arange(length, dtype=np.float32)[None]
    expected = cv2.resize(row, (new, 1), interpolation=cv2.INTER_NEAREST)
    found = resize.nearest_pixels(length, new, slice(0, new))
    assert_equal(found, expected[0], f'{length} -> {new}')
