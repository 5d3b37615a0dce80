"""Backbone and heads together: padded canvas, types, counts, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import (
  CONFIG,
  TINY,
  evaluate,
  relative_error,
  variables_of,
)

from resnest_jax.errors import UserError
from resnest_jax.models.layers import resize, zero_outside
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import variable_shapes

pytestmark = pytest.mark.usefixtures('float64')

SIZES = np.array([(41, 57), (33, 64), (1, 1)])


@pytest.mark.parametrize(
  ('stride', 'indices'), [(8, [0, 2]), (16, [0]), (32, [1])]
)
def test_logits_in_a_padded_canvas_are_those_of_the_image_alone(
  stride, indices
):
  model = create_segmentor(TINY | {'output_stride': stride})
  variables = variables_of(model)
  images = np.random.default_rng(1).standard_normal((3, 48, 64, 3))
  images = zero_outside(images, SIZES)
  padded = evaluate(model, variables, images, SIZES)
  for index in indices:
    here, (height, width) = slice(index, index + 1), SIZES[index]
    alone = evaluate(model, variables, images[here, :height, :width])
    shape = (-(-height // stride), -(-width // stride))
    assert alone.logits.shape[1:3] == shape
    for ours, expected in zip(padded, alone, strict=True):
      rows, columns = expected.shape[1:3]
      ours = ours[here, :rows, :columns]
      assert relative_error(ours, expected) < 1e-9
      size = (int(height), int(width))
      labels = [resize(x, size).argmax(-1) for x in (ours, expected)]
      np.testing.assert_array_equal(*labels)


@pytest.mark.parametrize(
  ('dtype', 'logits'),
  [('float32', 'float32'), ('bfloat16', 'float32'), ('float64', 'float64')],
)
def test_logits_and_parameters_are_at_least_float32(dtype, logits):
  model = create_segmentor(TINY | {'dtype': dtype})
  output, variables = jax.eval_shape(
    lambda: model.init_with_output(
      jax.random.key(0), jnp.zeros((2, 64, 96, 3)), train=False
    )
  )
  assert output.logits.shape == output.aux_logits.shape == (2, 8, 12, 7)
  assert {x.dtype for x in (*output, *jax.tree.leaves(variables))} == {
    jnp.dtype(logits)
  }


def test_bfloat16_logits_are_close_to_the_exact_ones():
  images = np.random.default_rng(3).standard_normal((2, 64, 64, 3))
  models = [
    create_segmentor(TINY | {'dtype': x}) for x in ('bfloat16', 'float64')
  ]
  ours, exact = (evaluate(x, variables_of(x), images).logits for x in models)
  assert relative_error(ours, exact) < 0.05


@pytest.mark.parametrize(
  ('head', 'num_classes', 'total'),
  [
    ('fcn', 19, 72.20),
    ('pspnet', 19, 71.67),
    ('deeplabv3', 19, 90.81),
    ('deeplabv3plus', 19, 66.29),
    ('fcn', 150, 72.30),
    ('pspnet', 150, 71.78),
    ('deeplabv3', 150, 90.91),
    ('deeplabv3plus', 150, 66.39),
  ],
)
def test_parameter_counts_are_the_published_ones(head, num_classes, total):
  model = create_segmentor(CONFIG | {'head': head, 'num_classes': num_classes})
  params = variable_shapes(model)['params']
  millions = {
    part: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
    for part, tree in params.items()
  }
  auxiliary = {19: 2.36, 150: 2.40}[num_classes]
  assert sum(millions.values()) == pytest.approx(total, abs=0.006)
  assert millions['auxiliary_head'] == pytest.approx(auxiliary, abs=0.006)


@pytest.mark.parametrize(
  ('key', 'value', 'accepted'),
  [
    ('backbone', 'resnet50', 'resnest14, .*resnest50_fast_1s4x24d'),
    ('dilation_rule', 'gluon', 'mmseg, official, timm'),
    ('output_stride', 4, '8, 16, 32'),
    ('dtype', 'float16', 'float32, bfloat16, float64'),
    ('head', 'unet', '.*pspnet'),
  ],
)
def test_unknown_name_lists_the_accepted(key, value, accepted):
  with pytest.raises(UserError, match=f'model.{key} is {value!r}.*{accepted}'):
    create_segmentor(TINY | {key: value})
