"""Two processes that train as one: `train.py` as on two machines."""

import argparse
import json
import re
import shutil
import signal
import socket
import time

import jax
import kills
import numpy as np
import pytest
from hosts import finish, start, start_pair
from small import MINI, small_flags

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
  values = {
    'model.dtype': 'float64',
    'model.head': 'fcn',
    'model.radix': 1,
    'data.data_dir': mini_data_dir,
    'data.doctor_samples': 0,
    'train.total_steps': STEPS,
    'train.checkpoint_steps': 2,
    'train.eval_steps': STEPS,
    'train.log_steps': 1,
  }
  return 'train.py', '--config', MINI, *small_flags(values), '--workdir'


def wait_for_checkpoint(workdir, step, process):
  deadline = time.monotonic() + 300
  while not (workdir / 'checkpoints' / str(step)).exists():
    assert process.poll() is None, finish(process)
    assert time.monotonic() < deadline
    time.sleep(0.01)


def scalars(workdir, name):
  """(step, value) in the order in which they were logged."""
  rows = map(json.loads, (workdir / 'log.jsonl').read_text().splitlines())
  return [(row['step'], row[name]) for row in rows if name in row]


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
GATHER = """
import argparse, os, signal
import jax
import kills
import numpy as np
from jax.experimental import multihost_utils
from resnest_jax.distributed import failures, join

flags = join.add_flags(argparse.ArgumentParser()).parse_args()
with join.joined(flags, {}), failures.leaving():
  multihost_utils.sync_global_devices('both are here')
  if jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  for _ in range(100):
    multihost_utils.process_allgather(np.ones(3))
"""


def test_host_that_is_killed_while_the_other_gathers():
  first, second = start_pair('-c', GATHER, devices=1)
  finish(second, status=-signal.SIGKILL)
  _, stderr = finish(first, status=1, timeout=60)
  assert 'Traceback' not in stderr
  told = 'error: host 1 .* Start the same command on all hosts again'
  assert re.match(told, stderr.splitlines()[-1])


def test_processes_of_different_commands(command, tmp_path):
  second_only = ('--config.seed=1', '--config.data.num_threads=1')
  pair = start_pair(*command, tmp_path / 'run', second_only=second_only)
  (_, by_first), (_, by_second) = (finish(x, status=1) for x in pair)
  assert by_second.splitlines()[-1].startswith('error: this host (')
  assert '(config.seed: 0 on host 0, 1 here). Use' in by_second
  assert by_first.splitlines()[-1].startswith('error: host 1 has ended: this')
  assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def two_data(tmp_path_factory):
  """The same data twice, of which the second lacks a training image."""
  folder = tmp_path_factory.mktemp('two')
  kills.make_data(folder / 'first')
  shutil.copytree(folder / 'first', folder / 'second')
  for kind in ('images', 'masks'):
    (folder / 'second' / kind / 'train' / '15.png').unlink()
  return folder


SWAPPED = 'sky 0 0 255\nroad 0 255 0\nwall 255 0 0\n'
FOLDER = ('--config', 'configs/folder.py:mini', *small_flags())


def own_pair(script, folder, *more, second):
  data = '--config.data.data_dir='
  return start_pair(
    *(script, *FOLDER, f'{data}{folder}/first', *more),
    devices=1,
    second_only=(f'{data}{folder}/{second}',),
  )


@pytest.mark.parametrize(
  ('classes', 'told'),
  [
    (None, 'images in the training split: 16 on host 0, 15 here'),
    (SWAPPED, r"values: \['wall', \[1\]\] on host 0, \['road', \[1\]\] here"),
  ],
)
def test_hosts_with_other_data_do_not_train(two_data, tmp_path, classes, told):
  second = shutil.copytree(
    two_data / ('first' if classes else 'second'), two_data / tmp_path.name
  )
  if classes:
    (second / 'classes.txt').write_text(classes)
  workdir = tmp_path / 'run'
  pair = own_pair(
    'train.py', two_data, '--workdir', workdir, second=second.name
  )
  (_, by_first), (_, by_second) = (finish(x, status=1) for x in pair)
  assert re.search(told, by_second.splitlines()[-1])
  assert 'give all hosts the same files' in by_second.splitlines()[-1]
  assert 'error: host 1 has ended: this host' in by_first.splitlines()[-1]
  assert not workdir.exists()


JOINED = """
import argparse, sys, time
from resnest_jax.distributed import join
from resnest_jax.errors import run
def main():
  flags = join.add_flags(argparse.ArgumentParser()).parse_args()
  with join.joined(flags, {}):
    print('joined')
run(main)
"""


def joining(port, number, process_id, timeout=60):
  flags = ('--coordinator', f'127.0.0.1:{port}', '--num_processes', number)
  flags += ('--process_id', process_id, '--connect_timeout', timeout)
  return start('-c', JOINED, *flags, devices=1)


def free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def test_hosts_of_other_numbers_of_processes():
  port = free_port()
  pair = joining(port, 2, 0), joining(port, 3, 1)
  (_, by_first), (_, by_second) = (finish(x, status=1) for x in pair)
  told = 'num_processes: 2 on host 0, 3 here'
  assert told in by_second.splitlines()[-1]
  assert told in by_first.splitlines()[-1]


@pytest.mark.long
def test_process_beyond_the_number_of_the_first():
  port = free_port()
  pair = joining(port, 2, 0, timeout=15), joining(port, 3, 2)
  _, by_second = finish(pair[1], status=1)
  assert by_second.splitlines()[-1].startswith('error: the hosts cannot join. ')
  assert 'all with the same --coordinator and' in by_second.splitlines()[-1]
  _, by_first = finish(pair[0], status=1)
  assert 'not all processes came to' in by_first.splitlines()[-1]


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
  first = joining(port, 3, 0, timeout=20)
  pair = [joining(port, 3, 1, timeout=20) for _ in range(2)]
  said = [finish(x, status=1)[1].splitlines()[-1] for x in (*pair, first)]
  assert any('the hosts cannot join. Start one process' in x for x in said[:2])
  assert 'each with its own --process_id' in said[2]


def test_coordinator_that_does_not_answer(command, tmp_path):
  flags = ('--coordinator', '127.0.0.1:1', '--num_processes', 2)
  flags += ('--process_id', 1, '--connect_timeout', 1)
  process = start(*command, tmp_path / 'run', *flags, devices=1)
  _, stderr = finish(process, status=1)
  assert '127.0.0.1:1 cannot be reached within 1 s (Connection ref' in stderr


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
