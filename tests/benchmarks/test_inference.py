"""`benchmarks/inference.py` measures two programs of the same result."""

import json

import pytest
from bare import on_a_bare_machine

from resnest_jax.config import config_to_json, load_config


@pytest.mark.long
def test_measures_both_ways_on_a_bare_machine(run_script, tmp_path):
  config = load_config('configs/ade20k_pspnet.py:mini')
  (tmp_path / 'config.json').write_text(config_to_json(config))
  process = run_script(
    *on_a_bare_machine('benchmarks/inference.py'),
    *('--config', tmp_path / 'config.json', '--batch_size', 2, '--smoke'),
    *('--out', tmp_path),
  )
  (path,) = tmp_path.glob('smoke-inference-ade20k_pspnet_mini-*.json')
  result = json.loads(path.read_text())
  assert result['pixels'] == 2 * 32 * 48
  # Only where two classes are as good as equal.
  assert result['pixels_that_differ'] < 0.01 * result['pixels']
  assert set(result['ways']) == {'variables as inputs', 'norms folded'}
  for way in result['ways'].values():
    product = way['images_per_second'] * way['milliseconds']
    assert product == pytest.approx(2 * 1000)
    assert 0 < way['temporary_mb'] < 100
  assert 'pixels differ' in process.stdout
  assert path.with_suffix('.png').exists()
