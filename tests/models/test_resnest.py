"""The backbone: true sizes in a padded canvas, dilation, resolution, types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import TINY, evaluate, relative_error, variables_of

from resnest_jax.models.layers import zero_outside
from resnest_jax.models.segmentor import create_backbone

pytestmark = pytest.mark.usefixtures('float64')

SIZES = np.array([(41, 57), (33, 64)])


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
  model = create_backbone(TINY | {'stage_sizes': (1, 1, 1, 1)} | config)
  variables = variables_of(model)
  images = np.random.default_rng(1).standard_normal((2, 48, 64, 3))
  images = zero_outside(images, SIZES)
  features, sizes = evaluate(model, variables, images, SIZES)
  for index, (height, width) in enumerate(SIZES):
    image = images[index : index + 1, :height, :width]
    alone, none = evaluate(model, variables, image)
    assert none == [None] * 4
    for padded, size, expected in zip(features, sizes, alone, strict=True):
      rows, columns = size[index]
      assert (rows, columns) == expected.shape[1:3]
      error = relative_error(padded[index, :rows, :columns], expected[0])
      assert error < 1e-9
      outside = padded[index].at[:rows, :columns].set(0)
      assert not outside.any()


@functools.cache
def features_of(stride, rule):
  model = create_backbone(
    TINY | {'output_stride': stride, 'dilation_rule': rule}
  )
  images = np.random.default_rng(2).standard_normal((2, 48, 64, 3))
  return evaluate(model, variables_of(model), images)[0]


@pytest.mark.parametrize('rule', ['official', 'timm'])
def test_dilation_rules_agree_undilated(rule):
  jax.tree.map(
    np.testing.assert_array_equal,
    features_of(32, 'mmseg'),
    features_of(32, rule),
  )


@pytest.mark.parametrize(
  ('one', 'other'),
  [('mmseg', 'official'), ('mmseg', 'timm'), ('official', 'timm')],
)
def test_dilation_rules_differ_where_dilated(one, other):
  pairs = list(zip(features_of(8, one), features_of(8, other), strict=True))
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
  images = jnp.zeros((2, 64, 64, 3))
  (features, _), variables = jax.eval_shape(
    lambda: model.init_with_output(jax.random.key(0), images, train=True)
  )
  types = [{x.dtype for x in jax.tree.leaves(t)} for t in (features, variables)]
  assert types == [{jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)}]
