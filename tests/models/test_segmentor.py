"""Backbone and heads together: padded canvas, types, counts, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import (
  CONFIG,
  TINY,
  filled_variables,
  quick_jit,
  relative_error,
)

from resnest_jax.errors import UserError
from resnest_jax.models.layers import resize
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import variable_shapes

SIZES = [(41, 57), (33, 64), (1, 1)]
CANVAS = (48, 64)


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def check_padded(model, sizes):
  """Each image's logits in one padded batch against its own run's."""
  variables = filled_variables(variable_shapes(model))
  apply = quick_jit(lambda v, x, s: model.apply(v, x, train=False, size=s))
  rng = np.random.default_rng(1)
  images = np.zeros((len(SIZES), *CANVAS, 3))
  for image, (height, width) in zip(images, SIZES, strict=True):
    image[:height, :width] = rng.standard_normal((height, width, 3))
  padded = apply(variables, images, np.array(SIZES))
  stride = model.backbone.output_stride
  for height, width in sizes:
    index = SIZES.index((height, width))
    alone = apply(variables, images[index : index + 1, :height, :width], None)
    rows, columns = -(-height // stride), -(-width // stride)
    assert alone.logits.shape[1:3] == (rows, columns)
    for ours, expected in zip(padded, alone, strict=True):
      rows, columns = expected.shape[1:3]
      ours = ours[index : index + 1, :rows, :columns]
      assert relative_error(ours, expected) < 1e-9
      labels = [resize(x, (height, width)).argmax(-1) for x in (ours, expected)]
      assert (labels[0] != labels[1]).sum() == 0


@pytest.mark.parametrize(
  ('stride', 'sizes'), [(8, SIZES[::2]), (16, SIZES[:1]), (32, SIZES[1:2])]
)
def test_logits_in_a_padded_canvas_are_those_of_the_image_alone(stride, sizes):
  check_padded(create_segmentor(TINY | {'output_stride': stride}), sizes)


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
  outputs = {}
  for dtype in ('bfloat16', 'float64'):
    model = create_segmentor(TINY | {'dtype': dtype})
    variables = filled_variables(variable_shapes(model))
    apply = quick_jit(lambda v, x, m=model: m.apply(v, x, train=False))
    outputs[dtype] = apply(variables, images).logits
  assert relative_error(outputs['bfloat16'], outputs['float64']) < 0.05


@pytest.mark.parametrize(
  ('head', 'num_classes', 'total', 'auxiliary'),
  [
    ('fcn', 19, 72.20, 2.36),
    ('pspnet', 19, 71.67, 2.36),
    ('deeplabv3', 19, 90.81, 2.36),
    ('deeplabv3plus', 19, 66.29, 2.36),
    ('fcn', 150, 72.30, 2.40),
    ('pspnet', 150, 71.78, 2.40),
    ('deeplabv3', 150, 90.91, 2.40),
    ('deeplabv3plus', 150, 66.39, 2.40),
  ],
)
def test_parameter_counts_are_the_published_ones(
  head, num_classes, total, auxiliary
):
  model = create_segmentor(CONFIG | {'head': head, 'num_classes': num_classes})
  params = variable_shapes(model)['params']
  millions = {
    part: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
    for part, tree in params.items()
  }
  assert sum(millions.values()) == pytest.approx(total, abs=0.006)
  assert millions['auxiliary_head'] == pytest.approx(auxiliary, abs=0.006)


def test_unknown_head_lists_the_accepted():
  with pytest.raises(UserError, match=r"model.head is 'unet'.*pspnet"):
    create_segmentor(TINY | {'head': 'unet'})
