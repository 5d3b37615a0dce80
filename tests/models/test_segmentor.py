"""Networks and their parts: types, errors, true sizes, dilation."""

from functools import partial

import jax
import numpy as np
import pytest
from collectives import assert_gradients_local
from golden import reference
from golden.reference import TINY, evaluate, random, relative_error, struct

from resnest_jax.errors import UserError
from resnest_jax.models import segmentor
from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.layers import zero_outside
from resnest_jax.models.segmentor import create_backbone, create_segmentor

pytestmark = pytest.mark.usefixtures('float64')


@pytest.mark.parametrize(
  ('dtype', 'wider'),
  [('float32', 'float32'), ('bfloat16', 'float32'), ('float64', 'float64')],
)
def test_logits_and_variables_are_at_least_float32(dtype, wider):
  config = TINY | {'dtype': dtype}
  for model, of_output in (
    (create_segmentor(config), wider),
    (create_classifier('resnest14', 5, width=8, dtype=dtype), wider),
    (create_backbone(config), dtype),
  ):
    init = partial(model.init_with_output, train=False)
    images = struct(2, 32, 64, 3, dtype='float64')
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    types = jax.tree.map(lambda x: str(x.dtype), shapes)
    assert [set(jax.tree.leaves(x)) for x in types] == [{of_output}, {wider}]


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


SIZES = np.array([(41, 57), (33, 64), (1, 1)])
ONE_BLOCK = TINY | {'stage_sizes': (1, 1, 1, 1)}


def made(**changes):
  model = create_backbone(ONE_BLOCK | changes)
  return model, reference.variables_of(model)


@pytest.mark.parametrize(
  'config',
  [
    {'output_stride': 8, 'dilation_rule': 'mmseg'},
    {'output_stride': 16, 'dilation_rule': 'official', 'radix': 1},
    {'output_stride': 8, 'dilation_rule': 'timm', 'groups': 2},
    {'output_stride': 32, 'backbone': 'resnest50_fast_2s2x40d', 'width': 16},
  ],
)
def test_features_in_a_padded_canvas_are_those_of_the_image_alone(config):
  network = made(**config)
  images = zero_outside(random(3, 48, 64, 3, seed=1), SIZES)
  features, sizes = evaluate(*network, images, SIZES)
  for index, (height, width) in enumerate(SIZES):
    alone, none = evaluate(*network, images[index, None, :height, :width])
    assert none == [None] * 4
    for padded, size, expected in zip(features, sizes, alone, strict=True):
      rows, columns = size[index]
      assert (rows, columns) == expected.shape[1:3]
      error = relative_error(padded[index, :rows, :columns], expected[0])
      assert error < 1e-9
      assert not padded[index].at[:rows, :columns].set(0).any()


def test_dilation_rules_differ_in_dilated_stages_alone():
  images = random(2, 48, 64, 3)
  expected, *others = (
    evaluate(*made(output_stride=32, dilation_rule=rule), images)[0]
    for rule in ('mmseg', 'official', 'timm')
  )
  for features in others:
    jax.tree.map(np.testing.assert_array_equal, features, expected)


# Of the four stages: those images and their canvas.
HEAD_SIZES = -(-SIZES // np.array([4, 8, 8, 8])[:, None, None])
SHAPES = [(12, 16, 32), (6, 8, 64), (6, 8, 128), (6, 8, 256)]


@pytest.mark.parametrize('name', [*segmentor.HEADS, 'auxiliary'])
def test_logits_in_a_padded_canvas_are_those_of_the_image_alone(name):
  head, variables = reference.head_of(name)
  apply = reference.quick_jit(partial(head.apply, train=False))
  features = [
    zero_outside(random(3, *shape, seed=shape[-1]), sizes)
    for shape, sizes in zip(SHAPES, HEAD_SIZES, strict=True)
  ]
  padded = apply(variables, features, sizes=list(HEAD_SIZES))
  for index in range(3):
    here, sizes = slice(index, index + 1), HEAD_SIZES[:, index]
    pairs = zip(features, sizes, strict=True)
    alone = [x[here, :height, :width] for x, (height, width) in pairs]
    expected = apply(variables, alone, sizes=[None] * 4)
    rows, columns = sizes[0 if name == 'deeplabv3plus' else 3]
    assert expected.shape == (1, rows, columns, 7)
    assert relative_error(padded[here, :rows, :columns], expected) < 1e-12


@pytest.mark.parametrize('name', segmentor.HEADS)
def test_no_device_gathers_the_batch(name):
  head, variables = reference.head_of(name, 'float32')
  options = {'train': True, 'sizes': [None] * 4, 'mutable': 'batch_stats'}
  apply = partial(head.apply, **options, rngs={'dropout': jax.random.key(0)})
  shapes = [struct(8, *shape) for shape in SHAPES]
  assert_gradients_local(apply, variables, shapes)
