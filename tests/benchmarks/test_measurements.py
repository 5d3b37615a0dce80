"""The scripts of benchmarks/ measure what they say, if they may on little."""

import os
from pathlib import Path

import pytest
from small import MINI

from benchmarks import conv_forms
from benchmarks.long_run import compare
from benchmarks.loss_memory import WAYS, temporary_bytes
from resnest_jax.config import config_to_json, load_config
from resnest_jax.models.implementations import IMPLEMENTATIONS


@pytest.mark.long
def test_against_torch_compares_the_same_network(measure):
  result, printed = measure('against_torch', '--smoke')
  assert result['milliseconds']['train'].keys() == {
    *('ours', 'plain forms', 'torch')
  }
  for task, times in result['milliseconds'].items():
    for name, ratio in result['ratio'][task].items():
      assert ratio == pytest.approx(times[name] / times['ours'])
  assert max(result['logits_differ_by'].values()) < 1e-4
  # Before a step and after it.
  for losses in result['losses'].values():
    assert losses == pytest.approx(result['losses']['torch'], rel=1e-4)
  assert len(set(result['losses']['ours'])) == 2
  assert 'times ours' in printed


def test_conv_forms_measures_every_way_of_every_kind(measure):
  result, printed = measure('conv_forms', '--smoke')
  layers = result['layers']
  assert {layer['kind'] for layer in layers} == set(conv_forms.KINDS)
  for layer in layers:
    kind = layer['kind']
    assert layer['chosen'] == conv_forms.chosen(kind)
    for way, times in layer['milliseconds'].items():
      assert len(times) > 1
      assert times.keys() >= set(IMPLEMENTATIONS.get(kind, ()))
      for name, ratio in layer['ratio'][way].items():
        assert ratio == pytest.approx(times[name] / times[layer['chosen']])
  assert 'PSP bottleneck' in printed


TINY = """
from small import small_config
def get_config():
  return small_config(**{'eval.bucket': 256, 'model.head': 'fcn'})
"""


@pytest.mark.long
def test_evaluate_measures_the_same_evaluation_in_two_ways(measure, tmp_path):
  (tmp_path / 'tiny.py').write_text(TINY)
  flags = ('--config', tmp_path / 'tiny.py', '--images', 3, '--rounds', 1)
  tests = {'PYTHONPATH': str(Path(__file__).parent.parent)}
  result, printed = measure('evaluate', *flags, bare=False, environment=tests)
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
  assert '3 images of 3 sizes' in printed


@pytest.mark.long
def test_inference_measures_two_programs_of_the_same_result(measure, tmp_path):
  (tmp_path / 'config.json').write_text(config_to_json(load_config(MINI)))
  flags = ('--config', tmp_path / 'config.json', '--batch_size', 2, '--smoke')
  result, printed = measure('inference', *flags)
  assert result['pixels'] == 2 * 32 * 48
  # Only where two classes are as good as equal.
  assert result['pixels_that_differ'] < 0.01 * result['pixels']
  assert set(result['ways']) == {'variables as inputs', 'norms folded'}
  for way in result['ways'].values():
    product = way['images_per_second'] * way['milliseconds']
    assert product == pytest.approx(2 * 1000)
    assert 0 < way['temporary_mb'] < 100
  assert 'pixels differ' in printed


def test_long_run_compares_first_and_last_steps_after_the_warm_up():
  rows = [
    {'step': step, 'milliseconds': step / 2, 'megabytes': 3 * step}
    for step in range(10, 101, 10)
  ]
  assert compare(rows, 20) == {
    'first_milliseconds': 17.5,  # Of steps 30 and 40.
    'first_megabytes': 105,
    'last_milliseconds': 47.5,  # Of steps 90 and 100.
    'last_megabytes': 285,
  }


