"""The ways to write a layer: one function, and those chosen are the best."""

import collections
import json

import jax
import numpy as np
import pytest
from golden.reference import quick_jit, relative_error

from benchmarks import conv_forms, forms_ahead
from benchmarks.scale_model import RESULTS
from resnest_jax.models.implementations import BEST, IMPLEMENTATIONS


def gradients(function, arguments):
  def run(*arguments):
    outputs, pull_back = jax.vjp(function, *arguments)
    return outputs, pull_back(outputs)

  return jax.tree.leaves(quick_jit(run)(*arguments))


@pytest.mark.parametrize(
  'layer',
  [layer for layer in conv_forms.layers(2, 32, 16) if layer.others],
  ids=lambda layer: f'{layer.kind}: {layer.name}',
)
def test_other_ways_are_the_same_function(layer):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    arguments = [rng.standard_normal(shape) for shape in layer.shapes]
    expected = gradients(layer.function, arguments)
    for name, function in layer.others.items():
      found = gradients(function, arguments)
      for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-10, name


def test_conv_forms_measures_every_way_of_every_kind(measure):
  result = measure('conv_forms.py --smoke', 'PSP bottleneck')
  assert {x['kind'] for x in result['layers']} == set(conv_forms.KINDS)
  for layer in result['layers']:
    kind = layer['kind']
    assert layer['chosen'] == conv_forms.chosen(kind)
    for way, times in layer['milliseconds'].items():
      assert len(times) > 1
      assert times.keys() >= set(IMPLEMENTATIONS.get(kind, ()))
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


def test_cycles_are_found():
  text = '"estimated_cycles":"70","x":1} {"estimated_cycles":"5"'
  assert forms_ahead.CYCLES.findall(text) == ['70', '5']


def test_implementations_for_tpus_have_the_fewest_cycles():
  (path,) = RESULTS.glob('forms_ahead-tpu_v5_lite-*.json')
  cycles = collections.defaultdict(collections.Counter)
  for layer in json.loads(path.read_text('utf-8'))['layers']:
    for name, figures in layer['forms'].items():
      cycles[layer['kind']][name] += figures['cycles']
  quickest = {kind: min(found, key=found.get) for kind, found in cycles.items()}
  best = conv_forms.OURS | BEST['tpu']
  assert quickest | {'blocks': best['blocks']} == best  # Of whole networks.
