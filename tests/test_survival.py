"""Trainings that are killed, hang and run into full disks, as processes."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import kills
import pytest
from trouble import small_disk

from resnest_jax.checkpoints import store
from resnest_jax.config import load_config
from resnest_jax.data.datasets import open_data
from resnest_jax.data.sampling import make_sampler

pytestmark = pytest.mark.long


def run(arguments):
  """Runs the command to its end; returns what it prints."""
  process = kills.run(arguments)
  assert process.returncode == 0, process.stderr
  return process.stdout


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Next to a run that nothing disturbed, and that filled the compile cache."""
  folder = tmp_path_factory.mktemp('kills') / 'data'
  kills.make_data(folder)
  run(kills.command(folder, folder.parent / 'undisturbed'))
  return folder


# `tests/kills.py` draws these; here are those that differ most.
KILLS = (
  kills.Kill('compile', signal.SIGTERM, 1.0),
  kills.Kill('save', signal.SIGKILL, 0.005),
  kills.Kill('step', signal.SIGUSR1, 0.05),
  kills.Kill('evaluation', signal.SIGTERM, 0.2),
  kills.Kill('end', signal.SIGINT, 0.3),
)


# Nothing is learnt: it ends at step 9, when two evaluations are no better.
EARLY = {'train.early_stop': 2, 'train.eval_steps': 3, 'model.frozen_bn': 'all'}
EARLY |= {'optimizer.learning_rate': 1e-30, 'optimizer.min_learning_rate': 0.0}
EARLY_KILLS = (
  kills.Kill('evaluation', signal.SIGKILL, 0.0),
  kills.Kill('save', signal.SIGKILL, 0.005),
  kills.Kill('step', signal.SIGTERM, 0.1),
)


@pytest.mark.parametrize(
  ('keys', 'moments', 'first', 'steps'),
  [({}, KILLS, [75, -9], 12), (EARLY, EARLY_KILLS, [-9, -9], 9)],
)
def test_killed_again_and_again_it_ends_with_the_same_bits(
  keys, moments, first, steps, data, tmp_path
):
  workdir, ends, undisturbed = tmp_path / 'run', [], data.parent / 'undisturbed'
  if keys:
    keys = keys | {'pretrained': undisturbed}
    undisturbed = tmp_path / 'undisturbed'
    run(kills.command(data, undisturbed, **keys))
  arguments = kills.command(data, workdir, **keys)
  for kill in moments:
    # Without the cache it compiles for long enough.
    cached = 'false' if kill.moment == 'compile' else 'true'
    status, seconds, printed = kills.run_and_kill(
      arguments, workdir, kill, JAX_ENABLE_COMPILATION_CACHE=cached
    )
    ends.append(status)
    if kill.moment == 'compile':
      assert 'no step was finished' in printed
      assert 'compiled in' not in printed
      assert not store.has_checkpoint(workdir)
    assert status in (kills.STATUS[kill.signal], 0), printed
    assert re.findall('Traceback|nothing to do', printed) == []
    if status > 0:
      assert f'stopped by {kill.signal.name}' in printed
      assert re.search('the same command resumes|steps are|stopped at', printed)
      assert seconds < 60
  assert ends[:2] == first
  assert ends.count(0) <= 1
  run(arguments)
  assert store.steps_in(workdir / 'checkpoints')[-1] == steps
  assert kills.differences(workdir, undisturbed) == []


def test_hung_read_full_disk_and_damage_one_after_the_other(data, tmp_path):
  hanging = shutil.copytree(data, tmp_path / 'data')
  own = {'data.data_dir': str(hanging)}
  config = load_config('configs/folder.py:mini', own)
  split = open_data(config.data, 'train')
  sampler = make_sampler('uniform', len(split), config.seed)
  # No step before the third reads this one.
  image = Path(split.pairs[sampler(2 * 4)].image)
  image.unlink()
  os.mkfifo(image)
  with small_disk(tmp_path / 'disk', '16m') as disk:
    workdir = disk.folder / 'run'
    command = kills.command(hanging, workdir)
    # Taken for a file: one whose disk no longer answers.
    hang = 'import stat, train; from resnest_jax.errors import run; '
    hang += 'stat.S_ISREG = lambda x: not stat.S_ISDIR(x); run(train.main)'
    process = kills.run(['-c', hang, *command[1:], '--config.data.timeout=2'])
    assert process.returncode == 1
    warning, error = process.stderr.splitlines()[-2:]
    assert f'no batch for 0 s: {image} with' in warning
    told = rf'error: no batch for 2 s \(config.data.timeout\): .*{image} with '
    assert re.match(rf'{told}.* step 2 of {kills.STEPS} is saved', error)

    arguments, printed = kills.command(data, workdir), ''
    checkpoints = workdir / 'checkpoints'
    with kills.start(arguments) as process:
      for line in process.stdout:
        printed += line
        if line.startswith('step 6/'):  # Which is evaluated now.
          break
      while process.poll() is None and not (checkpoints / '4').exists():
        time.sleep(0.01)
      disk.fill(process.pid)
      printed += process.stdout.read()
    disk.free(os.getpid())
    assert process.returncode == 1
    assert f'resuming after step 2 of {kills.STEPS}' in printed
    assert printed.count('error: ') == 1
    told = f'error: {workdir}.* cannot be written: {disk.refusal}. '
    assert re.match(told, printed.splitlines()[-1])

    # Full before the checkpoint of step 6, if this process was quick.
    before, newest = [2, *store.steps_in(checkpoints)][-2:]
    for path in (checkpoints / str(newest) / 'model').rglob('d/*'):
      changed = bytearray(path.read_bytes())
      changed[len(changed) // 2] ^= 1
      path.write_bytes(changed)
    printed = run(arguments)
    assert f'{checkpoints}/{newest} is damaged' in printed
    assert f'resuming after step {before} of' in printed
    assert (workdir / f'damaged_checkpoints/{newest}/model').is_dir()
    assert kills.differences(workdir, data.parent / 'undisturbed') == []
