"""The pipeline: same batches however they are read; evaluation buckets."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from data.readers import (
  SEED,
  Scenes,
  augmented,
  data_config,
  of_host,
  open_train,
  train_batches,
  which,
)
from numpy.testing import assert_equal

from resnest_jax.data import pipeline, resize
from resnest_jax.errors import UserError


@pytest.fixture(scope='module')
def reference():
  return train_batches()


def padded(array, shape, value):
  """The array with the value below and to the right of it."""
  room = [(0, new - old) for old, new in zip(array.shape, shape, strict=True)]
  return np.pad(array, room, constant_values=value)


def test_batches_have_the_documented_arrays(reference):
  assert len(reference) == 12
  shapes = {k: (value.shape, value.dtype) for k, value in reference[0].items()}
  assert shapes == {
    'image': ((4, 32, 40, 3), np.uint8),
    'label': ((4, 32, 40), np.uint8),
    'size': ((4, 2), np.int32),
    'photometric': ((4, 5), np.float32),
  }
  sizes = np.concatenate([batch['size'] for batch in reference])
  assert sizes.min() < 32  # Some are padded,
  assert (sizes.max(0) == (32, 40)).all()  # some are not.


def test_every_sample_is_its_documented_draw(reference):
  for position in (0, 5, 17, 47):
    batch, slot = reference[position // 4], position % 4
    expected = augmented(Scenes(10)[which(batch)[slot]], position)
    assert_equal({name: batch[name][slot] for name in expected}, expected)


def orders(count, batch_size, total_steps, seed=SEED):
  """The records of each epoch, as they are visited."""
  options = {'batch_size': batch_size, 'total_steps': total_steps}
  batches = train_batches(Scenes(count), seed=seed, **options)
  epochs = np.reshape([which(batch) for batch in batches], (-1, count))
  assert (np.sort(epochs, axis=1) == range(count)).all()
  return set(map(tuple, epochs.tolist()))


def test_every_epoch_visits_each_record_once_in_another_order():
  # 10 epochs of 10 samples in batches of 4 do not end where batches end.
  assert len(orders(10, 4, 25) - {tuple(range(10))}) == 10
  assert orders(3, 8, 3)  # A split smaller than a batch is repeated.
  assert not orders(10, 1, 40, seed=0) & orders(10, 1, 40, seed=1)


@pytest.mark.parametrize(
  'config',
  [
    *(data_config(num_threads=threads, prefetch=1) for threads in (0, 1, 5)),
    *(data_config(num_workers=workers, num_threads=1) for workers in (1, 3)),
  ],
)
def test_threads_and_processes_do_not_change_the_batches(reference, config):
  assert_equal(train_batches(config=config), reference)


@pytest.mark.parametrize('host', [0, 1])
def test_hosts_share_out_the_slots(reference, host):
  batches = train_batches(process_index=host, process_count=2)
  assert_equal(batches, of_host(reference, host))


@pytest.mark.parametrize('step', [*range(1, 13), 20])
def test_resuming_continues_the_run(reference, step):
  assert_equal(train_batches(start_step=step), reference[step:])


def test_resuming_with_workers_and_hosts_continues_the_run(reference):
  batches = train_batches(
    config=data_config(num_workers=2, num_threads=1),
    **{'start_step': 7, 'process_index': 1, 'process_count': 2},
  )
  assert_equal(batches, of_host(reference[7:], 1))


def test_resuming_late_costs_no_more_than_early():
  def seconds(start_step):
    start = time.perf_counter()
    train_batches(start_step=start_step, total_steps=start_step + 2)
    return time.perf_counter() - start

  early, late = (min(seconds(step) for _ in range(3)) for step in (10, 150_000))
  # Reading what came before would take thousands of times as long.
  assert late < 5 * early + 0.1


def test_photometric_off_leaves_identity_and_all_else(reference):
  batches = train_batches(config=data_config(photometric=False))
  identity = np.tile([0, 1, 1, 0, 1], (4, 1))
  expected = [batch | {'photometric': identity} for batch in reference]
  assert_equal(batches, expected)


@pytest.mark.parametrize(
  ('broken', 'fault', 'workers', 'error', 'message'),
  [
    (6, 'error', 0, UserError, 'scene_6 cannot be decoded'),
    (6, 'error', 1, UserError, 'scene_6 cannot be decoded'),
    (2, 'size', 0, UserError, "'scene_2'"),
    # An error that does not pickle still comes through.
    (3, 'bug', 1, RuntimeError, 'sample 3 failed: UnpicklableError'),
    (3, 'kill', 1, UserError, r'ended unexpectedly.*exit code -9'),
  ],
)
def test_a_bad_record_stops_with_its_name(
  broken, fault, workers, error, message
):
  config = data_config(num_workers=workers, num_threads=1)
  with pytest.raises(error, match=message):
    train_batches(Scenes(10, broken, fault), config)


def test_workers_that_are_killed_while_they_wait_are_noticed():
  config = data_config(num_workers=2, num_threads=1)
  with open_train(config=config, total_steps=10**6) as batches:
    next(batches)
    worker = multiprocessing.active_children()[-1]
    os.kill(worker.pid, signal.SIGKILL)
    # Those that wait in memory may still come.
    with pytest.raises(UserError, match=r'ended unexpectedly.*exit code -9'):
      list(itertools.islice(batches, 100))


READS = """
import sys
from data import readers
if __name__ == '__main__':
  config = readers.data_config(num_workers=1)
  with readers.open_train(config=config, total_steps=10**6) as batches:
    next(batches)
    print('reading', flush=True)
    sys.stdin.read()
