"""Samples that cannot be read: training stops, or takes others for them."""

import re

import pytest
from data.readers import (
  SEED,
  Scenes,
  augmented,
  copied,
  data_config,
  of_host,
  open_train,
  train_batches,
)
from numpy.testing import assert_equal

from resnest_jax.data import pipeline
from resnest_jax.errors import UnreadableSample, UserError

DAMAGED = Scenes(10, unreadable=(3, 8))


def skipping(**changes):
  return data_config(skip_unreadable=True, **changes)


@pytest.fixture(scope='module')
def reference():
  return train_batches()


@pytest.fixture(scope='module')
def replaced():
  return train_batches(DAMAGED, skipping())


def test_unreadable_samples_stop_unless_they_are_skipped():
  match = (
    r'scene_\d is cut off[^$]*\n.*set '
    r'--config\.data\.skip_unreadable=true'
  )
  with pytest.raises(UnreadableSample, match=match):
    train_batches(DAMAGED)
  # All else that is wrong with a sample still stops.
  for fault, message in (('error', 'scene_6 cannot'), ('size', "'scene_6'")):
    with pytest.raises(UserError, match=message):
      train_batches(Scenes(10, broken=6, fault=fault), skipping())


def test_others_take_the_place_of_unreadable_samples(reference, replaced):
  number = 0
  for position in range(48):
    sample, expected = (
      {name: value[position % 4] for name, value in x[position // 4].items()}
      for x in (replaced, reference)
    )
    index = expected['image'][0, 0, 0]
    if index in (3, 8):
      number += 1
      key = pipeline.sample_key(SEED)
      rng = pipeline.sample_rng(key, position, stream=1)
      while (index := int(rng.integers(10))) in (3, 8):
        pass
      expected = augmented(Scenes(10)[index], position)
    assert_equal(sample, expected)
  assert number == 10  # Both in each of the nearly five epochs.


@pytest.mark.parametrize('workers', [0, 2])
def test_replacements_and_their_count_do_not_depend_on_workers(
  replaced, workers
):
  config = skipping(num_workers=workers, num_threads=1)
  reports, batches = [], []
  with open_train(DAMAGED, config) as iterator:
    for batch in iterator:
      batches.append(copied(batch))
      reports.append(iterator.report_skipped())
  assert_equal(batches, replaced)
  said = re.findall(r'(\d+) unreadable .*: (\w+) is cut', '\n'.join(reports))
  assert sum(int(count) for count, _ in said) == 10
  assert {name for _, name in said} == {'scene_3', 'scene_8'}


def test_replacements_do_not_depend_on_hosts_and_resuming(replaced):
  assert_equal(train_batches(DAMAGED, skipping(), start_step=7), replaced[7:])
  for host in range(2):
    batches = train_batches(
      DAMAGED, skipping(), process_index=host, process_count=2
    )
    assert_equal(batches, of_host(replaced, host))


def test_data_that_cannot_be_read_at_all_stops():
  nothing = Scenes(10, unreadable=range(10))
  with pytest.raises(UserError, match=r'11 samples in a row .*skip_unread'):
    train_batches(nothing, skipping())


def test_nothing_skipped_is_nothing_said(reference):
  with open_train(config=skipping()) as batches:
    assert_equal(list(batches), reference)
    assert batches.report_skipped() == ''
