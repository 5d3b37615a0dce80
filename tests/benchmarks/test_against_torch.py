"""`benchmarks/against_torch.py` compares networks that are the same."""

import json

import pytest
from bare import on_a_bare_machine


@pytest.mark.long
def test_measures_the_same_network_on_a_bare_machine(run_script, tmp_path):
  process = run_script(
    *on_a_bare_machine('benchmarks/against_torch.py'),
    *('--smoke', '--out', tmp_path),
  )
  (path,) = tmp_path.glob('smoke-against_torch-*.json')
  result = json.loads(path.read_text())
  ways = {'ours', 'plain forms', 'torch'}
  assert set(result['milliseconds']['train']) == ways
  for task, times in result['milliseconds'].items():
    for name, ratio in result['ratio'][task].items():
      assert ratio == pytest.approx(times[name] / times['ours'])
  for name, difference in result['logits_differ_by'].items():
    assert difference < 1e-4, name
  # Before a step and after it.
  for losses in result['losses'].values():
    assert losses == pytest.approx(result['losses']['torch'], rel=1e-4)
  assert len(set(result['losses']['ours'])) == 2
  assert 'times ours' in process.stdout
  assert path.with_suffix('.png').exists()
