"""How much mIoU would move with other images: a bootstrap over images.

A test set is one draw of images out of many possible. As many images as it has
are drawn from it with replacement, again and again, and mIoU is computed each
time; the middle 95 % of these values are the interval. It says nothing about
another training with another seed.

Images are drawn whole, because the pixels of one belong together. All that is
needed of an image are two numbers a class, intersection and union.

Efron and Tibshirani, An Introduction to the Bootstrap, 1993 (percentiles).
"""

import dataclasses

import numpy as np

MOST_DRAWS = 2**20  # At a time, to bound memory: 8 bytes each, a few times.


@dataclasses.dataclass(frozen=True)
class Interval:
  """Where mIoU lies, fractions; NaN if nothing was counted."""

  low: float
  high: float
  level: float  # The share of the resamples inside.
  resamples: int
  seed: int


def miou_interval(
  counts: np.ndarray,
  *,
  level: float = 0.95,
  resamples: int = 1000,
  seed: int = 0,
) -> Interval:
  """The percentile interval of mIoU.

  Args:
    counts: int (images, 2, C), of each image the pixels in both and in either
      of ground truth and prediction (`metrics.intersection_and_union`).
    level: 0 to 1 (excluded).
    resamples: how often images are drawn, at least 1.
    seed: of the draws; the same counts and seed give the same interval.

  Returns:
    `Interval`. A class that is in no drawn image takes no part in that mean,
    as everywhere.
  """
  counts = np.asarray(counts)
  if counts.ndim != 3 or counts.shape[1] != 2:
    raise ValueError(f'counts are (images, 2, classes), got {counts.shape}')
  if not 0 < level < 1 or resamples < 1:
    raise ValueError(
      f'level is between 0 and 1 and resamples at least 1, got {level} and '
      f'{resamples}'
    )
  images, _, num_classes = counts.shape
  # Exact in float64 as long as a class has fewer than 2^53 pixels.
  flat = counts.reshape(images, 2 * num_classes).astype(np.float64)
  rng = np.random.default_rng(seed)
  chunk = max(MOST_DRAWS // max(images, 1), 1)
  values = []
  for start in range(0, resamples if images else 0, chunk):
    number = min(chunk, resamples - start)
    drawn = rng.integers(images, size=(number, images))
    drawn += images * np.arange(number)[:, None]
    times = np.bincount(drawn.ravel(), minlength=number * images)
    sums = times.reshape(number, images) @ flat
    intersection, union = sums.reshape(number, 2, num_classes).swapaxes(0, 1)
    known = union > 0
    iou = np.divide(intersection, union, where=known, out=np.zeros_like(union))
    means = iou.sum(1)[known.any(1)] / known.sum(1)[known.any(1)]
    values.append(means)
  values = np.concatenate(values) if values else np.zeros(0)
  low, high = float('nan'), float('nan')
  if values.size:
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail]).tolist()
  return Interval(low, high, level, resamples, seed)
