"""The generated archives: layout, formats, and pictures worth learning from."""

import zipfile

import cv2
import numpy as np
import pytest
from data.small_archives import ADE20K, decode

from resnest_jax.data.mini import ade20k_mini, city, cityscapes_mini
from resnest_jax.data.mini.canvas import ID, OTHER
from resnest_jax.labels import CITYSCAPES

STREET_IDS = [i for i in city.LABEL_IDS.values() if i > 3]
UNLABELLED = np.flatnonzero(CITYSCAPES.to_train_id == 255)


@pytest.fixture(scope='module')
def scenes():
  """Of training and validation: JPEG, PNG, mask and kind, default seed."""
  counts = 60, ade20k_mini.DEFAULT_COUNTS['validation']
  return [
    [ade20k_mini._make_sample((0, split, i)) for i in range(count)]
    for split, count in enumerate(counts)
  ]


@pytest.fixture(scope='module')
def drawn(scenes):
  """Pictures and masks of both splits, of scenes and of streets."""
  make = cityscapes_mini._make_sample
  return {
    'scenes': [
      [(decode(jpeg, cv2.IMREAD_COLOR), mask) for jpeg, _, mask, _ in samples]
      for samples in scenes
    ],
    'streets': [
      [make((0, split, i), (256, 128)) for i in range(30)] for split in (0, 1)
    ],
  }


# ---- Layout and formats ----------------------------------------------------


def test_lists(mini_archive):
  with zipfile.ZipFile(mini_archive) as archive:
    info, scenes = (
      archive.read(f'{ADE20K}/{name}.txt').decode().splitlines()
      for name in ('objectInfo150', 'sceneCategories')
    )
    names = [name for name in archive.namelist() if name.endswith('.png')]
    masks = [decode(archive.read(name)) for name in names]
  assert len(info) == 151
  index, ratio, train, validation, name = info[3].split('\t')
  assert (index, name) == ('3', 'sky')
  assert int(train) + int(validation) == sum((m == 3).any() for m in masks)
  pixels = np.concatenate([m.ravel() for m in masks])
  share = (pixels == 3).sum() / (pixels > 0).sum()
  assert float(ratio) == pytest.approx(share, abs=1e-4)
  samples, kinds = zip(*map(str.split, scenes), strict=True)
  assert samples[23:25] == ('ADE_train_00000024', 'ADE_val_00000001')
  assert set(kinds) <= {'street', 'highway', 'lake', 'park', 'bedroom'}


def test_values_are_known_and_some_images_grey(scenes):
  for _, _, mask, _ in scenes[0]:
    assert set(np.unique(mask)) <= {OTHER, *ID.values()}
  channels = [decode(jpeg).ndim for jpeg, *_ in scenes[0] + scenes[1]]
  assert 1 <= channels.count(2) <= 12


def test_sizes_are_many(scenes):
  sizes = np.array([mask.shape for _, _, mask, _ in scenes[0]])
  assert sizes.min() >= 96
  assert sizes.max() <= 224
  aspects = sizes[:, 1] / sizes[:, 0]
  assert aspects.min() < 0.7
  assert aspects.max() > 1.6
  assert len(np.unique(sizes, axis=0)) > 30


# ---- Pictures --------------------------------------------------------------


@pytest.mark.parametrize(
  ('kind', 'values', 'share', 'number'),
  [('scenes', [*ID.values()], 0.005, 8), ('streets', STREET_IDS, 0.01, 15)],
)
def test_every_class_is_frequent_in_both_splits(
  drawn, kind, values, share, number
):
  assert len(STREET_IDS) == 10
  for samples in drawn[kind]:
    masks = [mask for _, mask in samples]
    pixels = np.concatenate([mask.ravel() for mask in masks])
    for value in values:
      assert (pixels == value).mean() > share, value
      assert sum((mask == value).any() for mask in masks) >= number, value
    if kind == 'streets':
      assert 0.02 < np.isin(pixels, UNLABELLED).mean() < 0.15
