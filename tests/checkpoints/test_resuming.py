"""Damaged checkpoints, states of stopped runs, disks that refuse."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import kills
import numpy as np
import optax
import pytest
from checkpoints.stored import variables_of
from trouble import obey_permissions, small_disk

from resnest_jax.checkpoints import store
from resnest_jax.checkpoints.state import Run, TrainState
from resnest_jax.config import load_config
from resnest_jax.data.datasets import open_splits
from resnest_jax.errors import DamagedCheckpoint, UserError
from resnest_jax.training.logs import RunLog
from resnest_jax.training.loop import other_data
from resnest_jax.training.workdir import CLASS_COUNTS

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
ABOUT = {'best': {'step': 10, 'mIoU': 0.5}, 'classes': ['a', 'b']}


def make_state(step, size=2000):
  """Of noise, which no compression makes smaller."""
  rng = np.random.default_rng(step)
  params = {'conv': {'kernel': jnp.asarray(rng.random((2, size)), jnp.float32)}}
  return TrainState(
    step=jnp.asarray(step, jnp.int32),
    params=params,
    batch_stats={'bn': {'mean': jnp.full(3, 2.0 * step)}},
    opt_state=OPTIMIZER.init(params),
  )


ABSTRACT = jax.tree.map(
  lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
  make_state(0),
)


def write(workdir, *steps):
  with store.open_checkpoints(workdir, keep=3) as manager:
    for step in steps:
      store.save(manager, make_state(step), ABOUT | {'step': step})


def resume(workdir):
  with store.open_checkpoints(workdir, keep=3) as manager:
    state, about = store.restore_newest(workdir, manager, ABSTRACT)
    return state, about, sorted(manager.all_steps())


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_is(state, step):
  assert_same(state, make_state(step))


@contextlib.contextmanager
def full(disk):
  disk.fill(os.getpid())
  try:
    yield
  finally:
    disk.free(os.getpid())


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp('written')
  write(folder, 10, 20, 30)
  return folder


@pytest.fixture
def workdir(written, tmp_path):
  subprocess.run(['cp', '-r', written, tmp_path / 'run'], check=True)
  return tmp_path / 'run'


def write_much(log):
  for step in range(11, 1000):  # Until the last page is full.
    log.write(step, {'loss': 0.5})


def save_and_check(manager):
  store.save(manager, make_state(20), ABOUT)
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline:
    manager.check()
    time.sleep(0.01)


def largest(workdir, step):
  """The file with the values of the arrays."""
  files = (workdir / 'checkpoints' / str(step)).rglob('d/*')
  return max(files, key=os.path.getsize)


def description(workdir, step):
  return workdir / 'checkpoints' / str(step) / 'about' / 'metadata'


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def cut(path):
  os.truncate(path, path.stat().st_size // 2)


def zero(path):
  path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize('which', [largest, description])
@pytest.mark.parametrize('damage', [flip, cut, zero, Path.unlink])
def test_the_checkpoint_before_a_damaged_one_is_used(
  workdir, which, damage, capsys
):
  damage(which(workdir, 30))
  state, about, steps = resume(workdir)
  assert_is(state, 20)
  assert (about['step'], about['best']) == (20, ABOUT['best'])
  assert steps == [10, 20]
  out = capsys.readouterr().out
  assert f'checkpoint {workdir}/checkpoints/30 is damaged' in out
  assert f'Moved to {workdir}/damaged_checkpoints/30' in out
  assert (workdir / 'damaged_checkpoints' / '30' / 'model').is_dir()
  write(workdir, 30)  # Its place is free.
  assert_is(resume(workdir)[0], 30)


def test_any_changed_byte_is_noticed_or_changes_nothing(workdir):
  newest = workdir / 'checkpoints' / '30'
  rng, noticed = random.Random(0), 0
  paths = sorted(path for path in newest.rglob('*') if path.is_file())
  for path in paths:
    content = path.read_bytes()
    changed = bytearray(content)
    if content:
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


def test_two_damaged_ones_and_one_of_that_name_before(workdir):
  for step in (20, 30):
    zero(largest(workdir, step))
  (workdir / 'damaged_checkpoints' / '30').mkdir(parents=True)
  assert_is(resume(workdir)[0], 10)
  moved = {path.name for path in (workdir / 'damaged_checkpoints').iterdir()}
  assert moved == {'20', '30', '30-2'}


def test_nothing_is_moved_if_all_are_damaged(workdir):
  for step in (10, 20, 30):
    cut(largest(workdir, step))
  with pytest.raises(UserError, match=r'all 3 .*damaged; .*/30 is damaged'):
    resume(workdir)
  assert store.steps_in(workdir / 'checkpoints') == [10, 20, 30]


def test_evaluation_does_not_take_another_than_was_meant(workdir):
  flip(largest(workdir, 30))
  wanted = ABSTRACT.variables()
  with pytest.raises(DamagedCheckpoint, match=r'/30 is .*--checkpoint STEP'):
    variables_of(workdir, 'latest', wanted)
  variables, step = variables_of(workdir, '20', wanted)
  assert_same(variables, make_state(step).variables())
  assert step == 20
  assert store.steps_in(workdir / 'checkpoints') == [10, 20, 30]


def test_the_best_is_found_and_kept_beside_a_damaged_description(tmp_path):
  with store.open_checkpoints(tmp_path, keep=1) as manager:
    for step, score in ((10, 0.5), (20, 0.7), (30, 0.7), (40, 0.6)):
      store.save(manager, make_state(step), ABOUT, {'mIoU': score})
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
  assert about['unread'] == [2]
  assert steps == [10, 20, 30]  # None of them gave way.
  write(workdir, 37)
  assert 'unread' not in resume(workdir)[1]
  store.drop_superseded(workdir, 2)
  assert store.steps_in(folder) == [37]
  store.drop_superseded(workdir)
  assert not folder.exists()


def test_damaged_state_of_a_stopped_run(workdir):
  store.save_interrupted(workdir, make_state(33), ABOUT)
  flip(max(store.interrupted_dir(workdir).rglob('d/*'), key=os.path.getsize))
  assert_is(resume(workdir)[0], 30)
  assert (workdir / 'damaged_checkpoints' / '33').is_dir()


def test_a_full_disk_stops_with_an_error_and_keeps_the_checkpoint(tmp_path):
  with small_disk(tmp_path / 'disk', '2m') as disk:
    write(disk.folder, 10)
    log = RunLog(disk.folder, 10)
    with full(disk):
      with pytest.raises(UserError, match=f'checkpoints.*{disk.refusal}.*Free'):
        write(disk.folder, 20)
      with pytest.raises(UserError, match=f'interrupted.*{disk.refusal}'):
        store.save_interrupted(disk.folder, make_state(20), ABOUT)
      with pytest.raises(UserError, match=f'(log|tensorb).*{disk.refusal}'):
        write_much(log)
      log.close()
    assert_is(resume(disk.folder)[0], 10)
    write(disk.folder, 20)  # What was half written is not in the way.
    assert_is(resume(disk.folder)[0], 20)


def test_a_checkpoint_that_fails_in_the_background_is_noticed(tmp_path):
  with small_disk(tmp_path / 'disk', '2m') as disk:
    write(disk.folder, 10)
    with full(disk):
      manager = store.open_checkpoints(disk.folder, keep=1)
      with pytest.raises(UserError, match=disk.refusal):
        save_and_check(manager)
      manager.close()  # Says nothing that was not said.
    assert_is(resume(disk.folder)[0], 10)


REFUSED = """
import sys
from pathlib import Path
from checkpoints import test_resuming as here
from resnest_jax.errors import run
workdir = Path(sys.argv[1])
(workdir / 'checkpoints').chmod(0o555)
run(lambda: here.write(workdir, 40))
"""

MANY_WRITES = """
import sys
from pathlib import Path
import jax.numpy as jnp
from checkpoints import test_resuming as here
from resnest_jax import runtime
from resnest_jax.errors import run
from resnest_jax.checkpoints import store
runtime.set_up()
noise = jnp.asarray(here.np.random.default_rng(0).random((100, 1000)))
params = {f'kernel{i}': noise + i for i in range(20)}
state = here.make_state(10).replace(params=params)

