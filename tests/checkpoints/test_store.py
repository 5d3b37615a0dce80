"""Checkpoints: what stays, where they go back to, what is refused."""

import itertools
import os
import shutil
import threading
import time

import jax
import optax
import pytest
from checkpoints import stored
from checkpoints.stored import ABSTRACT, abstract, assert_is, make_state
from small import small_config
from trouble import kill_while_emptied
from weights.built import refused

from resnest_jax import runtime
from resnest_jax.checkpoints import store
from resnest_jax.errors import NotWrittenInTime
from resnest_jax.labels import ADE20K


@pytest.fixture
def workdir(tmp_path):
  """Steps 10 to 60, evaluated at 20 and 40, of which 20 was better."""
  metrics = {20: {'mIoU': 0.5}, 40: {'mIoU': 0.25}}
  with store.open_checkpoints(tmp_path, keep=2) as manager:
    for step in range(10, 70, 10):
      about = {'step': step, 'best': 20}
      store.save(manager, make_state(step), about, metrics.get(step))
  return tmp_path


def test_clock_that_jumps_during_a_save(tmp_path, monkeypatch):
  clock, jumps = time.time, itertools.count()

  def an_hour_further():  # Whenever it is read, for a while.
    return clock() + 3600 * min(next(jumps), 100)

  with store.open_checkpoints(tmp_path) as manager:
    manager.finish()
    monkeypatch.setattr(time, 'time', an_hour_further)
    store.save(manager, make_state(7), {})
    manager.finish()
    assert next(jumps) > 10
    assert_is(store.restore(manager, 7, ABSTRACT)[0], 7)


def test_write_that_does_not_end_is_told_and_left(tmp_path, monkeypatch):
  monkeypatch.setattr('resnest_jax.checkpoints.manager.PATIENCE', 0.5)
  release = threading.Event()
  manager = store.open_checkpoints(tmp_path)
  for place in (os, type(tmp_path)):
    monkeypatch.setattr(place, 'rename', lambda *_: release.wait(60))
  store.save(manager, make_state(7), {})
  begun = time.monotonic()
  with pytest.raises(NotWrittenInTime, match=r'not written in time: .* res'):
    manager.finish()
  manager.close()
  assert time.monotonic() - begun < 10
  release.set()


def test_the_newest_and_the_best_stay(workdir):
  with store.open_checkpoints(workdir, read_only=True) as manager:
    assert sorted(manager.all_steps()) == [20, 50, 60]
    found = [store.find_step(manager, x) for x in ('latest', 'best', '50')]
    assert found == [60, 20, 50]
    refused(r"'30'.*20, 50, 60", store.find_step, manager, '30')


# A glob, a C++ separator, an address, and bytes that are no text: Orbax merges
# nothing there, or reads another folder.
ODD = [b'[a] b', b'a\\b', b'gs:', b'stra\xdfe', b'a*?\n', b'[', b'\xe8']


@pytest.mark.parametrize('name', ODD)
def test_folders_of_any_name(tmp_path, name):
  workdir = tmp_path / os.fsdecode(name) / 'run'
  stored.write(workdir, 7)
  store.save_interrupted(workdir, make_state(9), {'step': 9})
  with store.open_checkpoints(workdir) as manager:
    assert manager.folder == workdir / 'checkpoints'
    assert_is(store.restore_newest(workdir, manager, ABSTRACT)[0], 9)
    shutil.rmtree(workdir / 'interrupted')
    assert_is(store.restore_newest(workdir, manager, ABSTRACT)[0], 7)
    refused('no checkpoint 8', store.find_step, manager, 8)
  assert os.listdir(workdir / 'checkpoints') == ['7']


@pytest.mark.parametrize('count', [1, 4])
def test_restores_onto_any_number_of_devices(workdir, count):
  with store.open_checkpoints(workdir, keep=2) as manager:
    state, about = store.restore(manager, 60, abstract(make_state(), count))
  assert {'step': 60, 'best': 20, 'metrics': None}.items() <= about.items()
  assert_is(state, 60)
  devices = state.params['conv']['kernel'].sharding.device_set
  assert devices == set(jax.devices()[:count])


def test_nothing_is_compiled_to_write_what_all_devices_have(tmp_path):
  state = make_state(10)  # Which four devices could divide.
  places = jax.tree.map(lambda x: x.sharding, abstract(state, 4))
  shared = jax.device_put(state, places)
  assert len(shared.params['conv']['kernel'].sharding.device_set) == 4
  manager = store.open_checkpoints(tmp_path, keep=2)
  with manager, runtime.count_compilations() as compiled:
    store.save(manager, shared, {})
  assert compiled == []
  variables, _ = stored.variables_of(tmp_path, 'latest', ABSTRACT.variables())
  assert_is(state.replace(**variables), 10)


