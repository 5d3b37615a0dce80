"""One result on any number of devices and hosts, for any batch size."""

import json

import pytest
from evaluation import plain, processes
from evaluation.runs import OVERRIDES
from golden import reference
from hosts import finish, start_pair
from small import MINI

from resnest_jax.config import load_config
from resnest_jax.evaluation.evaluate_split import evaluate_split
from resnest_jax.models.segmentor import create_segmentor

pytestmark = pytest.mark.long


def test_devices_and_batch_size_do_not_change_the_counts():
  model = create_segmentor(plain.TINY | {'dtype': 'float32', 'head': 'fcn'})
  network, split = (model, reference.variables_of(model)), processes.noise(15)
  results = [
    processes.outcome(split, plain.make_mesh(devices), size, network)
    for devices in (1, 2, 4)
    for size in (1, 7)
  ]
  # Rounded up to a number that the devices can share evenly.
  assert [x.pop('batch_size') for x in results] == [1, 7, 2, 8, 4, 8]
  assert results == 6 * results[:1]
  assert results[0]['shown'] == list(range(15))


@pytest.fixture(scope='module')
def evaluated(written_run, tmp_path_factory, mini_data_dir):
  """Folders of one process and of two, and lines printed by the two."""
  folder = tmp_path_factory.mktemp('evaluated')
  alone, both = folder / 'alone', folder / 'both'
  changes = {'data.data_dir': str(mini_data_dir), 'eval.boundary_iou': True}
  arguments = json.dumps(OVERRIDES | changes), written_run, both
  hosts = start_pair('tests/evaluation/processes.py', *arguments)
  config = load_config(MINI, OVERRIDES | changes)
  evaluate_split(config, workdir=written_run, out=alone)
  said = [finish(host, timeout=600)[0].splitlines() for host in hosts]
  return alone, both, said


def test_hosts_add_up_what_each_has_counted(evaluated):
  first, second = (list(map(json.loads, lines[:3])) for lines in evaluated[2])
  for split, *theirs in zip(processes.SPLITS[:2], first, second, strict=False):
    alone = processes.outcome(split)
    shown = [x.pop('shown') for x in theirs]
    assert shown == [list(range(i, len(split), 2)) for i in (0, 1)]
    assert alone.pop('shown') == list(range(len(split)))
    # Four devices together, two in each process.
    assert alone.pop('batch_size') == sum(x.pop('batch_size') for x in theirs)
    assert theirs == [alone, alone]
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
  assert len(second) == len(processes.SPLITS)
