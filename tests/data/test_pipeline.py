"""The pipeline: same batches however they are read; bad data; evaluation."""

import multiprocessing
import os
import re
import threading
import time

import numpy as np
import psutil
import pytest
from data import readers
from data.readers import Scenes, data_config, open_train, train_batches, which
from data.refusals import refused, unreadable
from hosts import start
from numpy.testing import assert_equal

from resnest_jax.data import pipeline, resize, transforms
from resnest_jax.data.transforms import pad_bottom_right as pad
from resnest_jax.errors import UserError


@pytest.fixture(scope='module')
def reference():
  return train_batches()


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
    expected = readers.augmented(Scenes(10)[which(batch)[slot]], position)
    assert_equal({name: batch[name][slot] for name in expected}, expected)


def test_samples_as_pytorch_encoding_makes_them():
  config = data_config(**readers.ENCODING)
  batches = train_batches(config=config, total_steps=3)
  options = readers.SIZES | {'image_scale': (48, 48)}
  for position in range(12):
    batch, slot = batches[position // 4], position % 4
    record = Scenes(10)[which(batch)[slot]]
    expected = readers.augmented(
      record, position, transforms.augment_encoding, **options
    )
    assert_equal({name: batch[name][slot] for name in expected}, expected)
    assert batch['size'][slot].tolist() == [32, 40]


def orders(count, batch_size, total_steps, seed=readers.SEED):
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
  ('workers', 'threads'), [(0, 0), (0, 1), (0, 5), (1, 1), (3, 1)]
)
def test_batches_do_not_depend_on_their_readers(reference, workers, threads):
  config = data_config(num_workers=workers, num_threads=threads, prefetch=1)
  assert_equal(train_batches(config=config), reference)


@pytest.mark.parametrize(
  ('start_step', 'host', 'workers'), [(0, 0, 0), (0, 1, 0), (7, 1, 2)]
)
def test_hosts_share_out_the_slots(reference, start_step, host, workers):
  config = data_config(num_workers=workers, num_threads=1)
  options = {'process_index': host, 'process_count': 2}
  batches = train_batches(config=config, start_step=start_step, **options)
  assert_equal(batches, readers.of_host(reference[start_step:], host))


@pytest.mark.parametrize('step', [*range(1, 13), 20])
def test_resuming_continues_the_run(reference, step):
  assert_equal(train_batches(start_step=step), reference[step:])


def test_resuming_late_costs_no_more_than_early():
  def seconds(step):
    begin = time.perf_counter()
    train_batches(start_step=step, total_steps=step + 2)
    return time.perf_counter() - begin

  early, late = (min(seconds(step) for _ in range(3)) for step in (10, 150_000))
  # Reading what came before would take thousands of times as long.
  assert late < 5 * early + 0.1


def test_photometric_off_leaves_identity_and_all_else(reference):
  identity = np.tile([0, 1, 1, 0, 1], (4, 1))
  expected = [batch | {'photometric': identity} for batch in reference]
  assert_equal(train_batches(config=data_config(photometric=False)), expected)


BAD = [
  (6, 'error', 0, UserError, 'scene_6 cannot be decoded'),
  (6, 'error', 1, UserError, 'scene_6 cannot be decoded'),
  (2, 'size', 0, UserError, "'scene_2'"),
  # An error that does not pickle still comes through.
  (3, 'bug', 1, RuntimeError, 'sample 3 failed: UnpicklableError'),
  (3, 'kill', 1, UserError, r'ended unexpectedly.*exit code -9'),
]


@pytest.mark.parametrize(('broken', 'fault', 'workers', 'error', 'told'), BAD)
def test_a_bad_record_stops_with_its_name(broken, fault, workers, error, told):
  config = data_config(num_workers=workers, num_threads=1)
  with pytest.raises(error, match=told):
    train_batches(Scenes(10, broken, fault), config)


def test_workers_that_are_killed_while_they_wait_are_noticed():
  config = data_config(num_workers=2, num_threads=1)
  with open_train(config=config, total_steps=10**6) as batches:
    next(batches)
    multiprocessing.active_children()[-1].kill()
    # Those that wait in memory may still come.
    with pytest.raises(UserError, match=r'ended unexpectedly.*exit code -9'):
      [next(batches) for _ in range(100)]


READS = """
import time
from data import readers
config = readers.data_config(num_workers=1)
with readers.open_train(config=config, total_steps=10**6) as batches:
  next(batches)
  print('reading', flush=True)
  time.sleep(600)
"""


