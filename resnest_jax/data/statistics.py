"""Counts pixels and images of each class."""

from typing import Any

import numpy as np

from resnest_jax.errors import UnreadableSample
from resnest_jax.labels import IGNORE
from resnest_jax.progress import progress_bar
from resnest_jax.threads import map_in_threads


def count_pixels(
  split: Any, *, num_threads: int = 0, skip_unreadable: bool = False
) -> np.ndarray:
  """Counts the pixels of each class in N samples: int64 (N, C + 1).

  Ignored pixels come last. With `skip_unreadable` unreadable labels count 0
  instead of raising.
  """
  classes = len(split.labels.classes)

  def count(index: int) -> np.ndarray:
    try:
      label = split.label(index)
    except UnreadableSample:
      if not skip_unreadable:
        raise
      # A sample without any class: `class_balanced` never visits it.
      return np.zeros(classes + 1, np.int64)
    if isinstance(label, int):  # Of the whole image, which counts as a pixel.
      return np.eye(1, classes + 1, label, np.int64)[0]
    # All 256 values, so that one pass counts classes and ignored pixels.
    values = np.bincount(label.ravel(), minlength=256)
    return np.append(values[:classes], values[IGNORE])

  counts = np.zeros((len(split), classes + 1), np.int64)
  rows = map_in_threads(count, range(len(split)), num_threads)
  with progress_bar('counting classes') as report:
    for i, row in enumerate(rows):
      counts[i] = row
      report(i + 1, len(split))
  return counts


def class_weights(counts: np.ndarray, weighing: str) -> np.ndarray:
  """Weights that make rare classes count more, float (C,).

  `counts` (N, C) are pixels, some above 0; a class without any gets 0.
  inverse_sqrt: 1 / sqrt(share of all labelled pixels), with a mean of 1 over
  these. median_frequency: median / frequency, the share of the labelled pixels
  of images with the class (Eigen and Fergus, ICCV 2015).
  """
  found = counts.any(0)
  pixels = counts.sum(0)[found]
  if weighing == 'inverse_sqrt':
    roots = np.sqrt(pixels / pixels.sum())
    weights = 1 / roots / roots.sum()
  else:
    frequency = pixels / (counts.sum(1) @ (counts[:, found] > 0))
    weights = np.median(frequency) / frequency
  return np.bincount(np.flatnonzero(found), weights, len(found))
