"""One result on any number of devices and hosts, for any batch size."""

# As a script (OVERRIDES WORKDIR OUT, a cluster's flags) it is one of two hosts,
# for which each evaluation of `SPLITS` is a line of JSON.

import contextlib
import json
import os
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from evaluation import class_runs, plain
from evaluation.runs import OVERRIDES
from golden import reference
from hosts import finish, start_pair
from small import small_config

from resnest_jax import sharding
from resnest_jax.errors import UserError
from resnest_jax.evaluation import calibration, evaluate, evaluate_split
from resnest_jax.models.segmentor import create_segmentor

pytestmark = pytest.mark.long

# Unevenly shared by two: three and two, one and none; and a wrong label.
SPLITS = plain.noise(5), plain.noise(1), plain.noise(5)
SPLITS[2][3]['label'][0, 0] = plain.CLASSES


def outcome(split, batch_size=3, network=(plain.UPSAMPLER, plain.VARIABLES)):
  # Batch size, images and scores, to be compared as JSON; or the error.
  config, seen = small_config(**{'eval.batch_size': batch_size}), []
  watch = types.SimpleNamespace(add=lambda x: seen.append(x.index), gather=list)
  evaluator = evaluate.Evaluator(config, network[0], split, watchers=[watch])
  try:
    with contextlib.redirect_stdout(sys.stderr):
      found = evaluator(network[1])
  except UserError as error:
    return str(error)
  counts = found.confusion.tolist(), found.image_counts.tolist()
  return [evaluator.batch_size, sorted(seen), *counts, found.scores.mIoU]


def class_outcome():
  # As `outcome`, of a classifier.
  config, split = class_runs.config_of('.'), class_runs.stand_in(5)
  config.eval.batch_size = 3
  with contextlib.redirect_stdout(sys.stderr):
    found = evaluate.Evaluator(config, class_runs.COLOURS, split)(
      class_runs.LAYER
    )
  told = found.labels, found.best, found.probabilities, found.confusion
  return [*(x.tolist() for x in told), found.names, found.scores.summary()]


def measured():
  # Sums over rows, which all hosts have.
  with contextlib.redirect_stdout(sys.stderr):
    found = evaluate.Evaluator(
      small_config(), plain.UPSAMPLER, SPLITS[0], measure=calibration.slopes
    )(plain.VARIABLES)
  return found.measured.tolist()


def on_host(overrides, workdir, out, *flags):
  # One of JAX's ways to connect processes prints from several threads, so that
  # its lines are torn. It writes to descriptor 1; ours go to the pipe alone.
  sys.stdout = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  _, address, *_, index = flags
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(address, 2, int(index))
  for split in SPLITS:
    print(json.dumps(outcome(split)), flush=True)
  print(json.dumps(class_outcome()), flush=True)
  print(json.dumps(measured()), flush=True)
  config = small_config(**json.loads(overrides))
  evaluate_split.evaluate_split(config, workdir=Path(workdir), out=Path(out))


def test_devices_and_batch_size_do_not_change_the_counts(monkeypatch):
  model = create_segmentor(plain.TINY | {'dtype': 'float32', 'head': 'fcn'})
  network, results = (model, reference.variables_of(model)), []
  for devices in (1, 2, 4):
    mesh = plain.make_mesh(devices)
    monkeypatch.setattr(sharding, 'local_mesh', lambda mesh=mesh: mesh)
    results += [outcome(plain.noise(15), size, network) for size in (1, 7)]
  # Rounded up to a number that the devices can share evenly.
  assert [rows for rows, *_ in results] == [1, 7, 2, 8, 4, 8]
  assert [rest for _, *rest in results] == 6 * [results[0][1:]]
  assert results[0][1] == list(range(15))


@pytest.fixture(scope='module')
def evaluated(written_run, tmp_path_factory, mini_data_dir):
  # Folders of one process and of two, and lines printed by the two.
  folder = tmp_path_factory.mktemp('evaluated')
  alone, both = folder / 'alone', folder / 'both'
  overrides = OVERRIDES | {'data.data_dir': str(mini_data_dir)}
  overrides['eval.boundary_iou'] = True
  hosts = start_pair(__file__, json.dumps(overrides), written_run, both)
  config = small_config(**overrides)
  evaluate_split.evaluate_split(config, workdir=written_run, out=alone)
  said = [finish(host, timeout=600)[0].splitlines() for host in hosts]
  return alone, both, said


def test_hosts_add_up_what_each_has_counted(evaluated):
  first, second = (list(map(json.loads, lines[:5])) for lines in evaluated[2])
  for split, *theirs in zip(SPLITS[:2], first, second, strict=False):
    rows, shown, *scores = outcome(split)
    assert shown == list(range(len(split)))
    # Four devices together, two in each process.
    assert theirs == [[rows // 2, shown[i::2], *scores] for i in (0, 1)]
  assert first[3] == second[3] == class_outcome()
  assert first[4] == second[4]
  np.testing.assert_allclose(first[4], measured(), rtol=1e-4)
  # An error on one host ends all.
  assert 'labelled pixels of image_3 have no class' in second[2]
  assert first[2] == f'process 1 has failed: {second[2]}'


def test_hosts_write_one_result_that_of_a_single_process(evaluated):
  *folders, (first, second) = evaluated
  expected, result = (
    json.loads((x / 'metrics.json').read_text('utf-8')) for x in folders
  )
  assert expected['boundary']['mIoU'] > 0
  for key in ('seconds', 'date'):
    assert result.pop(key) != expected.pop(key)
  assert result == expected
  # The same files, to the byte; three of the eight images are drawn.
  pictures, theirs = (
    {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*.png')}
    for folder in folders
  )
  assert len(pictures) == 4
  assert theirs == pictures
  # Only one of them speaks.
  out = folders[1]
  assert first[-2:] == [f'written to {out}', f'report: {out}/report.html']
  assert len(second) == len(SPLITS) + 2


if __name__ == '__main__':
  on_host(*sys.argv[1:])
