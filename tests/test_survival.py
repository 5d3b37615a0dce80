"""Trainings that are killed, hang and run into full disks, as processes."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import kills
import pytest
from kills import Kill
from trouble import small_disk

from resnest_jax.checkpoints import store
from resnest_jax.config import load_config
from resnest_jax.data.datasets import open_data
from resnest_jax.data.sampling import make_sampler, sampler_seed

pytestmark = pytest.mark.long


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('kills') / 'data'
  kills.make_data(folder)
  return folder


@pytest.fixture(scope='module')
def undisturbed(data):
  """A run that nothing disturbed, which also fills the compile cache."""
  workdir = data.parent / 'undisturbed'
  process = kills.run(kills.command(data, workdir))
  assert process.returncode == 0, process.stderr
  return workdir


# `tests/kills.py` draws these; here are those that differ most.
KILLS = (
  Kill('compile', signal.SIGTERM, 1.0),
  Kill('save', signal.SIGKILL, 0.005),
  Kill('step', signal.SIGUSR1, 0.05),
  Kill('evaluation', signal.SIGTERM, 0.2),
  Kill('end', signal.SIGINT, 0.3),
)


def test_killed_five_times_it_ends_with_the_same_bits(
  data, undisturbed, tmp_path
):
  arguments = kills.command(data, tmp_path / 'run')
  ends = []
  for kill in KILLS:
    # Without the cache it compiles for long enough.
    cached = 'false' if kill.moment == 'compile' else 'true'
    status, seconds, printed = kills.run_and_kill(
      arguments, tmp_path / 'run', kill, JAX_ENABLE_COMPILATION_CACHE=cached
    )
    ends.append(status)
    if kill.moment == 'compile':
      assert 'no step was finished' in printed
      assert 'compiled in' not in printed
      assert not store.has_checkpoint(tmp_path / 'run')
    assert status in (kills.STATUS[kill.signal], 0), printed
    assert 'Traceback' not in printed
    assert 'nothing to do' not in printed
    if status > 0:
      assert f'stopped by {kill.signal.name}' in printed
      assert 'the same command resumes' in printed
      assert seconds < 60
  assert ends[:2] == [75, -9]
  assert len([status for status in ends if status]) >= 4
  last = kills.run(arguments)
  assert last.returncode == 0, last.stderr
  assert kills.differences(tmp_path / 'run', undisturbed) == []


def test_hung_read_full_disk_and_damage_one_after_the_other(
  data, undisturbed, tmp_path
):
  hanging = tmp_path / 'data'
  shutil.copytree(data, hanging)
  own = {'data.data_dir': str(hanging)}
  config = load_config('configs/folder.py:mini', own)
  split = open_data(config.data, 'train')
  sampler = make_sampler('uniform', len(split), sampler_seed(config.seed))
  # No step before the third reads this one.
  image = Path(split.pairs[sampler(2 * 4)].image)
  image.unlink()
  os.mkfifo(image)
  with small_disk(tmp_path / 'disk', '16m') as disk:
    workdir = disk.folder / 'run'
    hung = [*kills.command(hanging, workdir), '--config.data.timeout=2']
    process = kills.run(hung)
    assert process.returncode == 1
    warning, error = process.stderr.splitlines()[-2:]
    assert f'no batch for 0 s: {image} with' in warning
    told = rf'error: no batch for 2 s \(config.data.timeout\): .*{image} with '
    assert re.match(rf'{told}.* step 2 of {kills.STEPS} is saved', error)

    arguments = kills.command(data, workdir)
    checkpoint = workdir / 'checkpoints' / '4'
    printed = ''
    with kills.start(arguments) as process:
      for line in process.stdout:
        printed += line
        if line.startswith('step 6/'):  # Which is evaluated now.
          break
      while process.poll() is None and not checkpoint.exists():
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
    before, newest = [2, *store.steps_in(checkpoint.parent)][-2:]
    for path in (checkpoint.parent / str(newest) / 'model').rglob('d/*'):
      changed = bytearray(path.read_bytes())
      changed[len(changed) // 2] ^= 1
      path.write_bytes(changed)
    process = kills.run(arguments)
    assert process.returncode == 0, process.stderr
    assert f'{checkpoint.parent}/{newest} is damaged' in process.stdout
    assert f'resuming after step {before} of' in process.stdout
    moved = workdir / 'damaged_checkpoints' / str(newest)
    assert (moved / 'model').is_dir()
    assert kills.differences(workdir, undisturbed) == []
