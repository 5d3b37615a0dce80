"""The scripts of benchmarks/ measure what they say, if they may on little."""

import argparse
import collections
import json
import os

import jax
import numpy as np
import pytest
from golden.reference import relative_error
from small import MINI

from benchmarks import conv_forms, flags, scale_model
from benchmarks.long_run import compare
from benchmarks.loss_memory import WAYS, temporary_bytes
from resnest_jax.config import config_to_json, load_config
from resnest_jax.errors import UserError
from resnest_jax.models.implementations import BEST, IMPLEMENTATIONS

# A machine that has jax, flax, optax, NumPy and matplotlib, and none of these.
BARE = """
import runpy, sys
words = 'array_record cv2 grain ml_collections tensorboardX tensorflow_datasets'
sys.modules.update(dict.fromkeys(words.split()))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture
def measure(run_script, tmp_path):
  """`measure('x.py --smoke', 'done')`: its result; 'done' has been printed."""

  def measure(command, *said, bare=True, **options):
    out = tmp_path / 'results'
    words = f'benchmarks/{command} --out {out}'.split()
    process = run_script(*(('-c', BARE) if bare else ()), *words, **options)
    (path,) = out.glob('*.json')
    if bare and '--smoke' in words:
      assert path.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    assert [words for words in said if words not in process.stdout] == []
    return json.loads(path.read_text('utf-8')) | {'printed': process.stdout}

  return measure


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
  ('compile_ahead.py --topologies cpu --effort 3', 'choose from -1'),
  ('train_step.py --config no.json', '--config no.json cannot be'),
  ('scale_model.py --results docs', '--results docs has no compile'),
)


@pytest.mark.parametrize(('command', 'said'), MISTAKES)
def test_mistakes_are_told_at_once(command, said, call_script, capsys):
  with pytest.raises((SystemExit, UserError)) as error:
    call_script(*f'benchmarks/{command}'.split())
  assert said in capsys.readouterr().err + str(error.value)


@pytest.mark.long
def test_against_torch_compares_the_same_network(measure):
  result = measure('against_torch.py --smoke', 'times ours')
  assert {*result['milliseconds']['train']} == {'ours', 'plain forms', 'torch'}
  for task, times in result['milliseconds'].items():
    for name, ratio in result['ratio'][task].items():
      assert ratio == pytest.approx(times[name] / times['ours'])
  assert max(result['logits_differ_by'].values()) < 1e-4
  # Before a step and after it.
  for losses in result['losses'].values():
    assert losses == pytest.approx(result['losses']['torch'], rel=1e-4)
  assert len(set(result['losses']['ours'])) == 2


@pytest.mark.long
def test_evaluate_measures_one_evaluation_in_two_ways(measure, tmp_path, root):
  changes = {'eval.bucket': 256, 'model.head': 'fcn'}
  code = f'import small\nget_config = lambda: small.small_config(**{changes})'
  (tmp_path / 'tiny.py').write_text(code)
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
  (tmp_path / 'x.json').write_text(config_to_json(load_config(MINI)))
  command = f'inference.py --config {tmp_path}/x.json --batch_size 2 --smoke'
  result = measure(command, 'pixels differ')
  assert result['pixels'] == 2 * 32 * 48
  # Only where two classes are as good as equal.
  assert result['pixels_that_differ'] < 0.01 * result['pixels']
  assert set(result['ways']) == {'variables as inputs', 'norms folded'}
  for way in result['ways'].values():
    assert way['images_per_second'] * way['milliseconds'] == pytest.approx(2000)
    assert 0 < way['temporary_mb'] < 100


def test_long_run_compares_first_and_last_steps_after_the_warm_up():
  at = range(10, 101, 10)
  rows = [{'step': x, 'milliseconds': x / 2, 'megabytes': 3 * x} for x in at]
  assert compare(rows, 20) == {
    'first_milliseconds': 17.5,  # Of steps 30 and 40.
    'first_megabytes': 105,
    'last_milliseconds': 47.5,  # Of steps 90 and 100.
    'last_megabytes': 285,
  }


@pytest.mark.long
def test_long_run_watches_a_training_from_start_to_end(measure):
  one = {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('count=4', 'count=1')}
  result = measure('long_run.py --steps 30', bare=False, environment=one)
  assert {10, 20, 30} <= {row['step'] for row in result['rows']}
  found = compare(result['rows'], 10)
  assert result.items() >= found.items()
  last = found['last_milliseconds']
  assert f'the last 10: {last:.1f} ms' in result['printed']
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
  # At the rows' batch, crop and classes; compiled, not run.
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
  config = config_to_json(load_config(MINI, changes))
  (tmp_path / 'x.json').write_text(config)
  command = f'train_step.py --config {tmp_path}/x.json --batch_size 4'
  result = measure(f'{command} --crop 64 64 --steps 2', 'images_per_second')
  of = {'config': 'ade20k_pspnet_mini', 'devices': '4 x cpu'}
  assert result.items() >= of.items()
  assert 0 < result['cached_compile_seconds'] < result['compile_seconds']
  assert result['images_per_second'] * result['step_ms'] == pytest.approx(4000)
  # As for a real batch: cross entropy of 150 classes, and 0.4 of it again.
  assert 6 < result['final_loss'] < 8.5
  assert 0 < result['share_of_matmul_rate'] < 1
  assert 0.01 < result['program_gb'] < 1


# --- The ways to write a layer ------------------------------------------------

LAYERS = [layer for layer in conv_forms.layers(2, 32, 16) if layer.others]


@pytest.mark.parametrize('layer', LAYERS, ids=lambda x: f'{x.kind}: {x.name}')
def test_other_ways_are_the_same_function(layer):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    arguments = [rng.standard_normal(shape) for shape in layer.shapes]
    ways = conv_forms.lowered(layer, arguments)['with backward']
    found = {
      k: jax.tree.leaves(x.compile()(*arguments)) for k, x in ways.items()
    }
  expected = found.pop(conv_forms.OURS[layer.kind])
  assert found.keys() == layer.others.keys()
  for name, leaves in found.items():
    for a, b in zip(leaves, expected, strict=True):
      assert relative_error(a, b) < 1e-10, name


def test_conv_forms_measures_every_way_of_every_kind(measure):
  result = measure('conv_forms.py --smoke', 'PSP bottleneck')
  assert {x['kind'] for x in result['layers']} == set(conv_forms.KINDS)
  for layer in result['layers']:
    assert layer['chosen'] == conv_forms.chosen(layer['kind'])
    for way, times in layer['milliseconds'].items():
      assert len(times) > 1
      assert times.keys() >= set(IMPLEMENTATIONS.get(layer['kind'], ()))
      for name, ratio in layer['ratio'][way].items():
        assert ratio == pytest.approx(times[name] / times[layer['chosen']])


def test_forms_ahead_compiles_all_ways_for_a_named_device(measure):
  command = 'forms_ahead.py --topology cpu --smoke --kinds grouped depthwise'
  result = measure(command, '* is chosen on cpu', bare=False)
  chosen = {x['kind']: x['chosen'] for x in result['layers']}
  best = conv_forms.OURS | BEST['cpu']
  assert chosen == {kind: best[kind] for kind in ('grouped', 'depthwise')}
  for layer in result['layers']:
    assert len(layer['forms']) > 1
    assert layer['chosen'] in layer['forms']
    # The CPU's compiler estimates nothing.
    assert {x['cycles'] for x in layer['forms'].values()} == {None}


def test_implementations_for_tpus_have_the_fewest_cycles():
  (path,) = scale_model.RESULTS.glob('forms_ahead-tpu_v5_lite-*.json')
  cycles = collections.defaultdict(collections.Counter)
  for layer in json.loads(path.read_text('utf-8'))['layers']:
    for name, figures in layer['forms'].items():
      cycles[layer['kind']][name] += figures['cycles']
  quickest = {kind: min(found, key=found.get) for kind, found in cycles.items()}
  best = conv_forms.OURS | BEST['tpu']
  of_no_layer = {kind: best[kind] for kind in ('blocks', 'argmax', 'rows')}
  assert quickest | of_no_layer == best
