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
  assert_same,
  data_config,
  train_batches,
  which,
)

from resnest_jax.data import pipeline, resize, transforms
from resnest_jax.errors import UserError


@pytest.fixture(scope='module')
def reference():
  return train_batches()


def test_batches_have_the_documented_arrays(reference):
  assert len(reference) == 12
  batch = reference[0]
  shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
  assert shapes == {
    'image': ((4, 32, 40, 3), np.uint8),
    'label': ((4, 32, 40), np.uint8),
    'size': ((4, 2), np.int32),
    'photometric': ((4, 5), np.float32),
  }
  sizes = np.concatenate([batch['size'] for batch in reference])
  assert sizes.min() < 32  # Some are padded,
  assert (sizes.max(0) == (32, 40)).all()  # some are not.
  for batch in reference:
    for slot, (height, width) in enumerate(batch['size']):
      assert (batch['label'][slot, :height, :width] < 4).all()
      assert (batch['label'][slot, height:] == 255).all()
      assert (batch['label'][slot, :, width:] == 255).all()
      assert (batch['image'][slot, height:] == 0).all()
      assert (batch['image'][slot, :, width:] == 0).all()


def test_every_sample_is_its_documented_draw(reference):
  split = Scenes(10)
  key = pipeline.sample_key(SEED)
  for position in (0, 5, 17, 47):
    batch, slot = reference[position // 4], position % 4
    sample = split[which(batch)[slot]]
    draw = transforms.draw_augmentation(pipeline.sample_rng(key, position))
    expected = transforms.augment(
      sample['image'],
      sample['label'],
      draw,
      image_scale=(96, 48),
      crop_size=(32, 40),
      cat_max_ratio=0.75,
    )
    for name, value in expected.items():
      np.testing.assert_array_equal(batch[name][slot], value)


def test_every_epoch_visits_each_record_once_in_another_order():
  # 5 epochs of 10 samples in batches of 4 do not end where batches end.
  batches = train_batches(total_steps=25, batch_size=2)
  order = np.reshape([which(batch) for batch in batches], (5, 10))
  np.testing.assert_array_equal(np.sort(order, axis=1), [range(10)] * 5)
  assert len({tuple(row) for row in order.tolist()}) == 5
  assert [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] not in order.tolist()


def test_the_draws_change_from_epoch_to_epoch():
  batches = train_batches(Scenes(1), total_steps=6, batch_size=1)
  assert len({batch['image'].tobytes() for batch in batches}) == 6


def test_seeds_differ_and_neighbours_share_no_order():
  def orders(seed):
    batches = train_batches(total_steps=40, batch_size=1, seed=seed)
    order = np.reshape([which(batch) for batch in batches], (4, 10))
    return {tuple(row) for row in order.tolist()}

  assert not orders(0) & orders(1)


@pytest.mark.parametrize('threads', [0, 1, 5])
def test_threads_do_not_change_the_batches(reference, threads):
  config = data_config(num_threads=threads, prefetch=1)
  assert_same(train_batches(config=config), reference)


@pytest.mark.parametrize('workers', [1, 4])
def test_worker_processes_do_not_change_the_batches(reference, workers):
  config = data_config(num_workers=workers, num_threads=1)
  assert_same(train_batches(config=config), reference)


def test_hosts_share_out_the_slots(reference):
  hosts = [train_batches(process_index=h, process_count=2) for h in range(2)]
  for host in range(2):
    expected = [
      {key: value[2 * host : 2 * host + 2] for key, value in batch.items()}
      for batch in reference
    ]
    assert_same(hosts[host], expected)


@pytest.mark.parametrize('step', [*range(1, 13), 20])
def test_resuming_continues_the_run(reference, step):
  assert_same(train_batches(start_step=step), reference[step:])


def test_resuming_with_workers_and_hosts_continues_the_run(reference):
  config = data_config(num_workers=2, num_threads=1)
  batches = train_batches(
    config=config, start_step=7, process_index=1, process_count=2
  )
  expected = [{k: v[2:] for k, v in batch.items()} for batch in reference[7:]]
  assert_same(batches, expected)


def test_resuming_late_costs_no_more_than_early():
  def seconds(start_step):
    best = float('inf')
    for _ in range(3):
      start = time.perf_counter()
      train_batches(start_step=start_step, total_steps=start_step + 2)
      best = min(best, time.perf_counter() - start)
    return best

  early, late = seconds(10), seconds(150_000)
  # Reading what came before would take thousands of times as long.
  assert late < 5 * early + 0.1


def test_a_split_smaller_than_a_batch_is_repeated():
  batches = train_batches(Scenes(3), batch_size=8, total_steps=3)
  order = np.reshape([which(batch) for batch in batches], (8, 3))
  np.testing.assert_array_equal(np.sort(order, axis=1), [range(3)] * 8)


def test_photometric_off_leaves_identity_and_all_else(reference):
  batches = train_batches(config=data_config(photometric=False))
  for batch, other in zip(batches, reference, strict=True):
    np.testing.assert_array_equal(
      batch['photometric'], np.tile([0, 1, 1, 0, 1], (4, 1))
    )
    np.testing.assert_array_equal(batch['image'], other['image'])


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_record_stops_with_its_name(workers):
  config = data_config(num_workers=workers, num_threads=1)
  with pytest.raises(UserError, match='scene_6 cannot be decoded'):
    train_batches(Scenes(10, broken=6), config)


def test_an_error_that_does_not_pickle_still_comes_through():
  config = data_config(num_workers=1)
  with pytest.raises(RuntimeError, match='sample 3 failed: UnpicklableError'):
    train_batches(Scenes(10, broken=3, fault='bug'), config)


def test_a_killed_worker_is_noticed():
  config = data_config(num_workers=1)
  with pytest.raises(UserError, match=r'ended unexpectedly.*exit code -9'):
    train_batches(Scenes(10, broken=3, fault='kill'), config)


def test_workers_that_are_killed_while_they_wait_are_noticed():
  iterator = pipeline.make_train_iterator(
    data_config(num_workers=2, num_threads=1),
    Scenes(10),
    seed=0,
    batch_size=4,
    total_steps=10**6,
  )
  with contextlib.closing(iterator):
    next(iterator)
    worker = multiprocessing.active_children()[-1]
    os.kill(worker.pid, signal.SIGKILL)
    # Those that wait in memory may still come.
    with pytest.raises(UserError, match=r'ended unexpectedly.*exit code -9'):
      list(itertools.islice(iterator, 100))


READS = """
import sys
from data import readers
from resnest_jax.data import pipeline
if __name__ == '__main__':
  batches = pipeline.make_train_iterator(
    readers.data_config(num_workers=1), readers.Scenes(10), seed=0,
    batch_size=4, total_steps=10**6,
  )
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


def test_image_and_label_of_different_size_stop_with_the_name():
  with pytest.raises(UserError, match="'scene_2'"):
    train_batches(Scenes(10, broken=2, fault='size'))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'batch_size': 5, 'process_count': 2}, 'a batch of 5 .* 2 processes'),
    ({'batch_size': 0}, 'a batch of 0'),
    ({'seed': -1}, 'seed is -1'),
    ({'split': Scenes(0)}, 'no samples'),
  ],
)
def test_unusable_options_are_refused(options, message):
  options = dict(options)
  split = options.pop('split', Scenes(4))
  options = {'seed': 0, 'batch_size': 2, 'total_steps': 1} | options
  with pytest.raises(UserError, match=message):
    pipeline.make_train_iterator(data_config(), split, **options)


def test_closing_early_and_twice_ends_the_threads():
  before = set(threading.enumerate())
  iterator = pipeline.make_train_iterator(
    data_config(), Scenes(10), seed=0, batch_size=2, total_steps=10**9
  )
  next(iterator)
  readers = set(threading.enumerate()) - before
  assert len(readers) == 2
  iterator.close()
  iterator.close()
  with pytest.raises(ValueError, match='closed'):
    next(iterator)
  for thread in readers:
    thread.join(timeout=10)
  assert not any(thread.is_alive() for thread in readers)


def eval_batches(split, config=None, **options):
  options = {'batch_size': 4, 'bucket': 16} | options
  iterator = pipeline.make_eval_iterator(
    config or data_config(), split, **options
  )
  try:
    return iterator.num_images, list(iterator)
  finally:
    iterator.close()


def test_evaluation_holds_every_image_once_in_padded_batches():
  split = Scenes(23)
  num_images, batches = eval_batches(split)
  assert num_images == 23
  seen = []
  for batch in batches:
    assert batch['image'].shape[0] == batch['label'].shape[0] == 4
    # The smallest multiples of the bucket that hold all its images.
    for key, sizes in (('image', 'size'), ('label', 'label_size')):
      padded = -(-batch[sizes].max(0) // 16) * 16
      np.testing.assert_array_equal(batch[key].shape[1:3], padded)
    for slot, index in enumerate(batch['index'].tolist()):
      if index < 0:
        continue
      seen.append(index)
      sample = split[index]
      assert batch['name'][slot] == sample['name']
      height, width = sample['label'].shape
      np.testing.assert_array_equal(batch['label_size'][slot], (height, width))
      size = resize.keep_ratio_size(height, width, 96, 48)
      np.testing.assert_array_equal(batch['size'][slot], size)
      image = resize.resize_image(sample['image'], size)
      inside = slice(size[0]), slice(size[1])
      np.testing.assert_array_equal(batch['image'][slot][inside], image)
      assert batch['image'][slot].sum() == image.sum()
      inside = slice(height), slice(width)
      np.testing.assert_array_equal(
        batch['label'][slot][inside], sample['label']
      )
      assert (batch['label'][slot] < 255).sum() == height * width
  assert sorted(seen) == list(range(23))
  # No more than if all were of one shape: what is left shares larger ones.
  assert len(batches) == 6


def test_evaluation_can_keep_the_original_sizes():
  split = Scenes(7)
  _, batches = eval_batches(split, keep_size=True)
  seen = 0
  for batch in batches:
    np.testing.assert_array_equal(batch['size'], batch['label_size'])
    for slot, index in enumerate(batch['index'].tolist()):
      if index >= 0:
        height, width = batch['size'][slot]
        np.testing.assert_array_equal(
          batch['image'][slot, :height, :width], split[index]['image']
        )
        seen += 1
  assert seen == 7


def test_evaluation_fills_batches_up_with_empty_slots():
  _, (batch,) = eval_batches(Scenes(1), batch_size=3)
  np.testing.assert_array_equal(batch['index'], [0, -1, -1])
  np.testing.assert_array_equal(batch['size'][1:], np.ones((2, 2)))
  np.testing.assert_array_equal(batch['label_size'][1:], np.ones((2, 2)))
  assert (batch['label'][1:] == 255).all()
  assert (batch['image'][1:] == 0).all()
  assert batch['name'] == ['scene_0', '', '']


def test_evaluation_order_does_not_depend_on_threads():
  expected = eval_batches(Scenes(23), data_config(num_threads=1))[1]
  batches = eval_batches(Scenes(23), data_config(num_threads=5))[1]
  assert [b['name'] for b in batches] == [b['name'] for b in expected]
  for batch, other in zip(batches, expected, strict=True):
    np.testing.assert_array_equal(batch['image'], other['image'])
  # A batch leaves when it is full, so the order is nearly the split's.
  assert expected[0]['index'].max() < 16


def test_evaluation_hosts_share_the_images():
  seen, counts = [], []
  for host in range(3):
    count, batches = eval_batches(
      Scenes(8), process_index=host, process_count=3
    )
    mine = [i for b in batches for i in b['index'].tolist() if i >= 0]
    assert sorted(mine) == list(range(host, 8, 3))
    seen += mine
    counts.append(count)
  assert counts == [3, 3, 2]
  assert sorted(seen) == list(range(8))
  assert eval_batches(Scenes(2), process_index=3, process_count=4) == (0, [])


def test_evaluation_stops_at_a_bad_record_with_its_name():
  with pytest.raises(UserError, match='scene_3 cannot be decoded'):
    eval_batches(Scenes(6, broken=3))
  with pytest.raises(UserError, match="'scene_5'"):
    eval_batches(Scenes(6, broken=5, fault='size'))
  with pytest.raises(UserError, match=r'eval\.bucket is 0'):
    eval_batches(Scenes(6), bucket=0)
