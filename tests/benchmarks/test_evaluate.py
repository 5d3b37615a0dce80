"""`benchmarks/evaluate.py` measures the same evaluation in two ways."""

import json

import pytest


@pytest.mark.long
def test_both_ways_evaluate_the_same(run_script, tmp_path):
  config = tmp_path / 'tiny.py'
  config.write_text(
    'from resnest_jax.config import load_config\n'
    'def get_config():\n'
    "  return load_config('configs/ade20k_pspnet.py:mini', {\n"
    "    'model.head': 'fcn', 'model.stem_width': 4, 'model.width': 4,\n"
    "    'model.head_channels': 8, 'model.aux_channels': 4,\n"
    "    'data.image_scale': (64, 64), 'eval.bucket': 256,\n"
    '  })\n'
  )
  process = run_script(
    'benchmarks/evaluate.py',
    *('--config', config, '--images', 3, '--rounds', 1, '--out', tmp_path),
  )
  (path,) = tmp_path.glob('evaluate-*.json')
  result = json.loads(path.read_text('utf-8'))
  bucketed, plain = result['ways'].values()
  assert result['images'] == result['sizes'] == 3
  # The network once a padded shape, and once a size.
  assert bucketed['network_compilations'] == bucketed['image_shapes'] == 1
  assert plain['network_compilations'] == plain['image_shapes'] > 1
  assert plain['compilations'] == plain['image_shapes'] + plain['shapes']
  assert bucketed['pixels_moved'] == plain['pixels_moved'] == 0
  assert bucketed['classes_predicted'] > 1
  for key, ratio in result['ratio']['one by one'].items():
    first, second = (x['images_per_second'][key] for x in (bucketed, plain))
    assert ratio == pytest.approx(first / second)
    assert first == pytest.approx(3 / bucketed['rounds'][0][key])
  assert bucketed['rounds'][0]['first'] > bucketed['rounds'][0]['again']
  assert '3 images of 3 sizes' in process.stdout
