"""Damaged checkpoints, states of stopped runs, disks that refuse."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import kills
import pytest
from checkpoints import stored
from checkpoints.stored import ABOUT, ABSTRACT, assert_is, make_state, write
from hosts import finish, start
from trouble import obeying_permissions, small_disk
from weights.built import refused

from resnest_jax.checkpoints import store
from resnest_jax.config import load_config
from resnest_jax.config_keys import MAIN_SCORES
from resnest_jax.data.datasets import open_splits
from resnest_jax.errors import DamagedCheckpoint, UserError
from resnest_jax.training.logs import RunLog
from resnest_jax.training.loop import other_data
from resnest_jax.training.workdir import CLASS_COUNTS


def resume(workdir):
  with store.open_checkpoints(workdir, keep=3) as manager:
    state, about = store.restore_newest(workdir, manager, ABSTRACT)
    return state, about, sorted(manager.all_steps())


def full(disk):
  disk.fill(os.getpid())
  until = contextlib.ExitStack()
  until.callback(disk.free, os.getpid())
  return until


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp('written')
  write(folder, 10, 20, 30)
  return folder


@pytest.fixture
def workdir(written, tmp_path):
  return shutil.copytree(written, tmp_path / 'run')


def arrays(workdir, step):
  return stored.largest(workdir / 'checkpoints' / str(step))


def description(workdir, step):
  return workdir / 'checkpoints' / str(step) / 'about' / 'metadata'


def cut(path):
  os.truncate(path, path.stat().st_size // 2)


def zero(path):
  path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize('which', [arrays, description])
@pytest.mark.parametrize('damage', [stored.flip, cut, zero, Path.unlink])
def test_the_one_before_a_damaged_one_is_used(workdir, which, damage, capsys):
  damage(which(workdir, 30))
  state, about, steps = resume(workdir)
  assert_is(state, 20)
  assert (about, steps) == (about | ABOUT | {'step': 20}, [10, 20])
  out = capsys.readouterr().out
  assert f'checkpoint {workdir}/checkpoints/30 is damaged' in out
  assert f'Moved to {workdir}/damaged_checkpoints/30' in out
  assert (workdir / 'damaged_checkpoints/30/model').is_dir()
  write(workdir, 30)  # Its place is free.
  assert_is(resume(workdir)[0], 30)


def test_any_changed_byte_is_noticed_or_changes_nothing(workdir):
  rng, noticed = random.Random(0), 0
  files = [x for x in (workdir / 'checkpoints/30').rglob('*') if x.is_file()]
  paths = [path for path in sorted(files) if path.stat().st_size]
  for path in paths:
    content = path.read_bytes()
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    with store.open_checkpoints(workdir, read_only=True) as manager:
      try:
        state, about = store.restore(manager, 30, ABSTRACT)
      except DamagedCheckpoint:
        noticed += 1
      else:
        assert_is(state, 30)
        assert about['best'] == ABOUT['best']
    path.write_bytes(content)
  assert 3 <= noticed < len(paths)
  assert_is(resume(workdir)[0], 30)


def test_all_damaged_ones_are_moved_and_replace_none_of_that_name(workdir):
  store.save_interrupted(workdir, make_state(33), ABOUT)
  stored.flip(stored.largest(store.interrupted_dir(workdir)))
  for step in (20, 30):
    zero(arrays(workdir, step))
  (workdir / 'damaged_checkpoints' / '30').mkdir(parents=True)
  assert_is(resume(workdir)[0], 10)
  moved = os.listdir(workdir / 'damaged_checkpoints')
  assert sorted(moved) == ['20', '30', '30-2', '33']


def test_nothing_is_moved_if_all_are_damaged(workdir):
  for step in (10, 20, 30):
    cut(arrays(workdir, step))
  refused(r'all 3 .*damaged; .*/30 is damaged', resume, workdir)
  assert store.steps_in(workdir / 'checkpoints') == [10, 20, 30]


def test_evaluation_does_not_take_another_than_was_meant(workdir):
  stored.flip(arrays(workdir, 30))
  wanted = ABSTRACT.variables()
  with pytest.raises(DamagedCheckpoint, match=r'/30 is .*point 10 or 20'):
    stored.variables_of(workdir, 'latest', wanted)
  variables, step = stored.variables_of(workdir, '20', wanted)
  assert_is(make_state(20).replace(**variables), 20)
  assert step == 20
  assert store.steps_in(workdir / 'checkpoints') == [10, 20, 30]


@pytest.mark.parametrize('main', MAIN_SCORES)
def test_the_best_is_found_and_kept_beside_a_damaged_description(
  main, tmp_path
):
  with store.open_checkpoints(tmp_path, keep=1) as manager:
    for step, score in ((10, 0.5), (20, 0.7), (30, 0.7), (40, 0.6)):
      scores = {'top5': 1 - score, main: score}
      store.save(manager, make_state(step), ABOUT, scores)
  assert store.steps_in(tmp_path / 'checkpoints') == [20, 40]
  description(tmp_path, 40).write_text('{')
  with store.open_checkpoints(tmp_path, keep=1) as manager:
    assert store.find_step(manager, 'best') == 20
    store.save(manager, make_state(50), ABOUT)
  assert store.steps_in(tmp_path / 'checkpoints') == [20, 50]


def test_state_of_a_stopped_run_is_used_until_a_checkpoint_is_as_new(workdir):
  store.save_interrupted(workdir, make_state(33), ABOUT | {'unread': [1]})
  store.save_interrupted(workdir, make_state(37), ABOUT | {'unread': [2]})
  folder = store.interrupted_dir(workdir)
  assert store.steps_in(folder) == [37]
  store.drop_superseded(workdir)
  state, about, steps = resume(workdir)
  assert_is(state, 37)
  # None of the checkpoints gave way.
  assert (about['unread'], steps) == ([2], [10, 20, 30])
  write(workdir, 37)
  assert 'unread' not in resume(workdir)[1]
  store.drop_superseded(workdir, 2)
  assert store.steps_in(folder) == [37]
  store.drop_superseded(workdir)
  assert not folder.exists()


def save_and_check(manager):
  store.save(manager, make_state(20), ABOUT)
  for _ in range(6000):
    manager.check()
    time.sleep(0.01)


def test_a_full_disk_stops_with_an_error_and_keeps_the_checkpoint(tmp_path):
  with small_disk(tmp_path / 'disk', '2m') as disk:
    write(disk.folder, 10)
    log = RunLog(disk.folder, 10)
    with full(disk):
      refused(f'checkpoints.*{disk.refusal}.*Free', write, disk.folder, 20)
      given = disk.folder, make_state(20), ABOUT
      refused(f'interrupted.*{disk.refusal}', store.save_interrupted, *given)
      with pytest.raises(UserError, match=f'(log|tensorb).*{disk.refusal}'):
        log.write(11, {'x' * 10**5: 0.5})  # More than the last page has room.
      log.close()
      # Written in the background.
      manager = store.open_checkpoints(disk.folder, keep=1)
      refused(disk.refusal, save_and_check, manager)
      manager.close()  # Says nothing that was not said.
    assert_is(resume(disk.folder)[0], 10)
    write(disk.folder, 20)  # What was half written is not in the way.
    assert_is(resume(disk.folder)[0], 20)


MANY_WRITES = """import sys
from pathlib import Path
from evaluation.runs import write_run
from resnest_jax import runtime
from resnest_jax.errors import run
runtime.set_up()
run(lambda: write_run(Path(sys.argv[1])))"""


def test_of_many_failing_writes_one_line_tells(tmp_path):
  with small_disk(tmp_path / 'disk', '4m') as disk, full(disk):
    _, said = finish(start('-c', MANY_WRITES, disk.folder, devices=1), status=1)
  (line,) = said.splitlines()
  assert line.startswith(f'error: {disk.folder}/checkpoints cannot be')
  assert disk.refusal in line


def test_a_right_to_write_that_is_lost(workdir):
  folder = workdir / 'checkpoints'
  folder.chmod(0o555)
  told = f'^{folder}.*Permission denied. Give this process the right to write'
  with obeying_permissions(), pytest.raises(UserError, match=told):
    write(workdir, 40)
  folder.chmod(0o755)
  assert_is(resume(workdir)[0], 30)


def store_of(workdir, data, known=True):
  config = load_config('configs/folder.py:mini', {'data.data_dir': str(data)})
  splits = open_splits(config)
  facts = splits.facts() if known else {}
  return store.Store(workdir, config, splits.train.labels, facts)


def resume_on(data, run):
  """The changes of data that a resumption of the run finds."""
  with store_of(run, data) as opened:
    assert opened.resume(ABSTRACT).step == 10
  return opened.changes


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
  """Data, and a run of one checkpoint on it; and one that knows no data."""
  folder = tmp_path_factory.mktemp('begun')
  kills.make_data(folder / 'data')
  for name in ('run', 'earlier'):
    with store_of(folder / name, folder / 'data', name == 'run') as opened:
      stored.save_steps(opened, 10)
      opened.finish()
  return folder


@pytest.fixture
def data(begun, tmp_path):
  return shutil.copytree(begun / 'data', tmp_path / 'elsewhere')


FILES = 'names and sizes of the files of the '
TRAINING = f'{FILES}training split have changed'
FEWER = 'images in the training split: 16 before, 15 now'
MORE = 'images in the evaluation split: 6 before, 7 now'
CHANGES = {
  'rm */train/3.png': [FEWER, TRAINING],
  'for x in */val; do cp $x/3.png $x/33.png; done': [MORE, FILES],
  'for x in */train; do mv $x/3.png $x/99.png; done': [TRAINING],
  'echo >> masks/train/3.png': [TRAINING],
  'sed -i "s/255 0 0/250 0 0/" classes.txt': [],
  'true': [],
}


@pytest.mark.parametrize(('command', 'said'), CHANGES.items())
def test_resuming_says_what_changed(begun, data, tmp_path, command, said):
  subprocess.run(command, shell=True, cwd=data, check=True)
  changes = resume_on(data, begun / 'run')
  for line, expected in zip(changes, said, strict=True):
    assert line.startswith(expected)
  (tmp_path / CLASS_COUNTS).touch()
  notes = other_data(changes, tmp_path)
  assert len(notes) == bool(said)
  trained = any('training' in line for line in said)
  assert (tmp_path / CLASS_COUNTS).exists() != trained
  assert any('no longer the run' in note for note in notes) == trained


OTHER_VALUES = {
  '0: sky\n2: wall\n1: road\n': r"\['wall', \[1\]\] before, .* \[2\]\] now",
  '0: sky\n1, 9: wall\n2: road\n': r"'wall', \[1, 9\]\] now",
  'sky\nroad\nwall\n': r'other classes \(wall there, road now\)',
}


@pytest.mark.parametrize(('classes', 'why'), OTHER_VALUES.items())
def test_other_mask_values_are_refused(begun, data, classes, why):
  (data / 'classes.txt').write_text(classes)
  refused(why, resume_on, data, begun / 'run')
  # Where they are restored it resumes, also with other ignored values.
  (data / 'classes.txt').write_text('sky\nwall\nroad\nignore: 7\n')
  assert resume_on(data, begun / 'run') == []


def test_classes_of_another_task_are_told_with_the_head():
  about = {'classes': ['bee'], 'config': {'model': {'head': 'classifier'}}}
  said = r'another --workdir \(it has model\.head=classifier\)'
  refused(said, store.check_classes, about, ['sky'])


def test_checkpoint_of_an_earlier_version_knows_no_data(begun):
  assert resume_on(begun / 'data', begun / 'earlier') == []