"""


def test_workers_end_with_a_process_that_is_killed(root, tmp_path):
  script = tmp_path / 'reads.py'
  script.write_text(READS)
  with subprocess.Popen(
    [sys.executable, str(script)],
    env=os.environ | {'PYTHONPATH': f'{root}:{root / "tests"}'},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as process:
    assert process.stdout.readline() == b'reading\n'
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    process.kill()
    _, alive = psutil.wait_procs(started, timeout=20)
  assert not alive


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'batch_size': 5, 'process_count': 2}, 'a batch of 5 .* 2 processes'),
    ({'seed': -1}, 'seed is -1'),
    ({'split': Scenes(0)}, 'no samples'),
  ],
)
def test_unusable_options_are_refused(options, message):
  options = {'split': Scenes(4), 'batch_size': 2} | options
  with pytest.raises(UserError, match=message):
    open_train(**options)


def test_closing_early_and_twice_ends_the_threads():
  before = set(threading.enumerate())
  with open_train(batch_size=2, total_steps=10**9) as batches:
    next(batches)
    readers = set(threading.enumerate()) - before
    assert len(readers) == 2
    batches.close()
  with pytest.raises(ValueError, match='closed'):
    next(batches)
  for thread in readers:
    thread.join(timeout=10)
  assert not any(thread.is_alive() for thread in readers)


def eval_batches(split, config=None, **options):
  options = {'batch_size': 4, 'bucket': 16} | options
  iterator = pipeline.make_eval_iterator(
    config or data_config(), split, **options
  )
  with contextlib.closing(iterator):
    return iterator.num_images, list(iterator)


def slots(batches):
  """Everything of each image of the batches, by its index."""
  found = {}
  for batch in batches:
    for slot, index in enumerate(batch['index'].tolist()):
      if index >= 0:
        assert index not in found
        found[index] = {key: value[slot] for key, value in batch.items()}
  return found


def test_evaluation_holds_every_image_once_in_padded_batches():
  split = Scenes(23)
  num_images, batches = eval_batches(split)
  assert num_images == 23
  for batch in batches:
    assert batch['image'].shape[0] == batch['label'].shape[0] == 4
    # The smallest multiples of the bucket that hold all its images.
    for key, sizes in (('image', 'size'), ('label', 'label_size')):
      sides = -(-batch[sizes].max(0) // 16) * 16
      assert_equal(batch[key].shape[1:3], tuple(sides))
  found = slots(batches)
  assert sorted(found) == list(range(23))
  # No more than if all were of one shape: what is left shares larger ones.
  assert len(batches) == 6
  for index, slot in found.items():
    record = split[index]
    size = resize.keep_ratio_size(*record['label'].shape, 96, 48)
    image = resize.resize_image(record['image'], size)
    expected = {
      'image': padded(image, slot['image'].shape, 0),
      'label': padded(record['label'], slot['label'].shape, 255),
      'label_size': record['label'].shape,
      **{'size': size, 'index': index, 'name': record['name']},
    }
    assert_equal(slot, expected)


def test_evaluation_can_keep_the_original_sizes():
  split = Scenes(7)
  found = slots(eval_batches(split, keep_size=True)[1])
  assert len(found) == 7
  for index, slot in found.items():
    height, width = slot['size']
    assert_equal(slot['size'], slot['label_size'])
    assert_equal(slot['image'][:height, :width], split[index]['image'])


def test_evaluation_fills_batches_up_with_empty_slots():
  _, (batch,) = eval_batches(Scenes(1), batch_size=3)
  assert_equal(batch['index'], [0, -1, -1])
  assert_equal(batch['size'][1:], np.ones((2, 2)))
  assert_equal(batch['label_size'][1:], np.ones((2, 2)))
  assert (batch['label'][1:] == 255).all()
  assert (batch['image'][1:] == 0).all()
  assert batch['name'] == ['scene_0', '', '']


def test_evaluation_order_does_not_depend_on_threads():
  expected, batches = (
    eval_batches(Scenes(23), data_config(num_threads=number))[1]
    for number in (1, 5)
  )
  assert_equal(batches, expected)
  # A batch leaves when it is full, so the order is nearly the split's.
  assert expected[0]['index'].max() < 16


def test_evaluation_hosts_share_the_images():
  for host, expected in enumerate((3, 3, 2)):
    count, batches = eval_batches(
      Scenes(8), process_index=host, process_count=3
    )
    assert count == expected
    assert sorted(slots(batches)) == list(range(host, 8, 3))
  assert eval_batches(Scenes(2), process_index=3, process_count=4) == (0, [])


def test_evaluation_stops_at_a_bad_record():
  with pytest.raises(UserError, match='scene_3 cannot be decoded'):
    eval_batches(Scenes(6, 3))
  with pytest.raises(UserError, match=r'eval\.bucket is 0'):
    eval_batches(Scenes(6), bucket=0)
