"""How many pixels and images of a split have each class."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from resnest_jax.errors import UnreadableSample
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
  """Counts the pixels of each class in each sample.

  Args:
    split: of `datasets.open_data`.
    indices: of N samples; None: all of them.
    num_threads: that read, see `thread_count`.
    skip_unreadable: whether a label that cannot be read has no pixels, or is
      an error.
    on_progress: called with (samples done, N).

  Returns:
    int64 (N, C + 1), the samples in the order of `indices`; the last column
    has the ignored pixels.

  Raises:
    UserError: a sample that cannot be read.
  """
  indices = range(len(split)) if indices is None else indices
  num_classes = len(split.labels.classes)
  counts = np.zeros((len(indices), num_classes + 1), np.int64)

  def count(index: int) -> np.ndarray:
    try:
      return count_label(split.label(index), num_classes)
    except UnreadableSample:
      if not skip_unreadable:
        raise
      return np.zeros(num_classes + 1, np.int64)

  for i, row in enumerate(map_in_threads(count, indices, num_threads)):
    counts[i] = row
    on_progress(i + 1, len(indices))
  return counts


def count_classes(
  split: Any,
  indices: Sequence[int] | None = None,
  *,
  num_threads: int = 0,
  on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
  """Counts over samples; the arguments are those of `count_pixels`.

  Returns:
    Two int64 (C + 1,): pixels of each class, and images in which it has any.
    The last entry is that of ignored pixels.
  """
  counts = count_pixels(
    split, indices, num_threads=num_threads, on_progress=on_progress
  )
  return counts.sum(0), (counts > 0).sum(0)


def count_label(label: np.ndarray, num_classes: int) -> np.ndarray:
  """Pixels of each class in a label map.

  Args:
    label: uint8, train ids below `num_classes`, and 255.
    num_classes: C.

  Returns:
    int64 (C + 1,), the last entry that of 255.
  """
  counts = np.bincount(label.ravel(), minlength=256)
  return np.append(counts[:num_classes], counts[IGNORE])