@pytest.mark.long
def test_long_run_watches_a_training_from_start_to_end(measure):
  one_device = os.environ['XLA_FLAGS'].replace('count=4', 'count=1')
  result, printed = measure(
    *('long_run', '--steps', 30),
    bare=False,
    environment={'XLA_FLAGS': one_device},
  )
  rows = result['rows']
  assert {10, 20, 30} <= {row['step'] for row in rows}
  found = compare(rows, 10)
  assert result.items() >= found.items()
  assert f'the last 10: {found["last_milliseconds"]:.1f} ms' in printed
  # What a process with jax takes, and no more than a small training does.
  assert 200 < found['first_megabytes'] < 4000


def test_loss_memory_measures_both_losses(measure):
  result, printed = measure('loss_memory', '--smoke')
  tiled, plain = result['temporary_bytes'].values()
  assert result['ratio'] == pytest.approx(plain / tiled)
  # Upsampled logits of 2 x 64 x 64 pixels and 10 classes are there for sure.
  assert plain > 4 * 2 * 64 * 64 * 10
  assert set(result['seconds']) == set(WAYS)
  assert 'times as much memory' in printed


def test_tiles_need_an_eighth_of_the_memory():
  """At the rows' batch, crop and classes; compiled, not run."""
  tiled, plain = (temporary_bytes(loss, 16, 512, 150) for loss in WAYS.values())
  logits = 4 * 16 * 512 * 512 * 150
  assert plain > logits
  assert tiled <= plain / 8


PIPELINE = ('pipeline', '--samples', 4, '--rounds', 1, '--data', 'ade20k')


def test_pipeline_measures_its_data_sets(measure):
  result, printed = measure(
    *(*PIPELINE, 'cityscapes_raw', '--workers', 0), bare=False
  )
  for data in ('ade20k', 'cityscapes_raw'):
    rates = result[data]['images_per_second']
    for way in ('one thread', 'one process'):
      assert any(way in name for name in rates)
    stages = result[data]['stages_ms']
    assert min(*rates.values(), *stages.values()) > 0
    assert 'read and decode' in stages
    assert data in printed


def test_pipeline_tells_of_a_peer_that_does_not_start(run_script):
  script, *flags = PIPELINE
  process = run_script(
    *(f'benchmarks/{script}.py', *flags, '--peer', 'false'), status=1
  )
  assert 'error: the peer has ended with status 1' in process.stderr


@pytest.mark.long
def test_the_training_pipeline_does_not_grow(measure, mini_data_dir):
  result, printed = measure(
    *('pipeline_memory', '--config', 'configs/ade20k_fcn.py:mini'),
    *('--samples', 2000, f'--config.data.data_dir={mini_data_dir}'),
    bare=False,
  )
  rows = result['rows']
  assert [row['samples'] for row in rows] == [208 * i for i in range(1, 11)]
  growth = rows[-1]['peak_mb'] - rows[0]['peak_mb']
  assert f'grew by {growth:.1f} MB' in printed
  # A sample takes 66 kB: one in ten that stayed would make 12 MB.
  assert growth < 10


@pytest.mark.long
def test_train_step_measures_from_a_json_config(measure, tmp_path):
  changes = {'model.head': 'fcn', 'model.radix': 1, 'model.width': 8}
  config = config_to_json(load_config(MINI, changes))
  (tmp_path / 'config.json').write_text(config)
  result, printed = measure(
    *('train_step', '--config', tmp_path / 'config.json', '--batch_size', 4),
    *('--crop', 64, 64, '--steps', 2),
  )
  assert result['config'] == 'ade20k_pspnet_mini'
  assert result['devices'] == '4 x cpu'
  assert 0 < result['cached_compile_seconds'] < result['compile_seconds']
  speed = result['images_per_second']
  assert speed * result['step_ms'] == pytest.approx(4 * 1000)
  # As for a real batch: cross entropy of 150 classes, and 0.4 of it again.
  assert 6 < result['final_loss'] < 8.5
  assert 0 < result['share_of_matmul_rate'] < 1
  assert 0.01 < result['program_gb'] < 1
  assert 'images_per_second' in printed
