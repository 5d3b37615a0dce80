"""Two processes that train as one: `train.py` as on two machines."""

import argparse
import re
import shutil
import signal
import socket
import time

import jax
import kills
import numpy as np
import pytest
from hosts import error_of, finish, free_port, join_flags, start, start_pair
from small import MINI, scalars, small_flags

from resnest_jax.checkpoints.store import load_checkpoint
from resnest_jax.distributed import failures
from resnest_jax.distributed.failures import is_of_a_collective
from resnest_jax.distributed.join import add_flags, joined
from resnest_jax.distributed.messages import is_first, wait_for_all
from resnest_jax.errors import UserError

STEPS = 8


@pytest.fixture(scope='module')
def command(mini_data_dir):
  """In numbers that can be compared; the workdir comes next."""
  values = {'model.dtype': 'float64', 'model.head': 'fcn', 'model.radix': 1}
  values |= {'data.data_dir': mini_data_dir, 'data.doctor_samples': 0}
  values |= {'train.total_steps': STEPS, 'train.checkpoint_steps': 2}
  values |= {'train.eval_steps': STEPS, 'train.log_steps': 1}
  return 'train.py', '--config', MINI, *small_flags(values), '--workdir'


def wait_for_checkpoint(workdir, step, process):
  deadline = time.monotonic() + 300
  while not (workdir / 'checkpoints' / str(step)).exists():
    assert process.poll() is None, finish(process)
    assert time.monotonic() < deadline
    time.sleep(0.01)


@pytest.mark.long
def test_a_run_moves_between_processes_and_is_the_same(command, tmp_path):
  # Brackets, a backslash and a colon: what Orbax cannot have in a path.
  undisturbed, workdir = tmp_path / 'undisturbed', tmp_path / '[run] a\\b:'
  finish(start(*command, undisturbed, devices=1))
  # Two processes of two devices, of which one is killed.
  first, second = start_pair(*command, workdir)
  wait_for_checkpoint(workdir, 2, second)
  second.send_signal(signal.SIGKILL)
  killed = time.monotonic()
  _, stderr = finish(first, status=1)
  assert time.monotonic() - killed < 60
  told = f'error: host 1 ({socket.gethostname()}) has been kill'
  assert stderr.splitlines()[-1].startswith(told)
  finish(second, status=-signal.SIGKILL)
  # One process of one device, which is killed as well.
  alone = start(*command, workdir, devices=1)
  wait_for_checkpoint(workdir, 6, alone)
  alone.send_signal(signal.SIGKILL)
  stdout, _ = finish(alone, status=-signal.SIGKILL)
  assert 'resuming after step' in stdout
  # Two again, of one device each, which share the last steps.
  first, second = start_pair(*command, workdir, devices=1)
  stdout, _ = finish(first)
  assert 'resuming after step 6' in stdout
  assert 'on 2 x cpu' in stdout
  stdout, _ = finish(second)
  assert 'step' not in stdout  # The first one speaks for both.

  for name in ('loss', 'gradient_norm', 'mIoU'):
    expected = scalars(undisturbed, name)
    assert len(expected) == (1 if name == 'mIoU' else STEPS)
    np.testing.assert_allclose(scalars(workdir, name), expected, rtol=1e-9)
  assert (workdir / 'curves.png').read_bytes().startswith(b'\x89PNG')
  # Read on other devices than those that wrote it.
  with jax.enable_x64(True):
    ours, theirs = (
      jax.tree.leaves(jax.device_get(load_checkpoint(run)[1]))
      for run in (workdir, undisturbed)
    )
  for value, expected in zip(ours, theirs, strict=True):
    scale = max(abs(expected).max(), 1e-6)
    assert abs(value - expected).max() / scale < 1e-9


ERRORS = {
  ValueError('UNKNOWN: Gloo AllGather failed: Connection closed'): True,
  RuntimeError('UNAVAILABLE: The coordination service'): True,
  ValueError('labels go up to 151'): False,
  UserError('no space for the collective state'): False,
}


@pytest.mark.parametrize('error', ERRORS, ids=str)
def test_errors_that_only_say_that_a_host_is_gone(error):
  assert is_of_a_collective(error) == ERRORS[error]


@pytest.mark.parametrize(
  ('here', 'quiet', 'named'),
  [
    (0, {1: 9, 2: 11, 3: 30}, 'host 2 (c), host 3 (d)'),
    # JAX's service may know before a heartbeat is overdue.
    (0, {1: 5, 2: 1, 3: 2}, 'host 1 (b)'),
    (0, {2: 1, 3: 2}, 'host 1'),
    (1, {0: 5, 2: 1, 3: 7}, 'host 0 (127.0.0.1:1)'),
  ],
)
def test_hosts_that_do_not_answer_are_named(monkeypatch, here, quiet, named):
  now = time.monotonic()
  heard = {i: (f'{"abcd"[i]} 7', now - age) for i, age in quiet.items()}
  monkeypatch.setattr(failures, '_heard', heard)
  monkeypatch.setattr(failures, '_began', now - 9)
  shared = {'process_id': here, 'num_processes': 4}
  shared['coordinator_address'] = '127.0.0.1:1'
  for name, value in shared.items():
    monkeypatch.setattr(failures.shared, name, value)
  assert failures._silent() == named


