"""One result on any number of devices and hosts, for any batch size."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from evaluation import processes
from evaluation.runs import OVERRIDES, write_run

from resnest_jax.config import load_config
from resnest_jax.evaluation import metrics
from resnest_jax.evaluation.evaluate_split import evaluate_split

pytestmark = pytest.mark.long


def start(root, devices, *arguments):
  """`processes.py` with this many devices; its output is read later."""
  flags = os.environ['XLA_FLAGS'].replace('count=4', f'count={devices}')
  return subprocess.Popen(
    [sys.executable, 'tests/evaluation/processes.py', *map(str, arguments)],
    cwd=root,
    env=os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': f'{root}:tests'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  """The lines that it printed; a process that hangs is killed."""
  try:
    stdout, stderr = process.communicate(timeout=600)
  finally:
    process.kill()
  assert process.returncode == 0, f'{stdout}\n{stderr}'
  # One of JAX's ways to connect processes prints that it has.
  lines = stdout.splitlines()
  return [line for line in lines if not line.startswith('[Gloo]')]


def test_devices_and_batch_size_do_not_change_the_counts(root):
  lines = finish(start(root, 8, 'devices'))
  results = {(n, size): x for n, size, x in map(json.loads, lines)}
  rows = {key: x.pop('batch_size') for key, x in results.items()}
  # What the devices cannot share evenly is rounded up.
  assert rows == {
    (1, 1): 1,
    (1, 7): 7,
    (2, 1): 2,
    (2, 7): 8,
    (8, 1): 8,
    (8, 7): 8,
  }
  first = results[1, 1]
  assert all(x == first for x in results.values())
  # Every labelled pixel of every image was counted once.
  labels = [processes.Noise(15)[i]['label'].ravel() for i in range(15)]
  np.testing.assert_array_equal(
    np.sum(first['confusion'], 1), np.bincount(np.concatenate(labels))
  )
  assert first['shown'] == list(range(15))
  np.testing.assert_array_equal(
    np.sum(first['image_counts'], 0),
    metrics.intersection_and_union(np.array(first['confusion'])),
  )


@pytest.fixture(scope='module')
def evaluated(root, tmp_path_factory, mini_data_dir):
  """Of one process and of two: their folders, and what the two printed."""
  workdir = write_run(tmp_path_factory.mktemp('run'))
  overrides = OVERRIDES | {
    'data.data_dir': str(mini_data_dir),
    'eval.boundary_iou': True,
  }
  alone, both = workdir / 'alone', workdir / 'both'
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  arguments = json.dumps(overrides), workdir, both
  hosts = [start(root, 2, 'host', port, i, *arguments) for i in (0, 1)]
  config = load_config('configs/ade20k_pspnet.py:mini', overrides)
  evaluate_split(config, workdir=workdir, out=alone)
  return alone, both, [finish(process) for process in hosts]


def test_hosts_add_up_what_each_has_counted(evaluated):
  *_, lines = evaluated
  outcomes = [list(map(json.loads, x[: len(processes.SPLITS)])) for x in lines]
  for split, *theirs in zip(processes.SPLITS[:2], *outcomes, strict=False):
    alone = processes.outcome(split)
    assert alone['dtype'] == 'int64'
    shown = [x.pop('shown') for x in theirs]
    assert shown == [list(range(i, len(split), 2)) for i in (0, 1)]
    assert alone.pop('shown') == list(range(len(split)))
    # Four devices together, two in each process.
    assert alone.pop('batch_size') == sum(x.pop('batch_size') for x in theirs)
    assert theirs == [alone, alone]


def test_an_error_on_one_host_ends_all(evaluated):
  *_, lines = evaluated
  first, second = (json.loads(x[2]) for x in lines)
  assert 'labelled pixels of image_3 have no class' in second
  assert first == f'process 1 has failed: {second}'


def test_hosts_write_one_result_that_of_a_single_process(evaluated):
  alone, both, (first, second) = evaluated
  expected, result = (
    json.loads((folder / 'metrics.json').read_text('utf-8'))
    for folder in (alone, both)
  )
  assert expected['boundary']['mIoU'] > 0
  for key in ('seconds', 'date'):
    assert result.pop(key) != expected.pop(key)
  assert result == expected
  # The same files, to the byte; three of the eight images are drawn.
  names = [
    [p.relative_to(folder) for p in sorted(folder.rglob('*.png'))]
    for folder in (alone, both)
  ]
  assert names[0] == names[1]
  assert len(names[0]) == 4
  for name in names[0]:
    assert (both / name).read_bytes() == (alone / name).read_bytes()
  # Only one of them speaks.
  assert first[-2:] == [
    f'written to {both}',
    f'report: {both}/report.html',
  ]
  assert len(second) == len(processes.SPLITS)
