"""The full-size rows against mmsegmentation's stored logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import reference

from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.layers import resize
from resnest_jax.models.segmentor import HEADS, create_segmentor
from resnest_jax.weights.state_dict import import_state_dict

ROWS = [f'{data}_{head}' for data in ('ade20k', 'cityscapes') for head in HEADS]


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def run(row, golden, dtype):
  """Logits (B, h, w, classes) of the row with the reference's weights."""
  model = create_segmentor(
    reference.CONFIG
    | {
      'head': row.split('_')[1],
      'num_classes': golden['logits'].shape[1],
      'dtype': dtype,
    }
  )
  state_dict = reference.filled(reference.manifest(f'mmseg/{row}'))
  variables = import_state_dict(model, state_dict)
  x = reference.images(int(golden['seed']), 2, *golden['hw'])
  return jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)


@pytest.mark.parametrize('row', ROWS)
def test_logits_are_mmsegmentations(row):
  golden = reference.load(f'forward_{row}')
  output = run(row, golden, 'float64')
  for name in ('logits', 'aux_logits'):
    ours = getattr(output, name).transpose(0, 3, 1, 2)
    assert ours.shape == golden[name].shape
    assert reference.relative_error(ours, golden[name]) < 1e-8


def test_float32_labels_are_mmsegmentations():
  golden = reference.load('forward_ade20k_pspnet')
  ours = run('ade20k_pspnet', golden, 'float32').logits
  assert ours.dtype == jnp.float32
  expected = golden['logits'].transpose(0, 2, 3, 1)
  labels = [
    np.asarray(resize(jnp.asarray(x), tuple(golden['hw']))).argmax(-1)
    for x in (ours, expected)
  ]
  assert np.mean(labels[0] == labels[1]) >= 0.999


@pytest.mark.parametrize('rule', ['official', 'timm'])
def test_dilated_stages_are_those_of_the_rules_source(rule):
  """The authors' `dilated=True` and timm's `output_stride=8`."""
  golden = reference.load(f'dilated_{rule}_resnest26')
  model = create_classifier(
    'resnest26', output_stride=8, dilation_rule=rule, dtype='float64'
  ).backbone
  state_dict = reference.filled(reference.manifest('timm/resnest26d'))
  variables = import_state_dict(model, state_dict, drop=('fc',))
  x = reference.images(int(golden['seed']), 2, *golden['hw'])
  apply = jax.jit(lambda v, x: model.apply(v, x, train=False))
  features, _ = apply(variables, x)
  for stage in (3, 4):
    assert features[stage - 1].shape[1:3] == (8, 12)
    ours = features[stage - 1].transpose(0, 3, 1, 2).ravel()
    expected = golden[f'stage{stage}']
    every = int(golden['every'])
    assert reference.relative_error(ours[::every], expected) < 1e-8