# Orbax synchronises like this while it saves.
HOST = """
import argparse, os, signal
import jax
import numpy as np
from jax.experimental import multihost_utils
from resnest_jax.distributed import join
from resnest_jax.errors import run

def main():
  with join.joined(join.add_flags(argparse.ArgumentParser()).parse_args(), {}):
    multihost_utils.sync_global_devices('both are here')
    if jax.process_index() == 1:
      os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(100):
      multihost_utils.process_allgather(np.ones(3))

run(main)
"""


def test_host_that_is_killed_while_the_other_gathers():
  first, second = start_pair('-c', HOST, devices=1)
  finish(second, status=-signal.SIGKILL)
  _, stderr = finish(first, status=1, timeout=60)
  assert 'Traceback' not in stderr
  told = 'error: host 1 .* Start the same command on all hosts again'
  assert re.match(told, stderr.splitlines()[-1])


@pytest.fixture(scope='module')
def three_data(tmp_path_factory):
  """A data set, without a training image, and with its classes swapped."""
  folder = tmp_path_factory.mktemp('three')
  kills.make_data(folder / 'first')
  for name in ('fewer', 'swapped'):
    shutil.copytree(folder / 'first', folder / name)
  for kind in ('images', 'masks'):
    (folder / 'fewer' / kind / 'train' / '15.png').unlink()
  classes = 'sky 0 0 255\nroad 0 255 0\nwall 255 0 0\n'
  (folder / 'swapped' / 'classes.txt').write_text(classes)
  return folder


# The data of the second host, its other flags, and what it says.
OTHERS = {
  'first --config.seed=1': r'\(config.seed: 0 on host 0, 1 here\). Use',
  'fewer': 'training split: 16 on host 0, 15 here.*give all hosts the same',
  'swapped': r"'wall', \[1\]\] on host 0, \['road', \[1\]\] here.*the same",
}


@pytest.mark.parametrize('other', OTHERS)
def test_hosts_that_differ_do_not_train(three_data, tmp_path, other):
  data, (name, *flags) = f'--config.data.data_dir={three_data}', other.split()
  command = 'train.py', '--config', 'configs/folder.py:mini', *small_flags()
  command += f'{data}/first', '--workdir', tmp_path / 'run'
  second_only = f'{data}/{name}', '--config.data.num_threads=1', *flags
  pair = start_pair(*command, devices=1, second_only=second_only)
  by_first, by_second = map(error_of, pair)
  assert re.match(rf'error: this host \(.*{OTHERS[other]}', by_second)
  assert by_first.startswith('error: host 1 has ended: this host')
  assert not (tmp_path / 'run').exists()


def joining(*numbers, timeout=60):
  flags = *join_flags(*numbers), '--connect_timeout', timeout
  return start('-c', HOST, *flags, devices=1)


def test_hosts_of_other_numbers_of_processes():
  port = free_port()
  pair = joining(port, 2, 0), joining(port, 3, 1)
  for error in map(error_of, pair):
    assert 'num_processes: 2 on host 0, 3 here' in error


@pytest.mark.long
def test_process_beyond_the_number_of_the_first():
  port = free_port()
  first, third = joining(port, 2, 0, timeout=15), joining(port, 3, 2)
  by_third = error_of(third)
  assert by_third.startswith('error: the hosts cannot join. ')
  assert 'all with the same --coordinator and' in by_third
  assert 'not all processes came to' in error_of(first)


def test_port_of_another_program():
  with socket.create_server(('', 0)) as taken:
    port = taken.getsockname()[1]
    _, err = finish(joining(port, 2, 0), status=1)
  (line,) = err.splitlines()
  assert f'port {port} of --coordinator 127.0.0.1:{port} cannot be ope' in line
  assert '(Address already in use). Give all hosts another one' in line


@pytest.mark.long
def test_two_processes_of_one_id():
  port = free_port()
  # The first of two that say 1 ends when the second comes.
  first, *pair = (joining(port, 3, i, timeout=20) for i in (0, 1, 1))
  said = [*map(error_of, pair)]
  assert any('with --process_id 1, that is why. Start' in x for x in said)
  assert 'each with its own --process_id' in error_of(first)


def test_coordinator_that_does_not_answer():
  told = '127.0.0.1:1 cannot be reached within 1 s (Connection ref'
  assert told in error_of(joining(1, 2, 1, timeout=1))


def join(flags):
  parser = add_flags(argparse.ArgumentParser())
  return joined(parser.parse_args(flags.split()), {})


WRONG = {
  '--coordinator=a:1 --num_processes=2': 'missing: --process_id',
  '--coordinator=a --num_processes=2 --process_id=0': 'must be HOST:PORT',
  '--coordinator=a:1 --num_processes=0 --process_id=0': 'must be positive',
  '--coordinator=a:1 --num_processes=2 --process_id=2': 'from 0 to 1',
  f'--coordinator=a:1 --num_processes={10**30} --process_id=2': 'at most 1048',
  f'--connect_timeout={10**20}': 'from 1 to 604800 seconds',
  '--connect_timeout=-1': 'from 1 to 604800 seconds',
}


@pytest.mark.parametrize('flags', WRONG)
def test_flags_that_cannot_be_meant(flags):
  with pytest.raises(UserError, match=WRONG[flags]), join(flags):
    pass


@pytest.mark.parametrize('flags', ['', '--num_processes=1'])
def test_one_process_is_alone(flags):
  begun = time.monotonic()
  with join(flags):
    assert is_first()
    wait_for_all('nobody')
  assert time.monotonic() - begun < 1
  assert jax.process_count() == 1
