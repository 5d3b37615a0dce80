"""`benchmarks/pipeline.py` measures its three data sets."""

import json

import pytest

WAYS = ('one thread', 'one process')


@pytest.fixture(scope='module')
def measured(run_script, tmp_path_factory):
  out = tmp_path_factory.mktemp('results')
  process = run_script(
    'benchmarks/pipeline.py',
    *('--samples', 4, '--rounds', 1, '--data', 'ade20k', 'cityscapes_raw'),
    *('--workers', 0, '--out', out),
  )
  (path,) = out.glob('pipeline-*.json')
  return json.loads(path.read_text('utf-8')), process.stdout


@pytest.mark.parametrize('data', ['ade20k', 'cityscapes_raw'])
def test_figures_of_a_data_set(measured, data):
  result, console = measured
  rates = result[data]['images_per_second']
  assert [any(way in name for name in rates) for way in WAYS] == [True] * 2
  assert all(rate > 0 for rate in rates.values())
  stages = result[data]['stages_ms']
  assert min(stages.values()) > 0
  # A sample a thread takes at least what its stages take.
  assert 'read and decode' in stages
  assert data in console
  assert result['versions']['grain']


def test_peer_that_does_not_start(run_script):
  process = run_script(
    'benchmarks/pipeline.py',
    *('--samples', 4, '--rounds', 1, '--data', 'ade20k', '--peer', 'false'),
    status=1,
  )
  assert 'error: the peer has ended with status 1' in process.stderr
