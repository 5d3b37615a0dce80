"""The bootstrap interval: against a naive loop and its own bounds."""

import numpy as np
import pytest

from resnest_jax.evaluation import bootstrap, metrics


def random_counts(images, classes):
  rng = np.random.default_rng(0)
  union = rng.integers(0, 900, (images, classes))
  union[rng.random(union.shape) < 0.6] = 0  # Most classes in few images.
  return np.stack([rng.binomial(union, 0.7), union], axis=1)


def test_equals_a_loop_over_resamples_and_images():
  counts = random_counts(9, 5)
  rng = np.random.default_rng(3)
  means = []
  for _ in range(50):
    total = sum(counts[image] for image in rng.integers(9, size=9))
    means.append(np.nanmean(metrics.ratio(*total)))
  interval = bootstrap.miou_interval(counts, resamples=50, seed=3, level=0.8)
  bounds = np.percentile(means, (10, 90))
  assert [interval.low, interval.high] == pytest.approx(bounds, rel=1e-12)
  assert (interval.level, interval.resamples, interval.seed) == (0.8, 50, 3)


def test_is_deterministic_and_does_not_depend_on_chunks(monkeypatch):
  counts = random_counts(40, 7)
  interval = bootstrap.miou_interval(counts)
  assert bootstrap.miou_interval(counts) == interval
  assert bootstrap.miou_interval(counts, seed=1) != interval
  monkeypatch.setattr(bootstrap, 'MOST_DRAWS', 40 * 7)
  assert bootstrap.miou_interval(counts) == interval


def test_intersection_and_union_give_iou():
  counts = metrics.intersection_and_union([[[3, 1], [0, 5]]])
  assert counts.tolist() == [[[3, 5], [4, 6]]]


def test_nothing_that_differs_leaves_no_doubt():
  for counts, bound in (
    (np.tile([[[30, 0], [40, 0]]], (6, 1, 1)), 0.75),
    (np.zeros((0, 2, 4), int), np.nan),
    (np.zeros((3, 2, 4), int), np.nan),
  ):
    interval = bootstrap.miou_interval(counts, resamples=20)
    np.testing.assert_array_equal([interval.low, interval.high], bound)


def test_what_cannot_be():
  counts = random_counts(3, 2)
  with pytest.raises(ValueError, match=r'got \(3, 2\)'):
    bootstrap.miou_interval(counts[:, 0])
  for wrong in ({'level': 1}, {'resamples': 0}):
    with pytest.raises(ValueError, match=r'between 0 and 1 .* at least 1'):
      bootstrap.miou_interval(counts, **wrong)
