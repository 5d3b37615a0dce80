"""The tables of classes against values copied by hand from the data sets."""

import numpy as np
import pytest

from resnest_jax.labels import ADE20K, CITYSCAPES

# The class of each of Cityscapes' label ids, from cityscapesScripts.
TRAIN_IDS = [
  *[255] * 7,
  *(0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7),
  *(8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18),
]


CLASSES = [
  (ADE20K, 0, 'wall', (120, 120, 120)),
  (ADE20K, 75, 'swivel chair', (10, 0, 255)),
  (ADE20K, 149, 'flag', (92, 0, 255)),
  (CITYSCAPES, 0, 'road', (128, 64, 128)),
  (CITYSCAPES, 13, 'car', (0, 0, 142)),
  (CITYSCAPES, 18, 'bicycle', (119, 11, 32)),
]


@pytest.mark.parametrize(('labels', 'train_id', 'name', 'colour'), CLASSES)
def test_name_and_colour(labels, train_id, name, colour):
  assert labels.classes[train_id] == name
  assert tuple(labels.palette[train_id]) == colour


@pytest.mark.parametrize(('labels', 'count'), [(ADE20K, 150), (CITYSCAPES, 19)])
def test_tables_are_whole_and_cannot_be_changed(labels, count):
  names = labels.classes
  assert len(names) == len(set(names)) == count
  assert labels.palette.shape == (count, 3)
  assert labels.palette.dtype == labels.to_train_id.dtype == np.uint8
  with pytest.raises(ValueError, match='read-only'):
    labels.to_train_id[0] = 0


def test_train_ids():
  assert ADE20K.to_train_id.tolist() == [255, *range(150), *[255] * 105]
  assert CITYSCAPES.to_train_id.tolist() == TRAIN_IDS + [255] * 222
