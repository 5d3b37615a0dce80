"""Augmentations by key: turns, rotation, blur, erasing, the user's own."""

import cv2
import numpy as np
import pytest
from data import readers
from data.pictures import blocks
from data.readers import Scenes, data_config, train_batches
from data.refusals import refused
from numpy.testing import assert_equal
from scipy import ndimage, stats

from resnest_jax.data.more_augmentation import (
  MoreAugmentation,
  blur,
  erase,
  move,
)
from resnest_jax.data.pipeline import sample_key, sample_rng

NEAREST, LINEAR = cv2.INTER_NEAREST, cv2.INTER_LINEAR
# Has what Albumentations' transforms have: images and masks by name, a seed.
OWN = """
import numpy as np


class Turned:
  def __init__(self, **changes):
    self.changes = {'image': np.copy, 'mask': np.copy} | changes

  def set_random_seed(self, seed):
    self.rng = np.random.default_rng(seed)

  def __call__(self, **given):
    turns = int(self.rng.integers(4))
    return {k: self.changes[k](np.rot90(x, turns)) for k, x in given.items()}


def make():
  return Turned()


floats = lambda: Turned(image=lambda image: image / np.float32(255))
cropped = lambda: Turned(image=lambda image: image[1:])
failing = lambda: Turned(image=lambda image: image.nothing)
leaving = lambda: Turned(image=lambda image: exit(3))
empty = lambda: Turned(image=lambda x: x[:0], mask=lambda x: x[:0])
filling = lambda: Turned(mask=lambda mask: mask + 1)
unseeded = lambda: lambda **given: given
"""
ALL = {'rotation': 20, 'quarter_turns': True, 'vertical_flip_probability': 0.5}
ALL |= {'blur_probability': 0.5, 'erase_probability': 0.5}


@pytest.fixture(scope='module')
def own(tmp_path_factory):
  path = tmp_path_factory.mktemp('own') / 'augment.py'
  path.write_text(OWN)
  return path


def test_batches_depend_on_seed_step_and_place_alone(own):
  keys = {**ALL, 'transform': f'{own}:make'}
  expected = train_batches(config=data_config(**keys))
  for changes in {'num_threads': 5}, {'num_workers': 2, 'num_threads': 1}:
    config = data_config(**keys | changes)
    assert_equal(train_batches(config=config), expected)
  late = train_batches(config=config, start_step=7)
  assert_equal(late, expected[7:])
  host = {'process_index': 1, 'process_count': 2}
  batches = train_batches(config=config, **host)
  assert_equal(batches, readers.of_host(expected, 1))
  other = train_batches(config=config, seed=readers.SEED + 1)
  assert not np.array_equal(other[0]['label'], expected[0]['label'])


def test_a_key_changes_what_it_names_and_nothing_else():
  more = [{}, {'erase_probability': 0.5}]
  more.append(more[1] | {'blur_probability': 1})
  runs = [train_batches(config=data_config(**x), total_steps=6) for x in more]
  for plain, erased, blurred in zip(*runs, strict=True):
    for key in 'size', 'photometric':
      assert_equal(erased[key], plain[key])
    kept = erased['label'] == plain['label']
    assert (erased['label'][~kept] == 255).all()
    seen = kept & (plain['label'] < 255)
    assert_equal(erased['image'][seen], plain['image'][seen])
    assert_equal(blurred['label'], erased['label'])
    assert not np.array_equal(blurred['image'], erased['image'])


def transformed(spec, label):
  more = MoreAugmentation(data_config(transform=spec), classes=10)
  sample = {'image': np.zeros((4, 6, 3), np.uint8), 'label': label, 'name': 'a'}
  return more(sample, np.random.default_rng(1), lambda *both: both)