def main():
  with store.open_checkpoints(Path(sys.argv[1])) as manager:
    store.save(manager, state, here.ABOUT)
    manager.finish()

run(main)
"""


def run_python(root, program, workdir, **options):
  """Runs a program that may import the tests' modules, to status 1."""
  environment = os.environ | {'PYTHONPATH': f'{root}:{root / "tests"}'}
  process = subprocess.run(
    [sys.executable, '-c', program, str(workdir)],
    env=environment,
    capture_output=True,
    text=True,
    **options,
  )
  assert process.returncode == 1
  return process.stderr.splitlines()


def test_of_many_failing_writes_one_line_tells(root, tmp_path):
  with small_disk(tmp_path / 'disk', '4m') as disk, full(disk):
    (line,) = run_python(root, MANY_WRITES, disk.folder)
  assert line.startswith(f'error: {disk.folder}/checkpoints cannot be')
  assert disk.refusal in line


def test_a_right_to_write_that_is_lost(root, workdir):
  said = run_python(root, REFUSED, workdir, preexec_fn=obey_permissions)[-1]
  (workdir / 'checkpoints').chmod(0o755)
  assert said.startswith(f'error: {workdir}/checkpoints')
  assert 'Permission denied. Give this process the right to write' in said
  assert_is(resume(workdir)[0], 30)


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
  """Data, and a run of one checkpoint on it."""
  folder = tmp_path_factory.mktemp('begun')
  kills.make_data(folder / 'data')
  with store_of(folder / 'run', folder / 'data') as opened:
    opened.save(Run(make_state(10), step=10), None)
    opened.finish()
  return folder


