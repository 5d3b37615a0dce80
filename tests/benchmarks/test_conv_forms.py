"""`benchmarks/conv_forms.py` measures every form of every kind."""

import json

import pytest
from bare import on_a_bare_machine

from resnest_jax.models import forms


def test_measures_all_forms_on_a_bare_machine(run_script, tmp_path):
  process = run_script(
    *on_a_bare_machine('benchmarks/conv_forms.py'),
    *('--smoke', '--out', tmp_path),
  )
  (path,) = tmp_path.glob('smoke-conv_forms-*.json')
  layers = json.loads(path.read_text())['layers']
  assert {layer['kind'] for layer in layers} == set(forms.LAYERS)
  for layer in layers:
    expected = list(forms.FORMS[layer['kind']])
    expected += ['jax-resnet'] * (layer['kind'] == 'grouped')
    assert layer['chosen'] == forms.chosen(layer['kind'])
    for way, times in layer['milliseconds'].items():
      assert list(times) == expected
      for name, ratio in layer['ratio'][way].items():
        assert ratio == pytest.approx(times[name] / times[layer['chosen']])
  assert path.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
  assert 'PSP bottleneck' in process.stdout
