"""`benchmarks/train_step.py` measures, also where little is installed."""

import json

import pytest
from bare import on_a_bare_machine


@pytest.mark.long
def test_measures_from_a_json_config_on_a_bare_machine(run_script, tmp_path):
  config = tmp_path / 'config.json'
  run_script(
    '-c',
    'import sys; from resnest_jax.config import *; open(sys.argv[1], "w")'
    '.write(config_to_json(load_config("configs/ade20k_pspnet.py:mini", '
    '{"model.head": "fcn", "model.radix": 1, "model.width": 8})))',
    config,
  )
  process = run_script(
    *on_a_bare_machine('benchmarks/train_step.py'),
    *('--config', config, '--batch_size', 4, '--crop', 64, 64),
    *('--steps', 2, '--out', tmp_path / 'results'),
  )
  (path,) = (tmp_path / 'results').glob('*.json')
  result = json.loads(path.read_text())
  assert result['config'] == 'ade20k_pspnet_mini'
  assert result['devices'] == '4 x cpu'
  assert 0 < result['cached_compile_seconds'] < result['compile_seconds']
  speed = result['images_per_second']
  assert speed * result['step_ms'] == pytest.approx(4 * 1000)
  # As for a real batch: cross entropy of 150 classes, and 0.4 of it again.
  assert 6 < result['final_loss'] < 8.5
  assert 0 < result['share_of_matmul_rate'] < 1
  assert 0.01 < result['program_gb'] < 1
  assert 'images_per_second' in process.stdout
