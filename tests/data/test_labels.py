"""The tables of classes against values copied by hand from the data sets."""

import numpy as np
import pytest

from resnest_jax.labels import ADE20K, CITYSCAPES


@pytest.mark.parametrize(
  ('labels', 'train_id', 'name', 'colour'),
  [
    (ADE20K, 0, 'wall', (120, 120, 120)),
    (ADE20K, 2, 'sky', (6, 230, 230)),
    (ADE20K, 7, 'bed', (204, 5, 255)),
    (ADE20K, 12, 'person', (150, 5, 61)),
    (ADE20K, 75, 'swivel chair', (10, 0, 255)),
    (ADE20K, 149, 'flag', (92, 0, 255)),
    (CITYSCAPES, 0, 'road', (128, 64, 128)),
    (CITYSCAPES, 13, 'car', (0, 0, 142)),
    (CITYSCAPES, 18, 'bicycle', (119, 11, 32)),
  ],
)
def test_name_and_colour(labels, train_id, name, colour):
  assert labels.classes[train_id] == name
  assert tuple(labels.palette[train_id]) == colour


@pytest.mark.parametrize(('labels', 'count'), [(ADE20K, 150), (CITYSCAPES, 19)])
def test_tables_are_whole_and_cannot_be_changed(labels, count):
  names = labels.classes
  assert len(names) == len(set(names)) == count
  assert all(name == ' '.join(name.split()) for name in names)
  assert labels.palette.shape == (count, 3)
  assert labels.palette.dtype == labels.to_train_id.dtype == np.uint8
  assert labels.to_train_id.shape == (256,)
  assert (labels.to_train_id != 255).sum() == count
  with pytest.raises(ValueError, match='read-only'):
    labels.to_train_id[0] = 0


def test_ade20k_train_ids():
  mask = np.array([[0, 1, 2], [150, 151, 255]])
  expected = [[255, 0, 1], [149, 255, 255]]
  assert ADE20K.to_train_id[mask].tolist() == expected


def test_cityscapes_train_ids():
  # -1 (licence plate) is 255 in the 8-bit masks.
  mask = np.array([0, 6, 7, 8, 9, 11, 26, 29, 33, 255])
  expected = [255, 255, 0, 1, 255, 2, 13, 255, 18, 255]
  assert CITYSCAPES.to_train_id[mask].tolist() == expected
