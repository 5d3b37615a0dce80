"""Implementations of a layer against each other, and how one is chosen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import TINY, quick_jit, relative_error

from benchmarks import plain_layers
from resnest_jax.errors import UserError
from resnest_jax.models import implementations, normalization, pooling
from resnest_jax.models.convolution import convolve, depthwise
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.models.winograd import convolve_3x3


def random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


X = random(2, 8, 12, 8)
WIDE = random(1, 33, 32, 1024), random(3, 3, 1024, 1024)
# Kind -> function and arguments.
LAYERS = {
  'kernel_gradient': [
    (lambda x, k: convolve(x, k)[0], X, random(3, 3, 8, 64)),
    (lambda x, k: convolve(x, k, dilation=4)[0], X, random(3, 3, 8, 64)),
    (lambda x, k: convolve(x, k, dilation=8)[0], X, random(3, 3, 8, 64)),
    (lambda x, k: convolve(x, k)[0], X, random(1, 1, 8, 64)),
    (lambda x, k: convolve(x, k)[0], random(2, 3, 3, 96), random(1, 1, 96, 64)),
    (
      lambda x, k: convolve(x, k, dilation=2)[0],
      *(random(2, 5, 4, 96), random(3, 3, 96, 64)),
    ),
    # As it was: a stride.
    (lambda x, k: convolve(x, k, stride=2)[0], X, random(3, 3, 8, 64)),
  ],
  'wide': [
    # As many channels and pixels as it takes.
    (lambda x, k: convolve(x, k)[0], *WIDE),
    # As it was: channels, dilation, stride.
    (lambda x, k: convolve(x, k)[0], X, random(3, 3, 8, 6)),
    (lambda x, k: convolve(x, k, dilation=2)[0], X, random(3, 3, 8, 6)),
    (lambda x, k: convolve(x, k, stride=2)[0], X, random(3, 3, 8, 6)),
  ],
  'depthwise': [
    (depthwise, X, random(3, 3, 1, 8)),
    (lambda x, k: depthwise(x, k, 12), X, random(3, 3, 1, 8)),
  ],
  'pooling': [
    # Of values of which no two are equal, as the gradients at ties differ.
    (lambda x: pooling.max_pool(x, None), np.abs(X)),
    (lambda x: pooling.average_pool(x, 2, None), X),
    (lambda x: pooling.average_pool(x, 1, None), X),
    (lambda x: pooling.shortcut_pool(x, 2, None), random(2, 7, 9, 3)),
    (lambda x: pooling.same_pool(x, None), X),
  ],
}
CASES = [
  (kind, implementation, number)
  for kind, layers in LAYERS.items()
  for implementation in implementations.IMPLEMENTATIONS[kind][1:]
  for number in range(len(layers))
]


def value_and_gradients(layer, *arguments):
  def loss(*arguments):
    y = jnp.concatenate(jax.tree.leaves(layer(*arguments)), -1)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

  places = tuple(range(len(arguments)))
  return quick_jit(jax.grad(loss, places, has_aux=True))(*arguments)


def assert_close(ours, expected, tolerance):
  for a, b in zip(
    jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True
  ):
    assert relative_error(a, b) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize(('kind', 'implementation', 'number'), CASES)
def test_values_and_gradients_are_the_defaults(kind, implementation, number):
  with jax.enable_x64(True):
    default = implementations.IMPLEMENTATIONS[kind][0]
    layer = LAYERS[kind][number]
    with implementations.use(**{kind: default}):
      expected = value_and_gradients(*layer)
    with implementations.use(**{kind: implementation}):
      ours = value_and_gradients(*layer)
  assert_close(ours, expected, 1e-10)


GROUPED = [
  ({'groups': 2, 'parts': 2}, random(3, 3, 4, 6)),
  ({'groups': 4, 'parts': 2, 'dilation': 2}, random(3, 3, 2, 8)),
  ({'groups': 2, 'stride': 2}, random(3, 3, 4, 6)),
  ({'groups': 4}, random(1, 1, 2, 8)),
  ({}, random(1, 1, 8, 6)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(('more', 'kernel'), GROUPED)
def test_groups_and_single_taps_are_those_of_xlas_convolution(more, kernel):
  with jax.enable_x64(True):
    ours, expected = (
      value_and_gradients(partial(function, **more), X, kernel)
      for function in (convolve, plain_layers.convolve)
    )
  assert_close(ours, expected, 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize('relu', [False, True])
def test_normalisation_has_the_gradients_of_its_formula(relu):
  with jax.enable_x64(True):
    ours, expected = (
      value_and_gradients(
        lambda x, s, b, normalize=normalize: normalize(x, s, b, 1e-5, relu)[0],
        *(X, random(8, seed=1), random(8, seed=2)),
      )
      for normalize in (normalization.normalize, plain_layers.normalize)
    )
  assert_close(ours, expected, 1e-10)


@pytest.mark.parametrize('length', [1, 2, 7])
def test_winograds_convolution_of_any_size(length):
  with jax.enable_x64(True):
    layers = (
      convolve_3x3,
      lambda x, k: convolve(x, k)[0],
    )
    ours, expected = (
      value_and_gradients(
        layer, random(2, length, 6, 5), random(3, 3, 5, 4, seed=1)
      )
      for layer in layers
    )
  assert_close(ours, expected, 1e-12)


def test_few_pixels_and_few_digits_are_not_for_winograd():
  with implementations.use(wide='winograd'):
    for x in (WIDE[0][:, :8], WIDE[0].astype(jnp.bfloat16)):
      text = str(
        jax.make_jaxpr(lambda x, k: convolve(x, k)[0])(
          x, WIDE[1].astype(x.dtype)
        )
      )
      assert 'conv_general_dilated' in text


WRITTEN = {
  ('kernel_gradient', 'convolution'): (lambda t: 'custom_vjp' not in t),
  ('kernel_gradient', 'products'): (lambda t: 'custom_vjp' in t),
  ('wide', 'convolution'): (lambda t: t.count('dot_general') == 0),
  ('wide', 'winograd'): (
    lambda t: t.count('dot_general') == 16 and 'conv_general' not in t
  ),
  ('depthwise', 'shifts'): (lambda t: 'conv_general' not in t),
  ('depthwise', 'convolution'): (lambda t: 'feature_group_count=8' in t),
  ('pooling', 'slices'): (lambda t: 'reduce_window' not in t),
  ('pooling', 'reduce_window'): (lambda t: 'reduce_window_max' in t),
}


@pytest.mark.parametrize(('kind', 'implementation'), WRITTEN)
def test_program_is_what_the_name_says(kind, implementation):
  with implementations.use(**{kind: implementation}):
    text = str(jax.make_jaxpr(LAYERS[kind][0][0])(*LAYERS[kind][0][1:]))
  assert WRITTEN[kind, implementation](text)


def test_groups_are_convolutions_apart_and_single_taps_products():
  def written(kernel, **more):
    return str(jax.make_jaxpr(partial(convolve, **more))(X, kernel))

  text = written(random(3, 3, 4, 6), groups=2, parts=2)
  assert text.count('conv_general_dilated[') == 2
  assert 'feature_group_count=2' not in text
  text = written(random(1, 1, 8, 6))
  assert 'dot_general' in text
  assert 'conv_general' not in text


def test_plain_network_is_written_as_flax_would():
  config = TINY | {'head': 'pspnet', 'dtype': 'float32'}
  model = create_segmentor(config)
  shapes = variable_shapes(model)
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

  def written():
    run = partial(model.apply, train=True, mutable=['batch_stats'])
    key = {'dropout': jax.random.key(0)}
    return str(jax.make_jaxpr(lambda v, x: run(v, x, rngs=key))(shapes, images))

  ours = written()
  with plain_layers.plain_network():
    plain = written()
  assert written() == ours
  for name in ('feature_group_count=2', 'reduce_window_max'):
    assert name in plain
    assert name not in ours
  assert 'custom_vjp' in ours
  assert 'custom_vjp' not in plain


def test_every_platform_has_an_implementation_of_every_kind():
  assert set(implementations.BEST) == {'cpu', 'gpu', 'tpu'}
  for table in implementations.BEST.values():
    assert table.keys() == implementations.IMPLEMENTATIONS.keys()
    assert all(
      implementation in implementations.IMPLEMENTATIONS[kind]
      for kind, implementation in table.items()
    )
  assert LAYERS.keys() == set(implementations.LAYERS)
  # Each is chosen somewhere.
  for kind, accepted in implementations.IMPLEMENTATIONS.items():
    assert {table[kind] for table in implementations.BEST.values()} == set(
      accepted
    )


def test_choices_nest_and_end():
  default = implementations.current()
  with implementations.use(pooling='reduce_window'):
    with implementations.use(depthwise='convolution'):
      assert implementations.chosen('depthwise') == 'convolution'
      assert implementations.chosen('pooling') == 'reduce_window'
    assert implementations.chosen('depthwise') == dict(default)['depthwise']
  assert implementations.current() == default


def test_another_platform_has_its_own_table():
  assert implementations.chosen('depthwise') == 'shifts'
  with implementations.use('tpu'):
    assert implementations.chosen('depthwise') == 'convolution'
    with implementations.use(pooling='slices'):
      assert implementations.chosen('depthwise') == 'convolution'


def test_compiled_function_is_traced_again_under_another_choice():
  traced = []

  @jax.jit
  def layer(x):
    traced.append(implementations.chosen('depthwise'))
    return x

  layer(1.0)
  with implementations.use(depthwise='convolution'):
    layer(1.0)
    layer(1.0)
  layer(1.0)
  assert traced == ['shifts', 'convolution']


def test_unknown_names():
  with pytest.raises(UserError, match=r"wide is 'fast'; .* winograd"):
    implementations.use(wide='fast')
  with pytest.raises(UserError, match=r"'wine' is no kind of layer; .* wide"):
    implementations.use(wine='convolution')
  with pytest.raises(UserError, match=r"platform is 'cuda'; .* cpu, gpu, tpu"):
    implementations.use('cuda')
