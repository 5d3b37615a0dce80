"""The scripts of benchmarks/ measure what they say, if they may on little.

What is wrong on a command line is said before anything is measured.
"""

import argparse
import os

import pytest
from small import MINI

from benchmarks import flags
from benchmarks.long_run import compare
from benchmarks.loss_memory import WAYS, temporary_bytes
from resnest_jax.config import config_to_json, load_config
from resnest_jax.errors import UserError


def test_memory_has_a_unit():
  found = [flags.gigabytes(text) for text in ('16GB', '80 GiB', '900MB')]
  assert found == [16, pytest.approx(80 * 2**30 / 1e9), pytest.approx(0.9)]
  for text in ('16', 'GB', '-1GB', '16TBX', '0GB'):
    with pytest.raises(argparse.ArgumentTypeError, match='as 16GB or 80GiB'):
      flags.gigabytes(text)


MISTAKES = (
  ('conv_forms.py --rounds 0', '--rounds: 0, and has to be 1 or more'),
  ('loss_memory.py --timed -1', '--timed: -1, and has to be 0 or more'),
  ('loss_memory.py --out README.md/new', 'README.md/new is or lies below'),
  ('compile_ahead.py --topologies cpu --effort 3', 'has to be from -1 to 0'),
  ('train_step.py --config no.json', '--config no.json cannot be'),
  ('scale_model.py --results docs', '--results docs has no compile'),
)


@pytest.mark.parametrize(('command', 'said'), MISTAKES)
def test_mistakes_are_told(command, said, call_script, capsys):
  with pytest.raises((SystemExit, UserError)) as error:
    call_script(*f'benchmarks/{command}'.split())
  assert said in capsys.readouterr().err + str(error.value)


def write_config(path, changes=None):
  """Writes the small configuration as runs do; returns the flag for it."""
  path.write_text(config_to_json(load_config(MINI, changes)))
  return f'--config {path}'


@pytest.mark.long
def test_against_torch_compares_the_same_network(measure):
  result = measure('against_torch.py --smoke', 'times ours')
  names = {'ours', 'plain forms', 'torch'}
  assert result['milliseconds']['train'].keys() == names
  for task, times in result['milliseconds'].items():
    for name, ratio in result['ratio'][task].items():
      assert ratio == pytest.approx(times[name] / times['ours'])
  assert max(result['logits_differ_by'].values()) < 1e-4
  # Before a step and after it.
  for losses in result['losses'].values():
    assert losses == pytest.approx(result['losses']['torch'], rel=1e-4)
  assert len(set(result['losses']['ours'])) == 2


TINY = """
from small import small_config
def get_config():
  return small_config(**{'eval.bucket': 256, 'model.head': 'fcn'})
"""


@pytest.mark.long
def test_evaluate_measures_the_same_evaluation_in_two_ways(
  measure, tmp_path, root
):
  (tmp_path / 'tiny.py').write_text(TINY)
  command = f'evaluate.py --config {tmp_path}/tiny.py --images 3 --rounds 1'
  options = {'bare': False, 'environment': {'PYTHONPATH': f'{root}/tests'}}
  result = measure(command, '3 images of 3 sizes', **options)
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


@pytest.mark.long
def test_inference_measures_two_programs_of_the_same_result(measure, tmp_path):
  config = write_config(tmp_path / 'config.json')
  command = f'inference.py {config} --batch_size 2 --smoke'
  result = measure(command, 'pixels differ')
  assert result['pixels'] == 2 * 32 * 48
  # Only where two classes are as good as equal.
  assert result['pixels_that_differ'] < 0.01 * result['pixels']
  assert set(result['ways']) == {'variables as inputs', 'norms folded'}
  for way in result['ways'].values():
    product = way['images_per_second'] * way['milliseconds']
    assert product == pytest.approx(2 * 1000)
    assert 0 < way['temporary_mb'] < 100


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
  flags = {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('count=4', 'count=1')}
  command = 'long_run.py --steps 30'
  result = measure(command, bare=False, environment=flags)
  assert {10, 20, 30} <= {row['step'] for row in result['rows']}
  found = compare(result['rows'], 10)
  assert result.items() >= found.items()
  said = f'the last 10: {found["last_milliseconds"]:.1f} ms'
  assert said in result['printed']
  # What a process with jax takes, and no more than a small training does.
  assert 200 < found['first_megabytes'] < 4000


def test_loss_memory_measures_both_losses(measure):
  result = measure('loss_memory.py --smoke', 'times as much memory')
  tiled, plain = result['temporary_bytes'].values()
  assert result['ratio'] == pytest.approx(plain / tiled)
  # Upsampled logits of 2 x 64 x 64 pixels and 10 classes are there for sure.
  assert plain > 4 * 2 * 64 * 64 * 10
  assert set(result['seconds']) == set(WAYS)


def test_tiles_need_an_eighth_of_the_memory():
  """At the rows' batch, crop and classes; compiled, not run."""
  tiled, plain = (temporary_bytes(loss, 16, 512, 150) for loss in WAYS.values())
  assert plain > 4 * 16 * 512 * 512 * 150  # The logits.
  assert tiled <= plain / 8


PIPELINE = 'pipeline.py --samples 4 --rounds 1 --data ade20k'


def test_pipeline_measures_its_data_sets(measure):
  command = f'{PIPELINE} cityscapes_raw --workers 0'
  both = ('ade20k', 'cityscapes_raw')
  result = measure(command, *both, bare=False)
  for data in both:
    rates = result[data]['images_per_second']
    for way in ('one thread', 'one process'):
      assert any(way in name for name in rates)
    stages = result[data]['stages_ms']
    assert min(*rates.values(), *stages.values()) > 0
    assert 'read and decode' in stages


def test_pipeline_tells_of_a_peer_that_does_not_start(run_script):
  words = f'benchmarks/{PIPELINE} --peer false'.split()
  said = run_script(*words, status=1).stderr
  assert 'error: the peer has ended with status 1' in said


@pytest.mark.long
def test_the_training_pipeline_does_not_grow(measure, mini_data_dir):
  command = 'pipeline_memory.py --config configs/ade20k_fcn.py:mini'
  data = f'--samples 2000 --config.data.data_dir={mini_data_dir}'
  result = measure(f'{command} {data}', bare=False)
  rows = result['rows']
  assert [row['samples'] for row in rows] == [208 * i for i in range(1, 11)]
  growth = rows[-1]['peak_mb'] - rows[0]['peak_mb']
  assert f'grew by {growth:.1f} MB' in result['printed']
  # A sample takes 66 kB: one in ten that stayed would make 12 MB.
  assert growth < 10


@pytest.mark.long
def test_train_step_measures_from_a_json_config(measure, tmp_path):
  changes = {'model.head': 'fcn', 'model.radix': 1, 'model.width': 8}
  config = write_config(tmp_path / 'config.json', changes)
  sizes = '--batch_size 4 --crop 64 64 --steps 2'
  result = measure(f'train_step.py {config} {sizes}', 'images_per_second')
  of = {'config': 'ade20k_pspnet_mini', 'devices': '4 x cpu'}
  assert result.items() >= of.items()
  assert 0 < result['cached_compile_seconds'] < result['compile_seconds']
  speed = result['images_per_second']
  assert speed * result['step_ms'] == pytest.approx(4 * 1000)
  # As for a real batch: cross entropy of 150 classes, and 0.4 of it again.
  assert 6 < result['final_loss'] < 8.5
  assert 0 < result['share_of_matmul_rate'] < 1
  assert 0.01 < result['program_gb'] < 1
