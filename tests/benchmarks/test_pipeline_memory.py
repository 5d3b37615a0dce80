"""`benchmarks/pipeline_memory.py`: the training pipeline does not grow."""

import json

import pytest


@pytest.mark.long
def test_the_pipeline_does_not_grow(run_script, mini_data_dir, tmp_path):
  process = run_script(
    'benchmarks/pipeline_memory.py',
    *('--config', 'configs/ade20k_fcn.py:mini', '--samples', 2000),
    *('--out', tmp_path, f'--config.data.data_dir={mini_data_dir}'),
  )
  (path,) = tmp_path.glob('pipeline_memory-*.json')
  rows = json.loads(path.read_text())['rows']
  assert [row['samples'] for row in rows] == [208 * i for i in range(1, 11)]
  growth = rows[-1]['peak_mb'] - rows[0]['peak_mb']
  assert f'grew by {growth:.1f} MB' in process.stdout
  # A sample takes 66 kB: one in ten that stayed would make 12 MB.
  assert growth < 10
