"""The backbone: true sizes in a padded canvas, dilation, variants, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import (
  TINY,
  filled_variables,
  manifest,
  quick_jit,
  relative_error,
)

from resnest_jax.errors import UserError
from resnest_jax.models.resnest import BACKBONES, DILATION_RULES
from resnest_jax.models.segmentor import create_backbone

SIZES = [(41, 57), (33, 64)]
CANVAS = (48, 64)


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def tiny_backbone(**config):
  """A backbone and random variables of a fixed seed."""
  model = create_backbone(TINY | config)
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False
    )
  )
  return model, filled_variables(shapes)


def stages(model, variables, images, size=None):
  apply = quick_jit(lambda v, x, s: model.apply(v, x, train=False, size=s))
  return apply(variables, images, size)


@pytest.mark.parametrize(
  'config',
  [
    {'output_stride': 8, 'dilation_rule': 'mmseg'},
    {'output_stride': 16, 'dilation_rule': 'official', 'radix': 1},
    {'output_stride': 8, 'dilation_rule': 'timm', 'groups': 2},
    {'output_stride': 32, 'backbone': 'resnest50_fast_2s2x40d', 'width': 16},
  ],
  ids=['mmseg_8', 'official_16', 'timm_8', 'avd_first_32'],
)
def test_features_in_a_padded_canvas_are_those_of_the_image_alone(config):
  model, variables = tiny_backbone(stage_sizes=(1, 1, 1, 1), **config)
  rng = np.random.default_rng(1)
  images = np.zeros((len(SIZES), *CANVAS, 3))
  for image, (height, width) in zip(images, SIZES, strict=True):
    image[:height, :width] = rng.standard_normal((height, width, 3))
  features, sizes = stages(model, variables, images, np.array(SIZES))
  for index, (height, width) in enumerate(SIZES):
    alone, none = stages(
      model, variables, images[index : index + 1, :height, :width]
    )
    assert none == [None] * 4
    for padded, size, expected in zip(features, sizes, alone, strict=True):
      rows, columns = size[index]
      assert (rows, columns) == expected.shape[1:3]
      error = relative_error(padded[index, :rows, :columns], expected[0])
      assert error < 1e-9
      outside = padded[index].at[:rows, :columns].set(0)
      assert not outside.any()


@pytest.fixture(scope='module')
def by_rule():
  """Output stride -> rule -> stage 3 and stage 1 features."""
  images = np.random.default_rng(2).standard_normal((2, 48, 64, 3))
  result = {}
  for stride in (8, 32):
    for rule in DILATION_RULES:
      model, variables = tiny_backbone(output_stride=stride, dilation_rule=rule)
      result[stride, rule] = stages(model, variables, images)[0]
  return result


def test_dilation_rules_agree_undilated(by_rule):
  for rule in ('official', 'timm'):
    for ours, other in zip(
      by_rule[32, 'mmseg'], by_rule[32, rule], strict=True
    ):
      np.testing.assert_array_equal(ours, other)


@pytest.mark.parametrize(
  ('one', 'other'),
  [('mmseg', 'official'), ('mmseg', 'timm'), ('official', 'timm')],
)
def test_dilation_rules_differ_where_dilated(by_rule, one, other):
  pairs = list(zip(by_rule[8, one], by_rule[8, other], strict=True))
  for ours, theirs in pairs[:2]:  # But for how XLA fuses two programs.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)
  for ours, theirs in pairs[2:]:
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) > 1e-3


@pytest.mark.parametrize('stride', [8, 16, 32])
def test_output_stride_sets_the_resolution(stride):
  model = create_backbone(TINY | {'output_stride': stride})
  images = jnp.zeros((1, 96, 160, 3))
  (features, _), _ = jax.eval_shape(
    lambda: model.init_with_output(jax.random.key(0), images, train=False)
  )
  strides = [min(s, stride) for s in (4, 8, 16, 32)]
  assert [f.shape for f in features] == [
    (1, 96 // s, 160 // s, 32 * 2**i) for i, s in enumerate(strides)
  ]


def test_bfloat16_activations_have_float32_parameters():
  model = create_backbone(TINY | {'dtype': 'bfloat16'})
  (features, _), variables = jax.eval_shape(
    lambda: model.init_with_output(
      jax.random.key(0), jnp.zeros((2, 64, 64, 3)), train=True
    )
  )
  assert {f.dtype for f in features} == {jnp.dtype(jnp.bfloat16)}
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    jnp.dtype(jnp.float32)
  }


def parameter_shapes(name):
  as_named = dict.fromkeys(BACKBONES[name]._fields)
  model = create_backbone(TINY | as_named | {'backbone': name})
  variables = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False
    )
  )
  return sorted(leaf.shape for leaf in jax.tree.leaves(variables['params']))


@pytest.mark.parametrize(
  ('name', 'twin'),
  [
    ('resnest50', 'official/resnest50'),
    ('resnest101', 'official/resnest101'),
    ('resnest14', 'timm/resnest14d'),
    ('resnest26', 'timm/resnest26d'),
    ('resnest50_fast_1s4x24d', 'official/resnest50_fast_1s4x24d'),
    ('resnest50_fast_4s2x40d', 'official/resnest50_fast_4s2x40d'),
  ],
)
def test_parameters_are_those_of_the_reference(name, twin):
  reference = [
    shape[2:] + shape[1::-1] if len(shape) == 4 else shape
    for key, shape in manifest(twin).items()
    if not key.startswith('fc.') and key.endswith(('weight', 'bias'))
  ]
  assert parameter_shapes(name) == sorted(reference)


@pytest.mark.parametrize(
  ('key', 'value', 'accepted'),
  [
    ('backbone', 'resnet50', 'resnest14, .*resnest50_fast_1s4x24d'),
    ('dilation_rule', 'gluon', 'mmseg, official, timm'),
    ('output_stride', 4, '8, 16, 32'),
    ('dtype', 'float16', 'float32, bfloat16, float64'),
  ],
)
def test_unknown_name_lists_the_accepted(key, value, accepted):
  with pytest.raises(UserError, match=f'model.{key} is {value!r}.*{accepted}'):
    create_backbone(TINY | {key: value})
