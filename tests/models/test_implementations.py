"""Implementations of a layer against each other, and how one is chosen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import TINY, relative_error

from benchmarks import plain_layers
from resnest_jax.errors import UserError
from resnest_jax.models import implementations, pooling
from resnest_jax.models.convolution import convolve, depthwise
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.models.winograd import convolve_3x3


def random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def conv(x, kernel, **options):
  return convolve(x, kernel, **options)[0]


X = random(2, 8, 12, 8)
# As many channels and pixels as Winograd's convolution takes.
WIDE = random(1, 33, 32, 1024), random(3, 3, 1024, 1024)
# Kind -> functions and their arguments.
LAYERS = {
  'kernel_gradient': [
    (conv, X, random(3, 3, 8, 64)),
    (partial(conv, dilation=8), X, random(3, 3, 8, 64)),
    (conv, X, random(1, 1, 8, 64)),
    (conv, random(2, 3, 3, 96), random(1, 1, 96, 64)),
    (partial(conv, dilation=2), random(2, 5, 4, 96), random(3, 3, 96, 64)),
    (partial(conv, stride=2), X, random(3, 3, 8, 64)),
  ],
  'wide': [(conv, *WIDE), (conv, X, random(3, 3, 8, 6))],
  'depthwise': [
    (depthwise, X, random(3, 3, 1, 8)),
    (partial(depthwise, dilation=12), X, random(3, 3, 1, 8)),
  ],
  'pooling': [
    # Of values of which no two are equal, as the gradients at ties differ.
    (partial(pooling.max_pool, size=None), np.abs(X)),
    (partial(pooling.average_pool, stride=2, size=None), X),
    (partial(pooling.average_pool, stride=1, size=None), X),
    (partial(pooling.shortcut_pool, stride=2, size=None), random(2, 7, 9, 3)),
    (partial(pooling.same_pool, size=None), X),
  ],
}


def value_and_gradients(layer, *arguments):
  y, back = jax.vjp(jax.jit(layer), *arguments)
  return y, *back(jnp.cos(jnp.arange(y.size)).reshape(y.shape))


def assert_close(ours, expected, tolerance):
  for one, other in zip(ours, expected, strict=True):
    assert relative_error(one, other) < tolerance


@pytest.mark.gpu
@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
  ('kind', 'number'),
  [(kind, i) for kind, layers in LAYERS.items() for i in range(len(layers))],
)
def test_values_and_gradients_are_the_defaults(kind, number):
  results = []
  for implementation in implementations.IMPLEMENTATIONS[kind]:
    with implementations.use(**{kind: implementation}):
      results.append(value_and_gradients(*LAYERS[kind][number]))
  assert_close(results[1], results[0], 1e-10)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('length', [1, 2, 7])
def test_winograds_convolution_of_any_size(length):
  arrays = random(2, length, 6, 5), random(3, 3, 5, 4, seed=1)
  ours, expected = (
    value_and_gradients(layer, *arrays) for layer in (convolve_3x3, conv)
  )
  assert_close(ours, expected, 1e-12)


@pytest.mark.parametrize(
  ('x', 'options'),
  [
    (WIDE[0][:, :8], {}),
    (WIDE[0].astype(jnp.bfloat16), {}),
    (WIDE[0], {'stride': 2}),
    (WIDE[0], {'dilation': 2}),
  ],
  ids=['few_pixels', 'few_digits', 'stride', 'dilation'],
)
def test_what_winograd_is_not_for(x, options):
  with implementations.use(wide='winograd'):
    layer = jax.make_jaxpr(partial(conv, **options))
    assert 'conv_general' in str(layer(x, WIDE[1].astype(x.dtype)))


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
  layer, *arguments = LAYERS[kind][0]
  with implementations.use(**{kind: implementation}):
    text = str(jax.make_jaxpr(layer)(*arguments))
  assert WRITTEN[kind, implementation](text)


def test_single_taps_are_products():
  assert 'conv_general' not in str(jax.make_jaxpr(conv)(X, random(1, 1, 8, 6)))


def test_plain_network_is_written_as_flax_would():
  model = create_segmentor(TINY | {'head': 'pspnet', 'dtype': 'float32'})
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

  def written():
    run = partial(model.apply, train=True, mutable=['batch_stats'])
    key = {'dropout': jax.random.key(0)}
    trace = jax.make_jaxpr(lambda v, x: run(v, x, rngs=key))
    return str(trace(variable_shapes(model), images))

  ours = written()
  with plain_layers.plain_network():
    plain = written()
  assert written() == ours
  for name in ('feature_group_count=2', 'reduce_window_max'):
    assert name in plain
    assert name not in ours
  assert 'custom_vjp' in ours
  assert 'custom_vjp' not in plain


def test_every_implementation_is_some_platforms_best():
  assert implementations.BEST.keys() == {'cpu', 'gpu', 'tpu'}
  assert LAYERS.keys() == set(implementations.LAYERS)
  for kind, accepted in implementations.IMPLEMENTATIONS.items():
    best = {table[kind] for table in implementations.BEST.values()}
    assert best == set(accepted)


def test_choices_nest_and_end_and_each_is_traced_once():
  traced = []

  @jax.jit
  def layer(x):
    traced.append([*map(implementations.chosen, ('depthwise', 'pooling'))])

  layer(1.0)
  with implementations.use('tpu'):
    layer(1.0)
    with implementations.use(pooling='slices'):
      layer(1.0)
  with implementations.use(depthwise='convolution'):
    layer(1.0)
    layer(1.0)
  layer(1.0)
  assert traced == [
    ['shifts', 'slices'],
    ['convolution', 'reduce_window'],
    ['convolution', 'slices'],
    ['convolution', 'slices'],
  ]


def test_unknown_names():
  with pytest.raises(UserError, match=r"wide is 'fast'; .* winograd"):
    implementations.use(wide='fast')
  with pytest.raises(UserError, match=r"'wine' is no kind of layer; .* wide"):
    implementations.use(wine='convolution')
  with pytest.raises(UserError, match=r"platform is 'cuda'; .* cpu, gpu, tpu"):
    implementations.use('cuda')
