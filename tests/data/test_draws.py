"""The distributions of what is drawn for the first 10000 samples of a run."""

import numpy as np
import pytest
from numpy.testing import assert_equal
from scipy import stats

from resnest_jax.data import pipeline, transforms


def draws(count, **options):
  """Those of the first positions of a run."""
  key = pipeline.sample_key(1)
  return [
    transforms.draw_augmentation(pipeline.sample_rng(key, i), **options)
    for i in range(count)
  ]


def uniform_p(values, low, high):
  return stats.kstest(values, 'uniform', args=(low, high - low)).pvalue


def binomial_p(count, total, probability):
  return stats.binomtest(count, total, probability).pvalue


@pytest.fixture(scope='module')
def ten_thousand():
  return draws(10_000)


def test_distribution_of_ratio_flip_and_offsets(ten_thousand):
  assert uniform_p([d.ratio for d in ten_thousand], 0.5, 2.0) > 1e-3
  flips = sum(d.flip for d in ten_thousand)
  assert binomial_p(flips, 10_000, 0.5) > 1e-3
  offsets = np.array([d.crop_offsets for d in ten_thousand])
  for attempt in (0, 4, 10):
    for axis in (0, 1):
      assert uniform_p(offsets[:, attempt, axis], 0.0, 1.0) > 1e-3


def test_draws_of_neighbours_are_independent(ten_thousand):
  """Within a sample, and from each position to the next."""
  numbers = np.array(
    [[d.ratio, *d.crop_offsets.ravel(), d.flip] for d in ten_thousand]
  )
  following = np.concatenate([numbers[:-1], numbers[1:]], axis=1)
  correlation = np.corrcoef(following, rowvar=False)
  off_diagonal = np.abs(correlation[np.triu_indices(48, 1)])
  # Of 1128 correlations, each normal with a deviation of 0.01.
  assert off_diagonal.max() < 0.05


def test_distribution_of_photometric_draws(ten_thousand):
  drawn = [d.photometric for d in ten_thousand]
  share = {'contrast_first': 0.25, 'contrast_last': 0.25}
  low_high = {'brightness': (-32, 32), 'hue': (-18, 18)}
  for name in transforms.PhotometricDraw.__dataclass_fields__:
    values = [v for d in drawn if (v := getattr(d, name)) is not None]
    assert binomial_p(len(values), 10_000, share.get(name, 0.5)) > 1e-3
    if name == 'hue':
      counts = np.bincount(np.array(values) + 18, minlength=36)
      assert len(counts) == 36  # -18 to 17.
      assert stats.chisquare(counts).pvalue > 1e-3
    else:
      assert uniform_p(values, *low_high.get(name, (0.5, 1.5))) > 1e-3
  assert not any(
    d.contrast_first is not None and d.contrast_last is not None for d in drawn
  )
  # Brightness and saturation are drawn independently of each other.
  pairs = [None not in (d.brightness, d.saturation) for d in drawn]
  assert binomial_p(sum(pairs), 10_000, 0.25) > 1e-3


def test_an_option_leaves_the_other_draws_as_they_were():
  plain = draws(20)
  options = {'scale_range': (1.0, 1.0), 'flip_probability': 0.0}
  for a, b in zip(plain, draws(20, photometric=False, **options), strict=True):
    assert_equal(a.crop_offsets, b.crop_offsets)
    assert b.ratio == 1.0
    assert not b.flip
    assert b.photometric == transforms.PhotometricDraw()
  assert any(a.flip for a in plain)
