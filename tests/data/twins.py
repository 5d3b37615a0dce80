"""What augmentation is held against: random labels and a naive crop rule."""

import numpy as np


def blocks(rng, height, width, num_classes, cell, ignored=0.05):
  """A label of square cells with random classes and some ignored pixels."""
  cells = rng.integers(
    0, num_classes, (-(-height // cell), -(-width // cell)), dtype=np.uint8
  )
  label = cells.repeat(cell, 0).repeat(cell, 1)[:height, :width].copy()
  label[rng.random((height, width)) < ignored] = 255
  return label


def origin_twin(label, offsets, crop_size, cat_max_ratio):
  """The crop rule with loops and np.unique."""

  def origin(u):
    room = np.maximum(np.subtract(label.shape, crop_size), 0) + 1
    return tuple(np.floor(u * room).astype(int).tolist())

  tries = iter(offsets)
  top, left = origin(next(tries))
  refused = 0
  for _ in range(10):
    crop = label[top : top + crop_size[0], left : left + crop_size[1]]
    classes, counts = np.unique(crop[crop != 255], return_counts=True)
    if len(classes) > 1 and max(counts) / sum(counts) < cat_max_ratio:
      break
    refused += 1
    top, left = origin(next(tries))
  return (top, left), refused
