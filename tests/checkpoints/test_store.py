"""Checkpoints: what stays, where they go back to, what is refused."""

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints.stored import variables_of
from small import small_config

from resnest_jax import runtime
from resnest_jax.checkpoints import manager as manager_module
from resnest_jax.checkpoints import store
from resnest_jax.checkpoints.state import Run, TrainState
from resnest_jax.errors import NotWrittenInTime, UserError
from resnest_jax.labels import ADE20K
from resnest_jax.sharding import make_mesh, replicated

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def make_state(step=0, width=3):
  params = {'conv': {'kernel': jnp.full((2, width), 1.0 + step)}}
  return TrainState(
    step=jnp.asarray(step, jnp.int32),
    params=params,
    batch_stats={'bn': {'mean': jnp.full(width, 2.0 * step)}},
    opt_state=OPTIMIZER.init(params),
  )


def abstract(state, devices):
  mesh = make_mesh(devices=devices)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
    state,
  )


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
  with store.open_checkpoints(tmp_path) as manager:
    manager.finish()
    # An hour further whenever it is read, for a while.
    monkeypatch.setattr(
      time, 'time', lambda: clock() + 3600 * min(next(jumps), 100)
    )
    store.save(manager, make_state(7), {})
    manager.finish()
    assert next(jumps) > 10
    state, _ = store.restore(manager, 7, abstract(make_state(), jax.devices()))
  assert int(state.step) == 7