def of_positions(number, **keys):
  """What the pictures of a run become: a column of 0, 1, 2 on its left."""
  more = MoreAugmentation(data_config(**keys))
  image = np.zeros((3, 3, 3), np.uint8)
  image[:, 0] = np.arange(1, 4)[:, None]
  sample = {'image': image, 'label': image[..., 0], 'name': ''}
  key = sample_key(1)
  for position in range(number):
    rng = sample_rng(key, position, stream=2)
    found = more(sample, rng, lambda *both: both)
    assert_equal(found[0][..., 0], found[1])
    yield found[1]


def test_turns_are_equally_likely_and_flips_as_often_as_asked():
  found = [x.tobytes() for x in of_positions(2000, quarter_turns=True)]
  kinds, counts = np.unique(found, return_counts=True)
  assert len(kinds) == 4
  assert stats.chisquare(counts).pvalue > 1e-3
  flips = of_positions(2000, vertical_flip_probability=0.3)
  number = sum(int(x[0, 0] == 3) for x in flips)
  assert stats.binomtest(number, 2000, 0.3).pvalue > 1e-3


def rotated_twin(label, angle):
  """Each pixel from the nearest one, where the angle leaves no doubt; or -1."""
  cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
  last = np.reshape(label.shape, (2, 1, 1)) - 1
  y, x = np.indices(label.shape) - last / 2
  places = np.stack([sin * x + cos * y, cos * x - sin * y]) + last / 2
  near = np.round(places).astype(int)
  sure = (np.abs(np.abs(places - near) - 0.5) > 0.05).all(0)
  found = label[tuple(np.clip(near, 0, last))].astype(int)
  found[((near < 0) | (near > last)).any(0)] = 255
  return np.where(sure, found, -1)


@pytest.mark.parametrize('angle', [-137.0, -8.5, 12.0, 45.0])
def test_rotation_moves_picture_and_mask_together(angle):
  label = blocks(np.random.default_rng(0), 60, 91, 4, 9, ignored=0)
  mask = move(label, 0, False, angle, NEAREST, 255)
  expected = rotated_twin(label, angle)
  assert_equal(mask[expected >= 0], expected[expected >= 0])
  assert (expected < 0).mean() < 0.25
  image = move(np.dstack([label * 9] * 5), 0, False, angle, LINEAR, 0)
  # Where neither another class nor the edge is near.
  same = ndimage.maximum_filter(mask, 5) == ndimage.minimum_filter(mask, 5)
  same[[0, 1, -2, -1]] = same[:, [0, 1, -2, -1]] = False
  expected = np.where(mask == 255, 0, mask * 9)[..., None].repeat(5, 2)
  assert_equal(image[same], expected[same])


def test_turns_and_mirrors_by_hand():
  array = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
  turned = move(array, 1, False, 0.0, NEAREST, 255)
  assert turned.tolist() == [[3, 6], [2, 5], [1, 4]]
  both = move(array, 1, True, 0.0, NEAREST, 255)
  assert both.tolist() == [[1, 4], [2, 5], [3, 6]]
  half = move(array, 0, False, 180.0, NEAREST, 255)
  assert half.tolist() == [[6, 5, 4], [3, 2, 1]]


def sample_of(image, size):
  label = np.zeros(image.shape[:2], np.uint8)
  return {'image': image, 'label': label, 'size': np.array(size)}


def test_blur_is_gaussian_and_leaves_the_padding():
  image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
  blur(sample := sample_of(image, (30, 45)), 1.5)
  seen = image[:30, :45].astype(float)
  expected = ndimage.gaussian_filter(seen, (1.5, 1.5, 0), mode='mirror')
  assert np.abs(sample['image'][:30, :45] - expected).max() < 2
  sample['image'][:30, :45] = image[:30, :45]
  assert_equal(sample['image'], image)


