"""Samplers: which sample a position reads."""

import grain
import numpy as np
import pytest
from data.refusals import refused, unreadable
from numpy.testing import assert_allclose, assert_equal
from scipy import stats
from small import MINI

from resnest_jax.config import load_config
from resnest_jax.data import resize, sampling, statistics
from resnest_jax.data.datasets import PreparedSplit
from resnest_jax.data.pipeline import make_train_iterator
from resnest_jax.data.sampling import ClassBalanced, make_sampler
from resnest_jax.errors import UnreadableSample

SEED = 11
# Class 0 is everywhere, class 1 in a quarter, class 2 in one sample; class 3
# never; the last sample has no label.
PRESENT = np.zeros((20, 4), bool)
PRESENT[:19, 0] = PRESENT[:5, 1] = PRESENT[7, 2] = True


def visited(sampler, number, start=0):
  return np.array([sampler(start + i) for i in range(number)])


def test_uniform_is_grains_shuffle():
  sampler = make_sampler('uniform', 13, SEED)
  theirs = grain.MapDataset.range(13).shuffle(seed=sampling._mix(SEED, 0))
  theirs = theirs.repeat()
  assert visited(sampler, 40).tolist() == [int(theirs[i]) for i in range(40)]


def test_repeat_factors_are_those_of_the_paper():
  factors = sampling.repeat_factors(PRESENT, threshold=0.5)
  # Shares 0.95, 0.25 and 0.05 of the samples.
  expected = (PRESENT / (1, 0.25, 0.05, 1)).max(1)
  assert_allclose(factors, np.sqrt(np.maximum(0.5 * expected, 1)))
  assert (sampling.repeat_factors(PRESENT, threshold=0.01) == 1).all()


def test_records_stand_as_often_as_their_factors_say():
  factors = np.array([1.0, 2.0, 2.25] + [1.5] * 2000)
  times = np.bincount(sampling.repeated_samples(factors, SEED))
  assert times[:2].tolist() == [1, 2]
  assert times[2] in (2, 3)
  assert set(times[3:]) == {1, 2}
  assert stats.binomtest(int((times[3:] == 2).sum()), 2000, 0.5).pvalue > 1e-3


def test_repeat_factor_epochs():
  options = {'present': PRESENT, 'threshold': 0.5}
  sampler = make_sampler('repeat_factor', 20, SEED, **options)
  factors = sampling.repeat_factors(PRESENT, 0.5)
  samples = sampling.repeated_samples(factors, sampling._mix(SEED, 0))
  epochs = visited(sampler, 3 * len(samples)).reshape(3, -1)
  assert_equal(np.sort(epochs), np.tile(samples, (3, 1)))
  assert not np.array_equal(epochs[0], epochs[1])


def test_classes_take_turns():
  sampler = make_sampler('class_balanced', 20, SEED, present=PRESENT)
  turns = visited(sampler, 3 * 19 * 5).reshape(-1, 3)
  assert PRESENT[turns].any(1)[:, :3].all()
  # In 95 turns each sample of class 0 stands for it five times, each of class 1
  # another 19 times, and the one of class 2 in all of them.
  counts = np.bincount(turns.ravel(), minlength=20)
  assert_equal(counts, PRESENT @ (5, 19, 95, 0))


def test_order_of_the_classes_is_drawn():
  present = np.eye(6, dtype=bool)
  turns = visited(ClassBalanced(present, SEED), 6 * 600).reshape(-1, 6)
  assert (np.sort(turns, 1) == np.arange(6)).all()
  assert stats.chisquare(np.bincount(turns[:, 0])).pvalue > 1e-3


def test_a_class_of_many_records():
  present = np.zeros((3000, 2), bool)
  present[:, 0] = present[5, 1] = True
  counts = np.bincount(visited(ClassBalanced(present, SEED), 6000))
  assert_equal(counts, np.where(np.arange(3000) == 5, 3001, 1))


def test_seeds_differ_and_far_positions_are_like_near_ones():
  one, other = (ClassBalanced(PRESENT, seed) for seed in (SEED, 12))
  assert not np.array_equal(visited(one, 30), visited(other, 30))
  far = visited(one, 30, start=3 * 10**9)
  assert PRESENT[far].any(0).tolist() == [True, True, True, False]


class Unreadable(PreparedSplit):
  """A split whose first label cannot be read."""

  def label(self, index):
    if index == 0:
      raise UnreadableSample('damaged')
    return super().label(index)


@pytest.fixture(scope='module')
def what(mini_data_dir):
  return 'ade20k_mini', mini_data_dir, 'train'


@pytest.fixture(scope='module')
def split(what):
  return PreparedSplit(*what)


def test_counts_are_those_of_a_naive_loop(split):
  rows = statistics.count_pixels(split)
  labels = [split[index]['label'] for index in range(3)]
  values = (*range(150), 255)
  assert rows.dtype == np.int64
  assert_equal(rows[:3], [[(x == k).sum() for k in values] for x in labels])
  assert len(rows) == len(split)


