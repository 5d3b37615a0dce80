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
PIXELS = 'c81e28 0adc5a 233cfa 808080 ffffff 000000 5a5514 fa78f5'
DISTORTED = {
  'brightness': (
    PhotometricDraw(brightness=-20.5),
    'b30913 00c745 0e27e5 6b6b6b eaeaea 000000 454000 e563e0',
  ),
  'contrast': (
    PhotometricDraw(contrast_first=1.37),
    'ff2936 0dff7b 2f52ff afafaf ffffff 000000 7b741b ffa4ff',
  ),
  'saturation': (
    PhotometricDraw(saturation=0.61),
    'c86067 5cdc8b 7885fa 808080 ffffff 000000 5a5730 faabf7',
  ),
  'hue': (
    PhotometricDraw(hue=-13),
    'c81e73 18dc0a 2396fa 808080 ffffff 000000 5a3714 c678fa',
  ),
  'all': (
    PhotometricDraw(
      brightness=17.25, saturation=1.4, hue=11, contrast_last=0.72
    ),
    '9c2e00 00aa7d 2b00b7 686868 b7b7b7 0c0c0c 384d06 b7408b',
  ),
}


@pytest.mark.parametrize('name', DISTORTED)
def test_twin_of_the_photometric_distortion_equals_stored_results(name):
  draw, expected = DISTORTED[name]
  image, expected = (
    np.frombuffer(bytes.fromhex(x), np.uint8).reshape(2, 4, 3)
    for x in (PIXELS, expected)
  )
  assert_equal(photometric_distortion(image, draw), expected)


def test_what_is_not_drawn_is_the_identity():
  assert_equal(PhotometricDraw().parameters(), np.float32([0, 1, 1, 0, 1]))
  full = PhotometricDraw(-3.5, 1.25, 0.75, -7, 0.5).parameters()
  assert_equal(full, np.float32([-3.5, 1.25, 0.75, -7, 0.5]))
  assert full.dtype == np.float32


@pytest.mark.parametrize(
  ('pixels', 'diverse'),
  # One has exactly 3 of 4, the last 3 of 5.
  [([], 0), ([3], 0), ([3, 7], 1), ([3, 7, 3, 3], 0), ([3, 7, 3, 3, 7], 1)],
)
def test_is_diverse_counts_valid_pixels_only(pixels, diverse):
  label = np.array([[*pixels, *[255] * 9]], np.uint8)
  assert transforms.is_diverse(label, 0.75) == diverse


@pytest.mark.parametrize('crop_size', [(24, 24), (48, 16), (200, 30)])
def test_crop_origin_equals_naive_twin(crop_size):
  rng = np.random.default_rng(1)
  refusals = []
  for _ in range(150):
    shape = rng.integers(30, 90, 2)
    label = blocks(rng, *shape, num_classes=3, cell=rng.integers(8, 60))
    offsets = rng.random((11, 2))
    expected, refused = origin_twin(label, offsets, crop_size, 0.75)
    (rows, columns), crop = transforms.random_crop(
      label, label.shape, offsets, crop_size, 0.75
    )
    assert (rows.start, columns.start) == expected
    assert_equal(crop, label[rows, columns])
    refusals.append(refused)
  # The cases cover the first try, later ones and the unseen last one.
  assert {0, 1, 2, 10} <= set(refusals)


def test_crops_of_one_class_are_taken_if_none_is_too_large():
  label, offsets = np.zeros((64, 64), np.uint8), np.eye(11, 2) / 2
  (rows, columns), _ = transforms.random_crop(
    label, label.shape, offsets, (32, 32), 1.0
  )
  assert (rows.start, columns.start) == (16, 0)


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


@pytest.mark.parametrize(
  ('image', 'label', 'message'),
  [
    ((2, 3, 4), (2, 3), r"'x': the image is uint8 \(2, 3, 4\).*\(H, W, 3\)"),
    ((2, 3, 3), (2, 3, 1), r'the label is uint8 \(2, 3, 1\); .*uint8 \(H, W\)'),
    ((2, 3, 3), (3, 2), 'is 3x2 pixels but its label is 2x3'),
  ],
)
def test_samples_of_another_kind_are_refused_by_name(image, label, message):
  with pytest.raises(UserError, match=message):
    transforms.check_sizes(
      np.zeros(image, np.uint8), np.zeros(label, np.uint8), 'x'
    )
