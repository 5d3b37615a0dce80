"""The full-size rows against mmsegmentation's stored logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import reference

from resnest_jax.models.layers import resize
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import import_state_dict

ROWS = ['ade20k_pspnet', 'cityscapes_pspnet']


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
