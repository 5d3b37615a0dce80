"""A bootstrap interval of mIoU: how far it would move on other images.

The percentile interval of Efron and Tibshirani, An Introduction to the
Bootstrap, 1993. It says nothing about another seed of the training.
"""

import dataclasses

import numpy as np

# Images drawn at a time. Each takes 8 bytes in a few arrays, so that memory
# stays at tens of megabytes for any number of resamples.
MOST_DRAWS = 2**20


@dataclasses.dataclass(frozen=True)
class Interval:
  """An interval of mIoU, in fractions; NaN if no pixel was counted."""

  low: float
  high: float
  level: float  # Share of the resamples inside the interval.
  resamples: int
  seed: int


def miou_interval(
  counts: np.ndarray,
  *,
  level: float = 0.95,
  resamples: int = 1000,
  seed: int = 0,
) -> Interval:
  """The percentile interval of mIoU over resampled images.

  Args:
    counts: int (images, 2, C): intersection and union of each image, see
      `metrics.intersection_and_union`.
    level: between 0 and 1, both excluded.
    resamples: at least 1.
    seed: the same counts and seed give the same interval.
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
  # BLAS multiplies floats only. They are exact in float64 as long as a class
  # has fewer than 2^53 pixels.
  flat = counts.reshape(images, 2 * num_classes).astype(np.float64)
  rng = np.random.default_rng(seed)
  chunk = max(MOST_DRAWS // max(images, 1), 1)
  values = []
  for start in range(0, resamples if images else 0, chunk):
    number = min(chunk, resamples - start)
    # Whole images are drawn, because the pixels of one image are correlated.
    drawn = rng.integers(images, size=(number, images))
    # Each resample gets a range of its own, so that one bincount tells how
    # often each of them drew each image: (number, images).
    drawn += images * np.arange(number)[:, None]
    times = np.bincount(drawn.ravel(), minlength=number * images)
    sums = times.reshape(number, images) @ flat
    intersection, union = sums.reshape(number, 2, num_classes).swapaxes(0, 1)
    # A class that no drawn image has is left out of that resample's mean, as in
    # `metrics.scores`.
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