def config_of(**settings):
  return load_config(MINI, {f'data.{k}': v for k, v in settings.items()}).data


def test_sampler_of_a_run_keeps_its_counts(split, what, tmp_path):
  cache = tmp_path / 'class_pixels.npy'
  config = config_of(sampling='class_balanced')
  sampler, table = sampling.open_sampler(config, split, SEED, cache)
  counts = np.load(cache)
  assert counts.sum() == sum(split.label(i).size for i in range(len(split)))
  present = counts[:, :-1] > 0
  assert table.row_count == present.any(0).sum()
  # Drawn as often as the table says: a class has its own turns at least.
  drawn = present[visited(sampler, 200 * table.row_count)].mean(0)
  assert_allclose(drawn, sampler.weights(len(split)) @ present, atol=0.02)
  assert drawn[present.any(0)].min() >= 1 / table.row_count
  # The same again, from the file; other data is counted anew.
  again, _ = sampling.open_sampler(config, Unreadable(*what), SEED, cache)
  assert (visited(again, 50) == visited(sampler, 50)).all()
  whole = cache.read_bytes()
  for wrong in (counts[:3], counts / 2, -counts, None):
    if wrong is None:  # Not valid Python, in the header.
      cache.write_bytes(whole[:20] + b'\0' + whole[21:])
    else:
      np.save(cache, wrong)
    again = config, Unreadable(*what), SEED, cache
    unreadable('damaged', sampling.open_sampler, *again)


def test_labels_that_cannot_be_read_are_not_drawn(what, tmp_path):
  config = config_of(sampling='class_balanced', skip_unreadable=True)
  what = config, Unreadable(*what), SEED, tmp_path / 'class_pixels.npy'
  sampler, _ = sampling.open_sampler(*what)
  assert set(visited(sampler, 3000)) == set(range(1, 24))


def test_shares_by_hand():
  counts = np.array([[30, 0, 0], [10, 40, 0]])
  table = sampling.share_table(counts, np.array([0.25, 0.75]), ('a', 'b', 'c'))
  columns = [' '.join(column.cells) for column in table.columns]
  assert columns == ['a b', '50.00 50.00', '100.00 50.00', '100.00 75.00']


# Pixels of three classes and of one that is absent.
COUNTS = np.array([[60, 0, 4, 0], [30, 10, 0, 0], [0, 6, 0, 0]])


def test_class_weights_by_hand():
  weights = statistics.class_weights(COUNTS, 'median_frequency')
  # 90 of 104, 16 of 46 and 4 of 64 labelled pixels: the second is the median.
  frequency = np.array([90 / 104, 16 / 46, 4 / 64])
  assert_allclose(weights, [*(16 / 46 / frequency), 0])
  weights = statistics.class_weights(COUNTS, 'inverse_sqrt')
  assert_allclose(weights[1] / weights[0], np.sqrt(90 / 16))
  assert_allclose(weights[2] / weights[0], np.sqrt(90 / 4))
  assert weights[3] == 0
  assert_allclose(weights @ (90, 16, 4, 0) / 110, 1)


NO_LABEL = 'no sample has a labelled pixel'


def test_class_weights_of_a_split_keep_its_counts(split, tmp_path, capsys):
  cache = tmp_path / 'class_pixels.npy'
  config = load_config(MINI, {'loss.class_weights': 'inverse_sqrt'})
  weights = sampling.weigh_classes(config, split, cache)
  counts = np.load(cache)
  pixels = counts[:, :-1]
  assert_equal(weights, statistics.class_weights(pixels, 'inverse_sqrt'))
  assert (np.array(weights) > 0).sum() == pixels.any(0).sum()
  assert f'{weights[0]:.4g}' in capsys.readouterr().out
  pixels[:] = 0
  np.save(cache, counts)
  refused(NO_LABEL, sampling.weigh_classes, config, split, cache)
  config = config_of(sampling='class_balanced')
  refused(NO_LABEL, sampling.open_sampler, config, split, SEED, cache)


@pytest.mark.parametrize('workers', [0, 1])
def test_batches_are_those_of_the_samplers_records(split, tmp_path, workers):
  config = config_of(
    **{'sampling': 'repeat_factor', 'repeat_threshold': 0.9},
    **{'scale_range': (1.0, 1.0), 'image_scale': (512, 128)},
    **{'cat_max_ratio': 1.0, 'num_workers': workers},
  )
  sampler, _ = sampling.open_sampler(config, split, SEED, tmp_path / 'a.npy')
  options = {'seed': SEED, 'batch_size': 4, 'total_steps': 6}
  batches = make_train_iterator(config, split, sampler=sampler, **options)
  sizes = np.concatenate([batch['size'] for batch in batches])
  shapes = [split[sampler(i)]['label'].shape for i in range(24)]
  resized = [resize.resized_size(*x, 1.0, (512, 128)) for x in shapes]
  assert_equal(sizes, np.minimum(resized, 128))
