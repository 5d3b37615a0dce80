"""The bootstrap interval: against a naive loop, theory and its own bounds."""

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


def test_has_the_width_of_the_normal_approximation():
  # One class, unions of 1000: the mean of 400 independent shares.
  right = np.random.default_rng(0).normal(700, 100, 400).astype(int)
  counts = np.stack([right, np.full(400, 1000)], axis=1)[..., None]
  interval = bootstrap.miou_interval(counts, resamples=4000)
  error = right.std() / 1000 / np.sqrt(400)
  assert interval.high - interval.low == pytest.approx(3.92 * error, rel=0.08)
  assert interval.low < right.mean() / 1000 < interval.high


def test_intersection_and_union_give_iou():
  confusions = np.random.default_rng(0).integers(0, 50, (3, 4, 4))
  counts = metrics.intersection_and_union(confusions)
  assert counts.shape == (3, 2, 4)
  iou = metrics.scores(confusions.sum(0)).IoU
  np.testing.assert_array_equal(metrics.ratio(*counts.sum(0)), iou)
  one = metrics.intersection_and_union(np.array([[3, 1], [0, 5]]))
  assert one.tolist() == [[3, 5], [4, 6]]


@pytest.mark.parametrize(
  ('counts', 'bound'),
  [
    (np.tile([[[30, 0], [40, 0]]], (6, 1, 1)), 0.75),
    (np.zeros((0, 2, 4), int), np.nan),
    (np.zeros((3, 2, 4), int), np.nan),
  ],
  ids=['equal images', 'no image', 'no pixel'],
)
def test_nothing_that_differs_leaves_no_doubt(counts, bound):
  interval = bootstrap.miou_interval(counts, resamples=20)
  np.testing.assert_array_equal([interval.low, interval.high], bound)


def test_what_cannot_be():
  counts = random_counts(3, 2)
  with pytest.raises(ValueError, match=r'got \(3, 2\)'):
    bootstrap.miou_interval(counts[:, 0])
  with pytest.raises(ValueError, match='level is between 0 and 1'):
    bootstrap.miou_interval(counts, level=1)
  with pytest.raises(ValueError, match='at least 1'):
    bootstrap.miou_interval(counts, resamples=0)
