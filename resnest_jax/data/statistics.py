"""Counts pixels and images of each class."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.labels import IGNORE
from resnest_jax.threads import map_in_threads


def count_pixels(
  split: Any,
  indices: Sequence[int] | None = None,
  *,
  num_threads: int = 0,
  skip_unreadable: bool = False,
  on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
  """Counts the pixels of each class in N samples: int64 (N, C + 1).

  Ignored pixels come last. With `skip_unreadable` unreadable labels count 0
  instead of raising.
  """
  indices = range(len(split)) if indices is None else indices
  num_classes = len(split.labels.classes)
  counts = np.zeros((len(indices), num_classes + 1), np.int64)

  def count(index: int) -> np.ndarray:
    try:
      label = split.label(index)
      if isinstance(label, int):  # Of the whole image, which counts as a pixel.
        return np.eye(1, num_classes + 1, label, np.int64)[0]
      return count_label(label, num_classes)
    except UnreadableSample:
      if not skip_unreadable:
        raise
      # A sample without any class: `class_balanced` never visits it.
      return np.zeros(num_classes + 1, np.int64)

  for i, row in enumerate(map_in_threads(count, indices, num_threads)):
    counts[i] = row
    on_progress(i + 1, len(indices))
  return counts


def class_weights(counts: np.ndarray, weighing: str) -> np.ndarray:
  """Weights that make rare classes count more, float (C,).

  `counts` are those of `count_pixels`; a class without pixels gets 0.
  inverse_sqrt: 1 / sqrt(share of all labelled pixels), with a mean of 1 over
  these. median_frequency: median / frequency, the share of the labelled pixels
  of images with the class (Eigen and Fergus, ICCV 2015).
  """
  counts = counts[:, :-1]
  found = counts.any(0)
  if not found.any():
    raise UserError('no sample has a labelled pixel; look at the labels.')
  pixels = counts.sum(0)[found]
  if weighing == 'inverse_sqrt':
    roots = np.sqrt(pixels / pixels.sum())
    weights = 1 / roots / roots.sum()
  else:
    frequency = pixels / (counts.sum(1) @ (counts[:, found] > 0))
    weights = np.median(frequency) / frequency
  return np.bincount(np.flatnonzero(found), weights, len(found))


def count_label(label: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts a uint8 label of train ids and 255: int64 (C + 1,), 255 last."""
  # All 256 values, so that one pass counts classes and ignored pixels.
  counts = np.bincount(label.ravel(), minlength=256)
  return np.append(counts[:num_classes], counts[IGNORE])
