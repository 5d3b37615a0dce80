"""The heads alone: true sizes in a padded canvas, and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import assert_gradients_local
from golden.reference import TINY, quick_jit, relative_error, variables_of

from resnest_jax.models.layers import zero_outside
from resnest_jax.models.segmentor import HEADS, create_segmentor

# Of the four stages at output stride 8: images of 41 x 57, 33 x 64, 1 x 1.
SIZES = [
  np.array([[11, 15], [9, 16], [1, 1]]),
  *3 * [np.array([[6, 8], [5, 8], [1, 1]])],
]
SHAPES = [(12, 16, 32), (6, 8, 64), (6, 8, 128), (6, 8, 256)]


def head_of(name, dtype):
  """A head, and random variables of it."""
  config = TINY | {'dtype': dtype} | ({'head': name} if name in HEADS else {})
  model = create_segmentor(config)
  part = 'decode_head' if name in HEADS else 'auxiliary_head'
  variables = {key: tree[part] for key, tree in variables_of(model).items()}
  return getattr(model, part), variables


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('name', [*HEADS, 'auxiliary'])
def test_logits_in_a_padded_canvas_are_those_of_the_image_alone(name):
  head, variables = head_of(name, 'float64')
  apply = quick_jit(lambda v, x, s: head.apply(v, x, train=False, sizes=s))
  rng = np.random.default_rng(0)
  features = [
    zero_outside(rng.standard_normal((3, *shape)), sizes)
    for shape, sizes in zip(SHAPES, SIZES, strict=True)
  ]
  padded = apply(variables, features, SIZES)
  for index in range(3):
    here = slice(index, index + 1)
    alone = [
      x[here, : size[index, 0], : size[index, 1]]
      for x, size in zip(features, SIZES, strict=True)
    ]
    expected = apply(variables, alone, [None] * 4)
    rows, columns = SIZES[0 if name == 'deeplabv3plus' else 3][index]
    assert expected.shape == (1, rows, columns, 7)
    assert relative_error(padded[here, :rows, :columns], expected) < 1e-12


@pytest.mark.parametrize('name', HEADS)
def test_no_device_gathers_the_batch(name):
  head, variables = head_of(name, 'float32')
  options = {'train': True, 'sizes': [None] * 4, 'mutable': 'batch_stats'}
  rngs = {'dropout': jax.random.key(0)}
  assert_gradients_local(
    lambda v, x: head.apply(v, x, **options, rngs=rngs),
    variables,
    [jax.ShapeDtypeStruct((8, *x), jnp.float32) for x in SHAPES],
  )
