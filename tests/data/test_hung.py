"""Reads that do not come back: warned of, then given up, or waited for."""

import os
import threading
import time

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

from resnest_jax.data import pipeline


class Hanging(Scenes):
  """Reads a pipe before one of its samples, as from storage that hangs."""

  def __init__(self, count, which, pipe):
    super().__init__(count)
    self.which, self.pipe = which, str(pipe)

  def __getitem__(self, index):
    if index == self.which:
      with open(self.pipe, 'rb') as file:
        file.read()
    return super().__getitem__(index)


@pytest.fixture
def pipe(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  return tmp_path / 'pipe'


def release(pipe):
  """Lets all that hang, and will, go on."""
  pipe.rename(pipe.with_suffix('.old'))
  pipe.write_bytes(b'')
  file = os.open(pipe.with_suffix('.old'), os.O_RDWR)
  time.sleep(0.2)
  os.close(file)


def first_problem(iterator, timeout):
  """What the watching thread of a training would see."""
  found = []

  def watch():
    while not found:
      if problem := iterator.stuck(timeout):
        found.append(problem)
      time.sleep(0.02)

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  return found, thread


def open_iterator(split, **changes):
  return pipeline.make_train_iterator(
    data_config(**changes), split, seed=SEED, batch_size=4, total_steps=12
  )


@pytest.mark.parametrize('workers', [0, 1])
def test_hung_read_is_warned_of_and_the_run_goes_on(pipe, workers, capfd):
  expected = train_batches()
  late = which(expected[2])[1]  # No sample of the batches before.
  split = Hanging(10, late, pipe)
  iterator = open_iterator(split, num_workers=workers)
  batches = []

  def read():
    batch = next(iterator)
    batches.append({key: np.array(value) for key, value in batch.items()})

  read()  # Processes have started now.
  found, _ = first_problem(iterator, 30.0)

  def read_all():
    while len(batches) < len(expected):
      read()

  reading = threading.Thread(target=read_all)
  reading.start()
  said = ''
  while 'waiting for data' not in said:
    said += capfd.readouterr().err
    time.sleep(0.05)
  assert f'scene_{late}, read since' in said
  assert 'the run stops after 30 s (config.data.timeout)' in said
  release(pipe)
  reading.join(timeout=60)
  assert 'the data came after' in capfd.readouterr().err
  assert not found
  assert_same(batches, expected)
  iterator.close()


def test_hung_read_is_given_up_after_the_limit(pipe):
  iterator = open_iterator(Hanging(10, 6, pipe))
  found, thread = first_problem(iterator, 1.0)
  reading = threading.Thread(target=lambda: list(iterator), daemon=True)
  reading.start()
  thread.join(timeout=60)
  assert found[0].startswith('no data for 1 s (config.data.timeout): scene_6')
  release(pipe)
  reading.join(timeout=60)


def test_hung_evaluation_is_told_as_well(pipe):
  iterator = pipeline.make_eval_iterator(
    data_config(), Hanging(5, 3, pipe), batch_size=2, bucket=16
  )
  found, thread = first_problem(iterator, 1.0)
  reading = threading.Thread(target=lambda: list(iterator), daemon=True)
  reading.start()
  thread.join(timeout=60)
  assert 'scene_3, read since' in found[0]
  release(pipe)
  reading.join(timeout=60)


def test_a_slow_step_is_no_hung_read():
  iterator = open_iterator(Scenes(10))
  next(iterator)
  time.sleep(0.3)
  assert iterator.stuck(0.2) == ''
  iterator.close()
