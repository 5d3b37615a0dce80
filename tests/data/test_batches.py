"""Reads that do not come back: warned of, then given up, or waited for."""

import os
import threading
import time

import pytest
from data.readers import (
  Scenes,
  copied,
  data_config,
  open_train,
  train_batches,
  which,
)
from numpy.testing import assert_equal

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


def in_thread(function):
  thread = threading.Thread(target=function, daemon=True)
  thread.start()
  return thread


def first_problem(iterator, timeout):
  """What the watching thread of a training would see."""
  found = []

  def watch():
    while not found:
      if problem := iterator.stuck(timeout):
        found.append(problem)
      time.sleep(0.02)

  return found, in_thread(watch)


@pytest.mark.parametrize('workers', [0, 1])
def test_hung_read_is_warned_of_and_the_run_continues(pipe, workers, capfd):
  expected = train_batches()
  late = which(expected[2])[1]  # No record of the batches before.
  config = data_config(num_workers=workers)
  with open_train(Hanging(10, late, pipe), config) as iterator:
    batches = [copied(next(iterator))]  # Processes have started now.
    found, _ = first_problem(iterator, 30.0)
    reading = in_thread(lambda: batches.extend(map(copied, iterator)))
    said = ''
    while 'no batch for' not in said:
      said += capfd.readouterr().err
      time.sleep(0.05)
    assert f'scene_{late}, being read for' in said
    assert 'the run stops after 30 s (config.data.timeout)' in said
    release(pipe)
    reading.join(timeout=60)
    assert 'the batch came after' in capfd.readouterr().err
    assert not found
    assert_equal(batches, expected)


def open_eval(split):
  return pipeline.make_eval_iterator(
    data_config(), split, batch_size=2, bucket=16
  )


@pytest.mark.parametrize('make', [lambda x: open_train(x).thing, open_eval])
def test_hung_read_is_given_up_after_the_limit(pipe, make):
  iterator = make(Hanging(5, 3, pipe))
  found, thread = first_problem(iterator, 1.0)
  reading = in_thread(lambda: list(iterator))
  thread.join(timeout=60)
  assert found[0].startswith('no batch for 1 s (config.data.timeout): scene_3')
  assert 'scene_3, being read for' in found[0]
  release(pipe)
  reading.join(timeout=60)


def test_a_slow_step_is_no_hung_read():
  with open_train() as iterator:
    next(iterator)
    time.sleep(0.3)
    assert iterator.stuck(0.2) == ''
