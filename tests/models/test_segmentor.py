"""Networks of every kind: shapes, types, errors."""

import jax
import jax.numpy as jnp
import pytest
from golden.reference import TINY

from resnest_jax.errors import UserError
from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.segmentor import create_backbone, create_segmentor

pytestmark = pytest.mark.usefixtures('float64')


def shapes_of(model):
  """Output and variables."""
  return jax.eval_shape(
    lambda: model.init_with_output(
      jax.random.key(0), jnp.zeros((2, 32, 64, 3)), train=False
    )
  )


@pytest.mark.parametrize(
  ('output_stride', 'strides'),
  [(8, (4, 8, 8, 8)), (16, (4, 8, 16, 16)), (32, (4, 8, 16, 32))],
)
def test_shapes(output_stride, strides):
  config = TINY | {'output_stride': output_stride}
  (features, _), _ = shapes_of(create_backbone(config))
  sizes = [(2, 32 // stride, 64 // stride) for stride in strides]
  channels = (32, 64, 128, 256)
  assert [x.shape for x in features] == [
    (*size, number) for size, number in zip(sizes, channels, strict=True)
  ]
  logits, _ = shapes_of(create_segmentor(config))
  assert [x.shape for x in logits] == [(*sizes[3], 7), (*sizes[2], 7)]


@pytest.mark.parametrize(
  ('dtype', 'wider'),
  [
    ('float32', 'float32'),
    ('bfloat16', 'float32'),
    ('float64', 'float64'),
  ],
)
def test_logits_and_variables_are_at_least_float32(dtype, wider):
  config = TINY | {'dtype': dtype}
  for model, of_output in (
    (create_segmentor(config), wider),
    (create_classifier('resnest14', 5, width=8, dtype=dtype), wider),
    (create_backbone(config), dtype),
  ):
    output, variables = shapes_of(model)
    assert {x.dtype for x in jax.tree.leaves(output)} == {jnp.dtype(of_output)}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(wider)}


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