def test_workers_end_with_a_process_that_is_killed():
  with start('-c', READS, devices=1) as process:
    assert process.stdout.readline() == 'reading\n'
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    process.kill()
    _, alive = psutil.wait_procs(started, timeout=20)
  assert not alive


UNUSABLE = [
  ({'batch_size': 5, 'process_count': 2}, 'a batch of 5 .* 2 processes'),
  ({'split': Scenes(0)}, 'no samples'),
]


@pytest.mark.parametrize(('options', 'message'), UNUSABLE)
def test_unusable_options_are_refused(options, message):
  refused(message, open_train, **options)


def test_closing_early_and_twice_ends_the_threads():
  before = set(threading.enumerate())
  with open_train(batch_size=2, total_steps=10**9) as batches:
    next(batches)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    batches.close()
  with pytest.raises(ValueError, match='closed'):
    next(batches)
  for thread in started:
    thread.join(timeout=10)
    assert not thread.is_alive()


# ---- Samples that cannot be read: an error, or others take their place ------


DAMAGED = Scenes(10, unreadable=(3, 8))


def skipping(**changes):
  return data_config(skip_unreadable=True, **changes)


@pytest.fixture(scope='module')
def replaced():
  return train_batches(DAMAGED, skipping())


def test_unreadable_samples_stop_unless_they_are_skipped():
  told = r'scene_\d is cut off[^$]*\n.*set --config\.data\.skip_unreadable=true'
  unreadable(told, train_batches, DAMAGED)
  # All else that is wrong with a sample still stops.
  for fault, message in (('error', 'scene_6 cannot'), ('size', "'scene_6'")):
    refused(message, train_batches, Scenes(10, 6, fault), skipping())


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
      key = pipeline.sample_key(readers.SEED)
      rng = pipeline.sample_rng(key, position, stream=1)
      while (index := int(rng.integers(10))) in (3, 8):
        pass
      expected = readers.augmented(Scenes(10)[index], position)
    assert_equal(sample, expected)
  assert number == 10  # Both in each of the nearly five epochs.


@pytest.mark.parametrize('workers', [0, 2])
def test_replacements_and_reports_are_those_of_any_workers(replaced, workers):
  config = skipping(num_workers=workers, num_threads=1)
  reports, batches = [], []
  with open_train(DAMAGED, config) as iterator:
    for batch in iterator:
      batches.append(readers.copied(batch))
      reports.append(iterator.report_skipped())
  assert_equal(batches, replaced)
  said = re.findall(r'(\d+) unreadable .*: (\w+) is cut', '\n'.join(reports))
  assert sum(int(count) for count, _ in said) == 10
  assert {name for _, name in said} == {'scene_3', 'scene_8'}


def test_replacements_do_not_depend_on_hosts_and_resuming(replaced):
  assert_equal(train_batches(DAMAGED, skipping(), start_step=7), replaced[7:])
  for host in range(2):
    hosts = {'process_index': host, 'process_count': 2}
    batches = train_batches(DAMAGED, skipping(), **hosts)
    assert_equal(batches, readers.of_host(replaced, host))


def test_data_that_cannot_be_read_at_all_stops():
  with pytest.raises(UserError, match=r'11 samples in a row .*skip_unread'):
    train_batches(Scenes(10, unreadable=range(10)), skipping())


def test_nothing_skipped_is_nothing_said(reference):
  with open_train(config=skipping()) as batches:
    assert_equal(list(batches), reference)
    assert batches.report_skipped() == ''


# ---- Reads that do not come back: warned of, then given up, or waited for ----


