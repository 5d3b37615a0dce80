"""`benchmarks/forms_ahead.py`, and what is kept of a TPU's compiler."""

import json
from pathlib import Path

from benchmarks import forms_ahead
from benchmarks.conv_forms import OURS
from resnest_jax.models import implementations

RESULTS = Path(forms_ahead.__file__).parent / 'results'


def test_compiles_all_implementations_for_a_named_device(measure):
  result, printed = measure(
    *('forms_ahead', '--topology', 'cpu', '--smoke'),
    *('--kinds', 'grouped', 'depthwise'),
    bare=False,
  )
  layers = result['layers']
  assert {layer['kind'] for layer in layers} == {'grouped', 'depthwise'}
  for layer in layers:
    assert (
      layer['chosen'] == (OURS | implementations.BEST['cpu'])[layer['kind']]
    )
    assert len(layer['forms']) > 1
    assert layer['chosen'] in layer['forms']
    # The CPU's compiler estimates nothing.
    assert {x['cycles'] for x in layer['forms'].values()} == {None}
  assert '* is chosen on cpu' in printed


def test_cycles_are_summed():
  text = '"estimated_cycles":"70","x":1} {"estimated_cycles":"5"'
  assert sum(map(int, forms_ahead.CYCLES.findall(text))) == 75


def test_implementations_for_tpus_have_the_fewest_cycles():
  (path,) = RESULTS.glob('forms_ahead-tpu_v5_lite-*.json')
  result = json.loads(path.read_text('utf-8'))
  cycles: dict[str, dict[str, int]] = {}
  for layer in result['layers']:
    of_kind = cycles.setdefault(layer['kind'], {})
    for name, figures in layer['forms'].items():
      of_kind[name] = of_kind.get(name, 0) + figures['cycles']
  quickest = {kind: min(found, key=found.get) for kind, found in cycles.items()}
  expected = OURS | implementations.BEST['tpu']
  del expected['blocks']  # Of whole networks.
  assert quickest == expected