def test_write_that_does_not_end_is_told_and_not_waited_for(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(manager_module, 'PATIENCE', 0.5)
  release = threading.Event()
  manager = store.open_checkpoints(tmp_path)
  monkeypatch.setattr(os, 'rename', lambda *_: release.wait(60))
  monkeypatch.setattr(type(tmp_path), 'rename', lambda *_: release.wait(60))
  store.save(manager, make_state(7), {})
  begun = time.monotonic()
  with pytest.raises(
    NotWrittenInTime, match=r'not written in time: .* resumes'
  ):
    manager.finish()
  manager.close()
  assert time.monotonic() - begun < 10
  release.set()


def test_the_newest_and_the_best_stay(workdir):
  with store.open_checkpoints(workdir, read_only=True) as manager:
    assert sorted(manager.all_steps()) == [20, 50, 60]
    assert store.find_step(manager, 'latest') == 60
    assert store.find_step(manager, 'best') == 20
    assert store.find_step(manager, '50') == 50
    with pytest.raises(UserError, match=r"'30'.*20, 50, 60"):
      store.find_step(manager, '30')


# A glob, a C++ separator, an address, and bytes that are no text: Orbax merges
# nothing there, or reads another folder.
@pytest.mark.parametrize(
  'name', [b'[a] b', b'a\\b', b'gs:', b'stra\xdfe', b'a*?\n', b'[', b'\xe8']
)
def test_folders_of_any_name(tmp_path, name):
  workdir = tmp_path / os.fsdecode(name) / 'run'
  state, aside = make_state(7), make_state(9)
  with store.open_checkpoints(workdir) as manager:
    store.save(manager, state, {'step': 7})
    manager.finish()
  store.save_interrupted(workdir, aside, {'step': 9})
  with store.open_checkpoints(workdir) as manager:
    assert manager.folder == workdir / 'checkpoints'
    here = abstract(state, jax.devices()[:1])
    newest, _ = store.restore_newest(workdir, manager, here)
    assert int(newest.step) == 9
    shutil.rmtree(workdir / 'interrupted')
    newest, _ = store.restore_newest(workdir, manager, here)
    jax.tree.map(np.testing.assert_array_equal, newest, state)
    with pytest.raises(UserError, match='no checkpoint 8'):
      store.find_step(manager, 8)
  assert [x.name for x in (workdir / 'checkpoints').iterdir()] == ['7']


@pytest.mark.parametrize('count', [1, 4])
def test_restores_onto_any_number_of_devices(workdir, count):
  devices = jax.devices()[:count]
  with store.open_checkpoints(workdir, keep=2) as manager:
    state, about = store.restore(manager, 60, abstract(make_state(), devices))
  expected = {'step': 60, 'best': 20, 'metrics': None}
  assert expected.items() <= about.items()
  expected = make_state(60)
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  assert state.params['conv']['kernel'].sharding.device_set == set(devices)
  assert jax.tree.structure(state) == jax.tree.structure(expected)


def test_nothing_is_compiled_to_write_what_all_devices_have(tmp_path):
  state = make_state(10, width=8)  # Which four devices could divide.
  on_four = abstract(state, jax.devices()[:4])
  shared = jax.device_put(state, jax.tree.map(lambda x: x.sharding, on_four))
  assert len(shared.params['conv']['kernel'].sharding.device_set) == 4
  with (
    store.open_checkpoints(tmp_path, keep=2) as manager,
    runtime.count_compilations() as compiled,
  ):
    store.save(manager, shared, {})
  assert compiled == []
  wanted = abstract(state, jax.devices()[:1]).variables()
  variables, _ = variables_of(tmp_path, 'latest', wanted)
  assert (variables['params']['conv']['kernel'] == 11).all()


def test_another_network_is_refused(workdir):
  wanted = abstract(make_state(width=5), jax.devices()[:1])
  with (
    store.open_checkpoints(workdir, keep=2) as manager,
    pytest.raises(UserError, match=r'conv/kernel: \(2, 3\) there, \(2, 5\)'),
  ):
    store.restore(manager, 60, wanted)


def test_another_optimizer_is_no_damage(workdir):
  state = make_state()
  other = state.replace(opt_state=optax.adam(0.1).init(state.params))
  wanted = abstract(other, jax.devices()[:1])
  with store.open_checkpoints(workdir, keep=2) as manager:
    with pytest.raises(UserError, match='another optimizer or version'):
      store.restore_newest(workdir, manager, wanted)
    assert sorted(manager.all_steps()) == [20, 50, 60]


def test_no_checkpoint(tmp_path):
  with pytest.raises(UserError, match=r"holds no run.*rj\.load_pretrained\('"):
    store.load_checkpoint(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(UserError, match='no checkpoint in'):
    store.load_checkpoint(tmp_path)


def test_checkpoint_that_does_not_know_its_network(workdir):
  with pytest.raises(UserError, match='60 has no configuration'):
    store.load_checkpoint(workdir)


def test_other_classes_are_told_from_the_same():
  store.check_classes({'classes': ['a', 'b']}, ('a', 'b'))
  store.check_classes({}, ('a', 'b'))  # Written before they were kept.
  with pytest.raises(UserError, match=r'\(None there, c now\)'):
    store.check_classes({'classes': ['a', 'b']}, ('a', 'b', 'c'))


SAVE = """
import sys
from pathlib import Path
from checkpoints.test_store import make_state
from resnest_jax.checkpoints import store
with store.open_checkpoints(Path(sys.argv[1]), keep=1) as manager:
  for step in (20, 30, 40):
    store.save(manager, make_state(step), {'step': step})
"""


def test_killed_while_an_old_checkpoint_is_deleted(tmp_path, root):
  """No part of it is taken for a checkpoint, and none stays."""
  with store.open_checkpoints(tmp_path, keep=1) as manager:
    store.save(manager, make_state(10), {'step': 10})
  folder = tmp_path / 'checkpoints'
  # So many files take a while.
  names = [folder / '10' / 'model' / f'{i:05}' for i in range(20_000)]
  for name in names:
    name.touch()
  command = [sys.executable, '-c', SAVE, str(tmp_path)]
  environment = os.environ | {'PYTHONPATH': str(root / 'tests')}
  with subprocess.Popen(command, cwd=root, env=environment) as process:
    while names[0].exists() and names[-1].exists():
      assert process.poll() is None
      time.sleep(0.0005)
    process.kill()
  assert not (folder / '10').exists()
  for step in store.steps_in(folder):
    wanted = abstract(make_state(), jax.devices()[:1]).variables()
    variables_of(tmp_path, step, wanted)
  with store.open_checkpoints(tmp_path, keep=1):
    left = {x.name for x in folder.iterdir()}
  assert all(name.isdigit() for name in left)


def opened_store(workdir):
  config = small_config(**{'train.keep_checkpoints': 2})
  return store.Store(workdir, config, ADE20K, {})


def spoil(workdir, step):
  for path in (workdir / 'checkpoints' / str(step)).rglob('d/*'):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_written_is_read_back(tmp_path):
  """The first checkpoint before the second, the last before the end."""
  run = Run(make_state(10), step=10)
  with opened_store(tmp_path / 'a') as kept:
    kept.save(run, None)
    run.saved_step = 10
    kept._manager.finish()
    spoil(tmp_path / 'a', 10)
    run.state, run.step = make_state(20), 20
    with pytest.raises(UserError, match=r'/10 is damaged .* after it was wri'):
      kept.save(run, None)
  with opened_store(tmp_path / 'b') as kept:
    for step in (10, 20, 30):
      run = Run(make_state(step), step=step, saved_step=step - 10)
      kept.save(run, None)
    kept._manager.finish()
    spoil(tmp_path / 'b', 30)
    with pytest.raises(UserError, match=r'/30 is damaged .* resumes from the'):
      kept.finish()
  # The remedy.
  state = make_state()
  with opened_store(tmp_path / 'b') as kept:
    run = kept.resume(abstract(state, jax.devices()[:1]))
    assert run.step == 20
    kept.save(Run(make_state(30), step=30, saved_step=20), None)
    kept.finish()
  assert store.steps_in(tmp_path / 'b' / 'checkpoints')[-1] == 30


@pytest.mark.parametrize('wrong', ['"x"', '[1]', '['])
def test_damaged_description_of_a_step_leaves_the_others(tmp_path, wrong):
  state = make_state()
  with opened_store(tmp_path) as kept:
    for step in (10, 20):
      run = Run(make_state(step), step=step, saved_step=step - 10)
      kept.save(run, None)
    kept.finish()
  path = tmp_path / 'checkpoints' / '20' / '_CHECKPOINT_METADATA'
  text = path.read_text()
  path.write_text(
    text.replace('"custom_metadata": {}', f'"custom_metadata": {wrong}')
  )
  assert path.read_text() != text
  with opened_store(tmp_path) as kept:
    run = kept.resume(abstract(state, jax.devices()[:1]))
    assert run.step in (10, 20)
    kept.save(Run(make_state(30), step=30, saved_step=run.step), None)
    kept.finish()
  assert store.steps_in(tmp_path / 'checkpoints')[-1] == 30
