"""A bootstrap interval of mIoU: how far it would move on other images.

The percentile interval of Efron and Tibshirani, An Introduction to the
Bootstrap, 1993. It says nothing about another seed of the training.
"""

from typing import Any

import numpy as np

MOST_DRAWS = 2**20  # Images at a time; memory stays at tens of megabytes.


def miou_interval(
  counts: np.ndarray,
  *,
  level: float = 0.95,
  resamples: int = 1000,
  seed: int = 0,
) -> dict[str, Any]:
  """The percentile interval of mIoU over resampled images, in fractions.

  `counts`, int (images, 2, C), are `intersection_and_union` of each image, and
  `level`, between 0 and 1, is the share of the resamples inside the interval.
  Its bounds are NaN if no pixel was counted. The same seed gives the same.
  """
  images, _, num_classes = counts.shape
  # BLAS multiplies floats only; float64 is exact below 2^53 pixels of a class.
  flat = counts.reshape(images, 2 * num_classes).astype(np.float64)
  rng = np.random.default_rng(seed)
  chunk = max(MOST_DRAWS // max(images, 1), 1)
  values = [np.zeros(0)]
  for start in range(0, resamples if images else 0, chunk):
    number = min(chunk, resamples - start)
    # Whole images are drawn, because the pixels of one image are correlated.
    drawn = rng.integers(images, size=(number, images))
    # A range for each resample: one bincount counts the images of all of them.
    drawn += images * np.arange(number)[:, None]
    times = np.bincount(drawn.ravel(), minlength=number * images)
    sums = times.reshape(number, images) @ flat
    intersection, union = sums.reshape(number, 2, num_classes).swapaxes(0, 1)
    # As in `metrics.scores`, a class that no drawn image has is left out.
    known = union > 0
    iou = np.divide(intersection, union, where=known, out=np.zeros_like(union))
    values.append(iou.sum(1)[known.any(1)] / known.sum(1)[known.any(1)])
  means = np.concatenate(values)
  low = high = float('nan')
  if means.size:
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail]).tolist()
  about = {'level': level, 'resamples': resamples, 'seed': seed}
  return {'low': low, 'high': high, **about}
