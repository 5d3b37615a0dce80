"""Classifiers against the authors' code and timm, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import reference
from lengths import others_long

from resnest_jax.errors import UserError
from resnest_jax.models.classifier import create_classifier
from resnest_jax.weights.state_dict import import_state_dict, variable_shapes

# Stored by the reference's name -> ours.
GOLDEN = {
  'official_resnest50': 'resnest50',
  'official_resnest50_fast_2s2x40d': 'resnest50_fast_2s2x40d',
  'timm_resnest14d': 'resnest14',
  'timm_resnest50d': 'resnest50',
  'timm_resnest50d_1s4x24d': 'resnest50_fast_1s4x24d',
  'timm_resnest101e': 'resnest101',
}
TINY = {'stem_width': 8, 'width': 8}


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize(
  'name', others_long(GOLDEN, 'official_resnest50_fast_2s2x40d')
)
def test_logits_are_the_references(name):
  golden = reference.load(f'classify_{name}')
  model = create_classifier(GOLDEN[name], dtype='float64')
  shapes = reference.manifest(name.replace('_', '/', 1))
  variables = import_state_dict(model, reference.filled(shapes))
  x = reference.images(int(golden['seed']), 2, *golden['hw'])
  apply = reference.quick_jit(lambda v, x: model.apply(v, x, train=False))
  logits = apply(variables, x)
  assert logits.shape == (2, 1000)
  assert reference.relative_error(logits, golden['logits']) < 1e-8


def test_logits_in_a_padded_canvas_are_those_of_the_image_alone():
  model = create_classifier('resnest14', 5, dtype='float64', **TINY)
  variables = reference.filled_variables(variable_shapes(model))
  apply = reference.quick_jit(
    lambda v, x, s: model.apply(v, x, train=False, size=s)
  )
  image = reference.images(0, 1, 41, 57)
  padded = np.pad(image, ((0, 0), (0, 23), (0, 7), (0, 0)))
  ours = apply(variables, padded, np.array([[41, 57]]))
  alone = apply(variables, image, None)
  assert reference.relative_error(ours, alone) < 1e-9


def test_bfloat16_gives_float32_logits():
  model = create_classifier('resnest14', 5, dtype='bfloat16', **TINY)
  logits, variables = jax.eval_shape(
    lambda: model.init_with_output(
      jax.random.key(0), jnp.zeros((2, 64, 64, 3)), train=False
    )
  )
  assert logits.shape == (2, 5)
  assert {x.dtype for x in (logits, *jax.tree.leaves(variables))} == {
    jnp.dtype(jnp.float32)
  }


def test_unknown_names_list_the_accepted():
  with pytest.raises(UserError, match=r'not know depth; accepted .*radix'):
    create_classifier('resnest50', depth=50)
  with pytest.raises(UserError, match=r"'resnet50'; accepted are resnest14"):
    create_classifier('resnet50')