def test_another_network_or_optimizer_is_no_damage(workdir):
  adam = optax.adam(0.1).init(make_state().params)
  for wanted, why in (
    (make_state(width=5), r'conv/kernel: \(2, 2000\) there, \(2, 5\)'),
    (make_state().replace(opt_state=adam), 'another optimizer or version'),
  ):
    with store.open_checkpoints(workdir, keep=2) as manager:
      refused(why, store.restore_newest, workdir, manager, abstract(wanted))
      assert sorted(manager.all_steps()) == [20, 50, 60]


def test_folders_from_which_no_network_can_be_loaded(workdir):
  refused('60 of .* has no config', store.load_checkpoint, workdir)
  (workdir / 'new/checkpoints').mkdir(parents=True)
  refused('no checkpoint in', store.load_checkpoint, workdir / 'new')
  (workdir / 'new/checkpoints/1').mkdir()
  refused('only one: train again, in', store.load_checkpoint, workdir / 'new')
  said = r"there is no.*rj\.load_pretrained\('"
  refused(said, store.load_checkpoint, workdir / 'none')


def test_other_classes_are_told_from_the_same():
  store.check_classes({'classes': ['a', 'b']}, ('a', 'b'))
  store.check_classes({}, ('a', 'b'))  # Written before they were kept.
  there, now = {'classes': ['a', 'b']}, ('a', 'b', 'c')
  refused(r'classes \(new: c\)', store.check_classes, there, now)


WRITE = """import sys
from checkpoints.stored import write
write(sys.argv[1], 20, 30, 40, keep=1)"""


def test_killed_while_an_old_checkpoint_is_deleted(tmp_path):
  """No part of it is taken for a checkpoint, and none stays."""
  stored.write(tmp_path, 10, keep=1)
  folder = tmp_path / 'checkpoints'
  kill_while_emptied(folder / '10' / 'model', '-c', WRITE, tmp_path)
  assert not (folder / '10').exists()
  for step in store.steps_in(folder):
    stored.variables_of(tmp_path, step, ABSTRACT.variables())
  with store.open_checkpoints(tmp_path, keep=1):
    assert all(name.isdigit() for name in os.listdir(folder))


def opened_store(workdir):
  changes = {'train.keep_checkpoints': 2, 'train.total_steps': 30}
  config = small_config(**changes)
  return store.Store(workdir, config, ADE20K, {})


def test_the_first_checkpoint_is_read_back_before_the_second(tmp_path):
  with opened_store(tmp_path) as kept:
    stored.save_steps(kept, 10)
    kept._manager.finish()
    stored.flip(stored.largest(tmp_path / 'checkpoints/10'))
    refused(r'/10 is damaged .* after it was wri', stored.save_steps, kept, 20)


def test_the_last_checkpoint_is_read_back_before_the_end(tmp_path):
  with opened_store(tmp_path) as kept:
    stored.save_steps(kept, 10, 20, 30)
    kept._manager.finish()
    stored.flip(stored.largest(tmp_path / 'checkpoints/30'))
    refused(r'/30 is damaged .* resumes from the', kept.finish)
  # The remedy.
  with opened_store(tmp_path) as kept:
    assert kept.resume(ABSTRACT).step == 20
    stored.save_steps(kept, 30)
    kept.finish()
  assert store.steps_in(tmp_path / 'checkpoints')[-1] == 30
  # A kill may come before an interrupted state is removed.
  store.save_interrupted(tmp_path, make_state(25), {'step': 25})
  with opened_store(tmp_path) as kept:
    assert kept.resume(ABSTRACT).step == 30
  assert not store.interrupted_dir(tmp_path).exists()


@pytest.mark.parametrize('wrong', ['"x"', '[1]', '['])
def test_damaged_description_of_a_step_leaves_the_others(tmp_path, wrong):
  with opened_store(tmp_path) as kept:
    stored.save_steps(kept, 10, 20)
    kept.finish()
  path = tmp_path / 'checkpoints/20/_CHECKPOINT_METADATA'
  text, key = path.read_text(), '"custom_metadata": '
  assert f'{key}{{}}' in text
  path.write_text(text.replace(f'{key}{{}}', f'{key}{wrong}'))
  with opened_store(tmp_path) as kept:
    assert kept.resume(ABSTRACT).step in (10, 20)
    stored.save_steps(kept, 30)
    kept.finish()
  assert store.steps_in(tmp_path / 'checkpoints')[-1] == 30
