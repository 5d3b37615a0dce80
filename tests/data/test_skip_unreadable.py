"""Samples that cannot be read: training stops, or takes others for them."""

import numpy as np
import pytest
from data.readers import (
  SEED,
  Scenes,
  assert_same,
  data_config,
  train_batches,
  which,
)

from resnest_jax.data import pipeline, transforms
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
    r'scene_\d is cut off[^$]*\n.*without such samples with '
    r'--config\.data\.skip_unreadable=true'
  )
  with pytest.raises(UnreadableSample, match=match):
    train_batches(DAMAGED)
  # All else that is wrong with a sample still stops.
  for fault, message in (('error', 'scene_6 cannot'), ('size', "'scene_6'")):
    with pytest.raises(UserError, match=message):
      train_batches(Scenes(10, broken=6, fault=fault), skipping())


def test_others_take_the_place_of_unreadable_samples(reference, replaced):
  key = pipeline.sample_key(SEED)
  number = 0
  for position in range(48):
    batch, slot = replaced[position // 4], position % 4
    (index,) = which({'image': reference[position // 4]['image'][[slot]]})
    sample = {name: value[slot] for name, value in batch.items()}
    expected = {
      name: value[slot] for name, value in reference[position // 4].items()
    }
    if index in (3, 8):
      number += 1
      rng = pipeline.sample_rng(key, position, stream=1)
      while (index := int(rng.integers(10))) in (3, 8):
        pass
      other = Scenes(10)[index]
      expected = transforms.augment(
        other['image'],
        other['label'],
        transforms.draw_augmentation(pipeline.sample_rng(key, position)),
        image_scale=(96, 48),
        crop_size=(32, 40),
        cat_max_ratio=0.75,
      )
    for name, value in expected.items():
      np.testing.assert_array_equal(sample[name], value)
    assert sample.keys() == expected.keys()
  assert number == 10  # Both in each of the nearly five epochs.


@pytest.mark.parametrize('workers', [0, 1, 4])
def test_replacements_and_their_count_do_not_depend_on_workers(
  replaced, workers
):
  config = skipping(num_workers=workers, num_threads=1)
  iterator = pipeline.make_train_iterator(
    config, DAMAGED, seed=SEED, batch_size=4, total_steps=12
  )
  counts, names, batches = [], set(), []
  for batch in iterator:
    batches.append({key: np.array(value) for key, value in batch.items()})
    report = iterator.report_skipped()
    counts.append(int(report.split()[0]) if report else 0)
    if report:
      assert report.endswith(' is cut off.')
      names.add(report.split()[-4])
  iterator.close()
  assert_same(batches, replaced)
  assert sum(counts) == 10
  assert names == {'scene_3', 'scene_8'}


def test_replacements_do_not_depend_on_hosts_and_resuming(replaced):
  assert_same(train_batches(DAMAGED, skipping(), start_step=7), replaced[7:])
  for host in range(2):
    batches = train_batches(
      DAMAGED, skipping(), process_index=host, process_count=2
    )
    expected = [
      {k: v[2 * host : 2 * host + 2] for k, v in x.items()} for x in replaced
    ]
    assert_same(batches, expected)


def test_data_that_cannot_be_read_at_all_stops():
  nothing = Scenes(10, unreadable=range(10))
  with pytest.raises(UserError, match=r'11 samples in a row .*skip_unread'):
    train_batches(nothing, skipping())


def test_nothing_skipped_is_nothing_said(reference):
  iterator = pipeline.make_train_iterator(
    skipping(), Scenes(10), seed=SEED, batch_size=4, total_steps=12
  )
  assert_same(list(iterator), reference)
  assert iterator.report_skipped() == ''