@pytest.fixture
def pipe(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  return tmp_path / 'pipe'


def release(pipe):
  """Lets all that hang, and will, go on."""
  old = pipe.rename(pipe.with_suffix('.old'))
  pipe.write_bytes(b'')
  with old.open('r+b', 0):
    time.sleep(0.2)


def in_thread(function, *arguments):
  thread = threading.Thread(target=function, args=arguments, daemon=True)
  thread.start()
  return thread


def watch(iterator, timeout, found):
  """What another thread of a training does."""
  while not found:
    found += filter(None, [iterator.stuck(timeout)])
    time.sleep(0.02)


@pytest.mark.parametrize('workers', [0, 1])
def test_hung_read_is_warned_of(pipe, workers, capfd, reference):
  late = which(reference[2])[1]  # No record of the batches before.
  split, found = Scenes(10, late, 'hang', pipe=pipe), []
  with open_train(split, data_config(num_workers=workers)) as iterator:
    batches = [readers.copied(next(iterator))]  # Processes have started now.
    in_thread(watch, iterator, 30.0, found)
    reading = in_thread(lambda: batches.extend(map(readers.copied, iterator)))
    said = ''
    while 'no batch for' not in said:
      said += capfd.readouterr().err
      time.sleep(0.05)
    told = f'scene_{late}, being read for .*the run stops after 30 s '
    assert re.search(rf'{told}\(config\.data\.timeout\)', said)
    release(pipe)
    reading.join(timeout=60)
    assert 'the batch came after' in capfd.readouterr().err
    assert not found
    assert_equal(batches, reference)


def open_eval(split, config=None, **options):
  options = {'batch_size': 4, 'bucket': 16} | options
  return pipeline.make_eval_iterator(config or data_config(), split, **options)


@pytest.mark.parametrize('make', [open_train, open_eval])
def test_hung_read_is_given_up_after_the_limit(pipe, make):
  iterator, found = make(Scenes(5, 3, 'hang', pipe=pipe)), []
  reading = in_thread(list, iterator)
  in_thread(watch, iterator, 1.0, found).join(timeout=60)
  told = r'no batch for 1 s \(config\.data\.timeout\): scene_3, being read for'
  assert re.match(told, found[0])
  release(pipe)
  reading.join(timeout=60)


def test_a_slow_step_is_no_hung_read():
  with open_train() as iterator:
    next(iterator)
    time.sleep(0.3)
    assert iterator.stuck(0.2) == ''


# ---- Evaluation -------------------------------------------------------------


def eval_batches(*arguments, **options):
  with open_eval(*arguments, **options) as iterator:
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
    # The smallest multiples of the bucket that hold all its images.
    for key, sizes in (('image', 'size'), ('label', 'label_size')):
      sides = -(-batch[sizes].max(0) // 16) * 16
      assert_equal(batch[key].shape[:3], (4, *sides))
  found = slots(batches)
  assert sorted(found) == list(range(23))
  # No more than if all were of one shape: what is left shares larger ones.
  assert len(batches) == 6
  for index, slot in found.items():
    record = split[index]
    size = resize.keep_ratio_size(*record['label'].shape, 96, 48)
    image = resize.resize_image(record['image'], size)
    expected = {
      'image': pad(image, slot['image'].shape[:2], 0),
      'label': pad(record['label'], slot['label'].shape, 255),
      'label_size': record['label'].shape,
      **{'size': size, 'index': index, 'name': record['name']},
    }
    assert_equal(slot, expected)


def test_evaluation_can_keep_the_original_sizes():
  found = slots(eval_batches(Scenes(7), keep_size=True)[1])
  assert len(found) == 7
  for index, slot in found.items():
    height, width = slot['label_size']
    assert_equal(slot['size'], slot['label_size'])
    assert_equal(slot['image'][:height, :width], Scenes(7)[index]['image'])


def test_evaluation_fills_batches_up_with_empty_slots():
  _, (batch,) = eval_batches(Scenes(1), batch_size=3)
  assert_equal(batch['index'], [0, -1, -1])
  empty = {'size': 1, 'label_size': 1, 'label': 255, 'image': 0}
  for key, value in empty.items():
    assert (batch[key][1:] == value).all(), key
  assert batch['name'] == ['scene_0', '', '']


def test_evaluation_order_does_not_depend_on_threads():
  _, expected = eval_batches(Scenes(23), data_config(num_threads=1))
  _, batches = eval_batches(Scenes(23), data_config(num_threads=5))
  assert_equal(batches, expected)
  # A batch leaves when it is full, so the order is nearly the split's.
  assert expected[0]['index'].max() < 16


def test_evaluation_hosts_share_the_images():
  for host, expected in enumerate((3, 3, 2)):
    hosts = {'process_index': host, 'process_count': 3}
    count, batches = eval_batches(Scenes(8), **hosts)
    assert count == expected
    assert sorted(slots(batches)) == list(range(host, 8, 3))
  assert eval_batches(Scenes(2), process_index=3, process_count=4) == (0, [])


def test_evaluation_stops_at_a_bad_record():
  refused('scene_3 cannot be decoded', eval_batches, Scenes(6, 3))
  refused(r'eval\.bucket is 0', eval_batches, Scenes(6), bucket=0)