def test_erased_rectangles():
  rng, shares, ratios = np.random.default_rng(0), [], []
  image = rng.integers(0, 256, (120, 100, 3), np.uint8)
  mean = image[:100, :100].mean((0, 1)).astype(np.uint8)
  for place in rng.random((300, 4)):
    erase(sample := sample_of(image, (100, 100)), *place)
    rows, columns = np.nonzero(sample['label'] == 255)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert rows.size == height * width
    assert rows.max() < 100  # Not in the padding.
    assert_equal(np.unique(sample['image'][rows, columns], axis=0), [mean])
    shares.append(rows.size / 1e4)
    ratios.append(height / width)
  assert stats.kstest(shares, 'uniform', (0.02, 0.31)).pvalue > 1e-3
  assert 0.25 < min(ratios) < 0.4
  assert abs(np.median(ratios) - 1) < 0.15


BANDED = [(1, 'uint8'), (4, 'uint16'), (16, 'float32')]


@pytest.mark.parametrize(('number', 'dtype'), BANDED)
def test_all_bands_change_alike(own, number, dtype):
  keys = {**ALL, 'blur_probability': 1, 'erase_probability': 1}
  more = MoreAugmentation(data_config(**keys, transform=f'{own}:make'))
  label = np.add.outer(*map(np.arange, (40, 60))).astype(np.uint8)

  def augmented(number, dtype):
    image = np.dstack([label] * number).astype(dtype)
    sample = {'image': image, 'label': label, 'name': ''}
    return more(sample, np.random.default_rng(2), lambda image, label: {
      'image': image, 'label': label, 'size': np.array(label.shape)
    })  # fmt: skip

  found, expected = augmented(number, dtype), augmented(3, 'uint8')
  assert_equal(found['label'], expected['label'])
  assert found['image'].shape == (*found['label'].shape, number)
  assert found['image'].dtype == dtype
  difference = found['image'] - expected['image'][..., :1].astype(float)
  assert np.abs(difference).max() < 3


NO_TRANSFORM = {
  'nothing.py:make': 'FileNotFoundError',
  '{own}:other': r'augment\.py has no function other',
  '{own}:unseeded': 'no attribute .set_random_seed',
}
UNUSABLE = {
  'floats': r"transform=.*, sample 'a': .*image is float32 .*to be uint8",
  'cropped': 'the image is .* pixels but its label is ...\nIt has',
  'leaving': "sample 'a': SystemExit: 3",
  'empty': r"sample 'a': ValueError: gives \(0, ., 3\) with classes {}",
  'filling': r"sample 'a': ValueError: gives .* with classes \{10\}",
  'failing': "sample 'a': AttributeError: .*nothing",
}


@pytest.mark.parametrize('spec', NO_TRANSFORM)
def test_what_is_no_transform_is_told_before_the_first_step(spec, own):
  config = data_config(transform=spec.format(own=own))
  told = f'config.data.transform=.*{NO_TRANSFORM[spec]}.*\n.*FILE.py:FUNCTION'
  refused(told, MoreAugmentation, config)


def test_results_that_cannot_be_used(own):
  for name, told in UNUSABLE.items():
    refused(told, transformed, f'{own}:{name}', np.full((4, 6), 9, np.uint8))
  # A classifier's pictures have no mask.
  assert transformed(f'{own}:make', 7)[1] == 7
  config = data_config(transform=f'{own}:floats')
  refused("'scene_.*float32", train_batches, Scenes(4), config)


def test_albumentations(tmp_path, monkeypatch):
  """The real one: its own draws, by position."""
  monkeypatch.setenv('NO_ALBUMENTATIONS_UPDATE', '1')  # It would ask PyPI.
  (tmp_path / 'augment.py').write_text(
    'import albumentations as A\n'
    'def make():\n'
    '  return A.Compose([A.RandomRotate90(p=0.7), A.GaussNoise(p=0.5),\n'
    '    A.Rotate(30, fill_mask=255, p=0.5), A.RandomScale(0.3, p=0.5)])\n'
  )
  config = {'transform': f'{tmp_path}/augment.py:make', 'num_threads': 4}
  expected = train_batches(config=data_config(**config))
  alone = data_config(**config | {'num_threads': 1})
  assert_equal(train_batches(config=alone, start_step=5), expected[5:])
  assert not np.array_equal(expected[0]['image'], train_batches()[0]['image'])
