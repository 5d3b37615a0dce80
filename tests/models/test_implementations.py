"""Implementations of a layer: how they are chosen, and what they count."""

from functools import partial

import jax
import numpy as np
import pytest
from golden.reference import TINY, assert_close, random, struct, with_gradients

from benchmarks import plain_layers
from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.models import implementations, pooling, pyramid
from resnest_jax.models.convolution import convolve, depthwise
from resnest_jax.models.flops import count_flops
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.models.winograd import convolve_3x3


def conv(x, kernel, **options):
  return convolve(x, kernel, **options)[0]


X = random(2, 8, 12, 8)
# As many channels and pixels as Winograd's convolution takes.
WIDE = random(1, 33, 32, 1024), random(3, 3, 1024, 1024)
IMAGE = np.abs(random(2, 9, 8, 3))
# Functions with a kernel, stride, padding, what it reduces, and a divisor.
POOLS = [
  (pooling.max_pool, 3, 2, 1, 'max', 1),
  (partial(pooling.average_pool, stride=2), 3, 2, 1, 'sum', 9),
  (partial(pooling.average_pool, stride=1), 3, 1, 1, 'sum', 9),
  (partial(pooling.shortcut_pool, stride=2), 2, 2, 0, 'mean', 1),
  (pooling.same_pool, 2, 1, 0, 'sum', 4),
]
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
    # Some outer taps lie beyond the image, and all.
    (partial(depthwise, dilation=8), X, random(3, 3, 1, 8)),
    (partial(depthwise, dilation=12), X, random(3, 3, 1, 8)),
  ],
  # Of values of which no two are equal, as the gradients at ties differ.
  'pooling': [(partial(pool, size=None), IMAGE) for pool, *_ in POOLS],
}


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
      results.append(with_gradients(*LAYERS[kind][number]))
  assert_close(*results[::-1], 1e-10 if kind == 'wide' else 1e-13)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(
  ('pool', 'kernel', 'stride', 'padding', 'how', 'divisor'), POOLS
)
@pytest.mark.parametrize('lengths', [(1, 1), (2, 3), (9, 8)])
def test_pooling_is_the_naive_one(
  pool, kernel, stride, padding, how, divisor, lengths
):
  """Of the part of each window that lies inside the image."""
  x = IMAGE[:, : lengths[0], : lengths[1]]
  expected = np.zeros((2, *(-(-length // stride) for length in lengths), 3))
  for i, j in np.ndindex(expected.shape[1:3]):
    top, left = i * stride - padding, j * stride - padding
    window = x[:, max(top, 0) : top + kernel, max(left, 0) : left + kernel]
    expected[:, i, j] = getattr(window, how)((1, 2)) / divisor
  y = jax.jit(partial(pool, size=None))(x)
  np.testing.assert_allclose(y, expected, rtol=1e-13)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('length', [1, 2, 7])
def test_winograds_convolution_of_any_size(length):
  arrays = random(2, length, 6, 5), random(3, 3, 5, 4, seed=1)
  ours, expected = (with_gradients(f, *arrays) for f in (convolve_3x3, conv))
  assert_close(ours, expected, 1e-12)


@pytest.mark.parametrize(
  ('x', 'options'),
  [
    *[(WIDE[0][:, :8], {}), (WIDE[0].astype('bfloat16'), {})],
    *[(WIDE[0], {'stride': 2}), (WIDE[0], {'dilation': 2})],
  ],
  ids=['few_pixels', 'few_digits', 'stride', 'dilation'],
)
def test_what_winograd_is_not_for(x, options):
  with implementations.use(wide='winograd'):
    program = jax.make_jaxpr(partial(conv, **options))
    assert 'conv_general' in str(program(x, WIDE[1].astype(x.dtype)))


# How often a word is in the program of the kind's first layer.
WRITTEN = [
  ('kernel_gradient', 'convolution', {'custom_vjp': 0}),
  ('kernel_gradient', 'products', {'custom_vjp': 1}),
  ('wide', 'convolution', {'dot_general': 0}),
  ('wide', 'winograd', {'dot_general': 16, 'conv_general': 0}),
  ('depthwise', 'shifts', {'conv_general': 0}),
  ('depthwise', 'convolution', {'feature_group_count=8': 1}),
  ('pooling', 'slices', {'reduce_window': 0}),
  ('pooling', 'reduce_window', {'reduce_window_max': 1}),
]


@pytest.mark.parametrize(('kind', 'implementation', 'words'), WRITTEN)
def test_program_is_what_the_name_says(kind, implementation, words):
  layer, *arguments = LAYERS[kind][0]
  with implementations.use(**{kind: implementation}):
    text = str(jax.make_jaxpr(layer)(*arguments))
  assert {word: text.count(word) for word in words} == words


def test_single_taps_are_products():
  assert 'conv_general' not in str(jax.make_jaxpr(conv)(X, random(1, 1, 8, 6)))


def test_plain_network_is_written_as_flax_would():
  model = create_segmentor(TINY | {'head': 'pspnet', 'dtype': 'float32'})

  def written():
    options = {'train': True, 'mutable': ['batch_stats']}
    key = {'dropout': jax.random.key(0)}
    trace = jax.make_jaxpr(lambda v, x: model.apply(v, x, **options, rngs=key))
    return str(trace(variable_shapes(model), struct(2, 32, 32, 3)))

  ours = written()
  with plain_layers.plain_network():
    plain = written()
  assert written() == ours
  for name in ('feature_group_count=2', 'reduce_window_max'):
    assert (name in plain, name in ours) == (True, False)
  assert ('custom_vjp' in plain, 'custom_vjp' in ours) == (False, True)


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
    *[['shifts', 'slices'], ['convolution', 'reduce_window']],
    *[['convolution', 'slices'], ['convolution', 'slices']],
  ]


def test_unknown_names():
  with pytest.raises(UserError, match=r"wide is 'fast'; .* winograd"):
    implementations.use(wide='fast')
  with pytest.raises(UserError, match=r"'wine' is no kind of layer; .* wide"):
    implementations.use(wine='convolution')
  with pytest.raises(UserError, match=r"platform is 'cuda'; .* cpu, gpu, tpu"):
    implementations.use('cuda')


def test_operations_of_convolutions_products_and_loops():
  x, matrix = struct(2, 8, 10, 6), struct(6, 5)
  # Two groups: each of the 4 outputs sees 3 of the 6 channels.
  counted = count_flops(partial(convolve, groups=2), x, struct(3, 3, 3, 4))
  assert counted == 2 * (2 * 8 * 10 * 4) * 9 * 3
  once = 2 * (2 * 8 * 10) * 6 * 5
  assert count_flops(jax.jit(lambda x, m: x @ m), x, matrix) == once
  # In a loop, as often as it runs.
  each = partial(jax.lax.map, lambda row: row @ np.ones((6, 5)))
  assert count_flops(each, x) == once


@pytest.mark.parametrize(
  ('merge', 'expected'),
  [(plain_layers.convolve_merged, 273.6), (pyramid.convolve_merged, 235.1)],
)
def test_pspnet_row(merge, expected, monkeypatch):
  # mmsegmentation's model: 273.6 G multiply-adds at 512 x 512 with aux. On the
  # pyramid's own bins it does without 38.7 of the bottleneck's.
  model = create_segmentor(load_config('configs/ade20k_pspnet.py').model)
  monkeypatch.setattr(pyramid, 'convolve_merged', merge)
  apply, images = partial(model.apply, train=False), struct(1, 512, 512, 3)
  counted = count_flops(apply, variable_shapes(model), images)
  assert counted / 2e9 == pytest.approx(expected, rel=0.005)
