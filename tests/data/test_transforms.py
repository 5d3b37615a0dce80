"""Augmentation: stored results of mmsegmentation 1.2.2, and naive twins."""

import cv2
import numpy as np
import pytest
from data.twins import blocks, origin_twin, photometric_distortion
from numpy.testing import assert_equal

from resnest_jax.data import transforms
from resnest_jax.data.transforms import PhotometricDraw, augment
from resnest_jax.errors import UserError

# Eight RGB pixels and what mmsegmentation 1.2.2 (OpenCV 4.13) makes of them.
PIXELS = np.array(
  [
    [[200, 30, 40], [10, 220, 90], [35, 60, 250], [128, 128, 128]],
    [[255, 255, 255], [0, 0, 0], [90, 85, 20], [250, 120, 245]],
  ],
  np.uint8,
)
DISTORTED = {
  'brightness': (
    PhotometricDraw(brightness=-20.5),
    [
      [[179, 9, 19], [0, 199, 69], [14, 39, 229], [107, 107, 107]],
      [[234, 234, 234], [0, 0, 0], [69, 64, 0], [229, 99, 224]],
    ],
  ),
  'contrast': (
    PhotometricDraw(contrast_first=1.37),
    [
      [[255, 41, 54], [13, 255, 123], [47, 82, 255], [175, 175, 175]],
      [[255, 255, 255], [0, 0, 0], [123, 116, 27], [255, 164, 255]],
    ],
  ),
  'saturation': (
    PhotometricDraw(saturation=0.61),
    [
      [[200, 96, 103], [92, 220, 139], [120, 133, 250], [128, 128, 128]],
      [[255, 255, 255], [0, 0, 0], [90, 87, 48], [250, 171, 247]],
    ],
  ),
  'hue': (
    PhotometricDraw(hue=-13),
    [
      [[200, 30, 115], [24, 220, 10], [35, 150, 250], [128, 128, 128]],
      [[255, 255, 255], [0, 0, 0], [90, 55, 20], [198, 120, 250]],
    ],
  ),
  'all': (
    PhotometricDraw(
      brightness=17.25, saturation=1.4, hue=11, contrast_last=0.72
    ),
    [
      [[156, 46, 0], [0, 170, 125], [43, 0, 183], [104, 104, 104]],
      [[183, 183, 183], [12, 12, 12], [56, 77, 6], [183, 64, 139]],
    ],
  ),
}


@pytest.mark.parametrize('name', DISTORTED)
def test_twin_of_the_photometric_distortion_equals_stored_results(name):
  draw, expected = DISTORTED[name]
  image = PIXELS.copy()
  assert_equal(photometric_distortion(image, draw), expected)
  assert_equal(image, PIXELS)


def test_what_is_not_drawn_is_the_identity():
  image = PIXELS.copy()
  same = photometric_distortion(image, PhotometricDraw())
  assert_equal(same, PIXELS)
  assert_equal(PhotometricDraw().parameters(), np.float32([0, 1, 1, 0, 1]))
  full = PhotometricDraw(-3.5, 1.25, 0.75, -7, 0.5).parameters()
  assert_equal(full, np.float32([-3.5, 1.25, 0.75, -7, 0.5]))
  assert full.dtype == np.float32


def test_is_diverse_counts_valid_pixels_only():
  label = np.full((4, 4), 255, np.uint8)
  assert not transforms.is_diverse(label, 0.75)
  label[0, 0] = 3
  assert not transforms.is_diverse(label, 0.75)
  label[0, 1] = 7
  assert transforms.is_diverse(label, 0.75)
  label[0, 2:4] = 3
  assert not transforms.is_diverse(label, 0.75)  # Exactly 3 of 4.
  label[1, 0] = 7
  assert transforms.is_diverse(label, 0.75)


def origin(label, offsets, crop_size, cat_max_ratio):
  """Top and left that are chosen for a label that keeps its size."""
  (rows, columns), crop = transforms.random_crop(
    label, label.shape, offsets, crop_size, cat_max_ratio
  )
  assert_equal(crop, label[rows, columns])
  return rows.start, columns.start


@pytest.mark.parametrize('crop_size', [(24, 24), (48, 16), (200, 30)])
def test_crop_origin_equals_naive_twin(crop_size):
  rng = np.random.default_rng(1)
  refusals = []
  for _ in range(150):
    shape = rng.integers(30, 90, 2)
    label = blocks(rng, *shape, num_classes=3, cell=rng.integers(8, 60))
    offsets = rng.random((11, 2))
    expected, refused = origin_twin(label, offsets, crop_size, 0.75)
    assert origin(label, offsets, crop_size, 0.75) == expected
    refusals.append(refused)
  # The cases cover the first try, later ones and the unseen last one.
  assert {0, 1, 2, 10} <= set(refusals)


def test_crop_of_one_class_takes_the_eleventh_origin_unseen():
  label = np.zeros((64, 64), np.uint8)
  offsets = np.zeros((11, 2))
  offsets[10] = 0.999, 0.5
  assert origin(label, offsets, (32, 32), 0.75) == (32, 16)
  assert origin(label, offsets, (32, 32), 1.0) == (0, 0)


def augment_twin(image, label, draw, image_scale, crop_size):
  """Resizes all of both, then crops, flips and pads."""
  height, width = label.shape
  long, short = (int(edge * draw.ratio) for edge in image_scale)
  scale = min(long / max(height, width), short / min(height, width))
  size = int(width * scale + 0.5), int(height * scale + 0.5)
  image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
  label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
  (top, left), refused = origin_twin(label, draw.crop_offsets, crop_size, 0.75)
  results = []
  for array, value in ((image, 0), (label, 255)):
    crop = array[top : top + crop_size[0], left : left + crop_size[1]]
    whole = np.full((*crop_size, *array.shape[2:]), value, np.uint8)
    whole[: len(crop), : crop.shape[1]] = crop[:, :: -1 if draw.flip else 1]
    results.append(whole)
  return *results, crop.shape[:2], refused


@pytest.mark.parametrize(
  ('shape', 'image_scale', 'crop_size'),
  [
    ((128, 256), (256, 128), (64, 128)),  # Cityscapes, an eighth as large.
    ((64, 85), (256, 64), (64, 64)),
    ((91, 47), (256, 64), (64, 64)),
  ],
)
def test_augment_equals_resizing_everything_first(
  shape, image_scale, crop_size
):
  rng = np.random.default_rng(shape[0])
  padded, refused = set(), set()
  options = {'image_scale': image_scale, 'crop_size': crop_size}
  for _ in range(100):
    label = blocks(rng, *shape, num_classes=2, cell=rng.integers(8, 90))
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    draw = transforms.draw_augmentation(rng)
    *expected, size, refusals = augment_twin(image, label, draw, **options)
    sample = augment(image, label, draw, cat_max_ratio=0.75, **options)
    assert_equal([sample['image'], sample['label']], expected)
    assert_equal(sample['size'], size)
    assert_equal(sample['photometric'], draw.photometric.parameters())
    assert sample['image'].flags.c_contiguous
    padded.add(size != crop_size)
    refused.add(refusals)
  assert {0, 1, 2} <= refused
  assert padded == ({False} if shape == (128, 256) else {False, True})


def test_sizes_that_differ_name_the_sample():
  image = np.zeros((4, 6, 3), np.uint8)
  transforms.check_sizes(image, image[..., 0], 'fine')
  with pytest.raises(UserError, match=r"'ADE_7'.*6x4 .*5x4"):
    transforms.check_sizes(image, np.zeros((4, 5), np.uint8), 'ADE_7')