def store_of(workdir, data, known=True):
  values = {'data.data_dir': str(data)}
  config = load_config('configs/folder.py:mini', values)
  splits = open_splits(config)
  facts = splits.facts() if known else {}
  return store.Store(workdir, config, splits.train.labels, facts)


def remove_sample(data):
  (data / 'images/train/3.png').unlink()
  (data / 'masks/train/3.png').unlink()


def add_sample(data):
  for kind in ('images', 'masks'):
    shutil.copy(data / kind / 'val/3.png', data / kind / 'val/33.png')


def rename_sample(data):
  for kind in ('images', 'masks'):
    (data / kind / 'train/3.png').rename(data / kind / 'train/99.png')


def redraw_mask(data):
  cv2.imwrite(f'{data}/masks/train/3.png', np.eye(48, dtype=np.uint8))


def change_colour(data):
  text = (data / 'classes.txt').read_text()
  (data / 'classes.txt').write_text(text.replace('255 0 0', '250 0 0'))


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (
      remove_sample,
      ['images in the training split: 16 before, 15 ', 'names'],
    ),
    (add_sample, ['images in the evaluation split: 6 before, 7 now', 'names']),
    (rename_sample, ['names and sizes of the files of the training split: ']),
    (redraw_mask, ['names and sizes of the files of the training split: ']),
    (change_colour, []),
    (lambda data: None, []),
  ],
)
def test_resuming_says_what_has_changed_in_the_data(
  begun, tmp_path, change, said
):
  data = shutil.copytree(begun / 'data', tmp_path / 'elsewhere')
  change(data)
  with store_of(begun / 'run', data) as opened:
    assert opened.resume(ABSTRACT).step == 10
  assert len(opened.changes) == len(said)
  for line, expected in zip(opened.changes, said, strict=True):
    assert line.startswith(expected)
  (tmp_path / CLASS_COUNTS).touch()
  notes = other_data(opened.changes, tmp_path)
  assert len(notes) == bool(said)
  trained = any('training' in line for line in said)
  assert (tmp_path / CLASS_COUNTS).exists() != trained
  assert any('no longer the run' in note for note in notes) == trained


@pytest.mark.parametrize(
  ('classes', 'message'),
  [
    ('0: sky\n2: wall\n1: road\n', r"\['wall', \[1\]\] before, .* \[2\]\] now"),
    ('sky\nwall\nroad\nignore: 7\n', None),
    ('0: sky\n1, 9: wall\n2: road\n', r"'wall', \[1, 9\]\] now"),
    ('sky\nroad\nwall\n', r'other classes \(wall there, road now\)'),
  ],
)
def test_other_mask_values_are_refused(begun, tmp_path, classes, message):
  data = shutil.copytree(begun / 'data', tmp_path / 'elsewhere')
  (data / 'classes.txt').write_text(classes)
  refused = contextlib.nullcontext()
  if message:
    refused = pytest.raises(UserError, match=message)
  with store_of(begun / 'run', data) as opened, refused:
    opened.resume(ABSTRACT)
  # Where they are restored it resumes.
  shutil.copy(begun / 'data' / 'classes.txt', data)
  with store_of(begun / 'run', data) as opened:
    assert opened.resume(ABSTRACT).step == 10


def test_checkpoint_of_an_earlier_version_knows_no_data(begun, tmp_path):
  with store_of(tmp_path, begun / 'data', known=False) as opened:
    opened.save(Run(make_state(10), step=10), None)
    opened.finish()
  with store_of(tmp_path, begun / 'data') as opened:
    assert opened.resume(ABSTRACT).step == 10
  assert opened.changes == []
