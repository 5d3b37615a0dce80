"""The generated archives: layout, formats, and pictures worth learning from."""

import zipfile

import numpy as np
import pytest
from data.small_archives import ADE20K, decode

from resnest_jax.data.mini import ade20k_mini, city
from resnest_jax.data.mini.canvas import ID, OTHER
from resnest_jax.labels import CITYSCAPES


@pytest.fixture(scope='module')
def scenes():
  """Of training and validation: JPEG, PNG, mask and kind, default seed."""
  make = ade20k_mini._make_sample
  return [[make((0, split, i)) for i in range(60)] for split in (0, 1)]


# ---- Layout and formats ----------------------------------------------------


def test_lists(mini_archive):
  archive = zipfile.ZipFile(mini_archive)
  info = archive.read(f'{ADE20K}/objectInfo150.txt').decode().splitlines()
  scenes = archive.read(f'{ADE20K}/sceneCategories.txt').decode().splitlines()
  names = [name for name in archive.namelist() if name.endswith('.png')]
  pixels = [decode(archive.read(name)).ravel() for name in names]
  assert len(info) == 151
  index, ratio, train, validation, name = info[3].split('\t')
  assert (index, name) == ('3', 'sky')
  assert int(train) + int(validation) == sum((x == 3).any() for x in pixels)
  pixels = np.concatenate(pixels)
  share = (pixels[pixels > 0] == 3).mean()
  assert float(ratio) == pytest.approx(share, abs=1e-4)
  assert scenes[24].startswith('ADE_val_00000001 ')


def test_values_are_known_and_some_images_grey(scenes):
  for _, _, mask, _ in scenes[0]:
    assert set(np.unique(mask)) <= {OTHER, *ID.values()}
  channels = [decode(jpeg).ndim for jpeg, *_ in scenes[0] + scenes[1]]
  assert 1 <= channels.count(2) <= 12


def test_sizes_are_many(scenes):
  sizes = np.array([mask.shape for _, _, mask, _ in scenes[0]])
  aspects = sizes[:, 1] / sizes[:, 0]
  assert aspects.min() < 0.7
  assert aspects.max() > 1.6
  assert len(np.unique(sizes, axis=0)) > 30


# ---- Pictures --------------------------------------------------------------


def assert_frequent(drawn, values, share, number):
  """Of the pixels and of the pictures; returns all pixels."""
  pixels = np.concatenate([mask.ravel() for mask in drawn])
  for value in values:
    assert (pixels == value).mean() > share, value
    assert sum((mask == value).any() for mask in drawn) >= number, value
  return pixels


def test_every_class_of_scenes_is_frequent_in_both_splits(scenes):
  for samples in scenes:
    assert_frequent([mask for _, _, mask, _ in samples], ID.values(), 0.005, 8)


def test_every_class_of_streets_is_frequent_in_both_splits():
  values = [i for i in city.LABEL_IDS.values() if i > 3]
  assert len(values) == 10
  unlabelled = np.flatnonzero(CITYSCAPES.to_train_id == 255)
  for split in (0, 1):
    drawn = [city.draw_scene((0, split, i), 128, 256)[1] for i in range(30)]
    pixels = assert_frequent(drawn, values, 0.01, 15)
    assert 0.02 < np.isin(pixels, unlabelled).mean() < 0.15
