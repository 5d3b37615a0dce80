"""Layers: against plain, slow or independent ones, and in all their forms."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden.reference import TINY, assert_close, random, struct, with_gradients

from benchmarks import plain_layers
from benchmarks.flops import count_flops
from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.models import implementations, layers, pooling, pyramid
from resnest_jax.models.convolution import DepthwiseConv, convolve, depthwise
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.normalization import FEW_VALUES, BatchNorm, normalize
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.models.winograd import convolve_3x3

pytestmark = pytest.mark.usefixtures('float64')


def conv(x, kernel, **options):
  return convolve(x, kernel, **options)[0]


X = random(2, 8, 12, 8)
# As many channels and pixels as Winograd's convolution takes.
WIDE = random(1, 33, 32, 1024), random(3, 3, 1024, 1024)
IMAGE = np.abs(random(2, 9, 8, 3))
# Functions with a kernel, stride, padding, what it reduces, and a divisor.
POOLS = [
  (pooling.max_pool, 3, 2, 1, 'max', 1),
  (partial(pooling.max_pool, stride=1), 3, 1, 1, 'max', 1),
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


@pytest.mark.parametrize('number', range(len(POOLS)))
@pytest.mark.parametrize('lengths', [(1, 1), (2, 3), (9, 8)])
def test_pooling_is_the_naive_one(number, lengths):
  """Of the part of each window that lies inside the image."""
  pool, kernel, stride, padding, how, divisor = POOLS[number]
  x = IMAGE[:, : lengths[0], : lengths[1]]
  expected = np.zeros((2, *(-(-length // stride) for length in lengths), 3))
  for i, j in np.ndindex(expected.shape[1:3]):
    top, left = i * stride - padding, j * stride - padding
    window = x[:, max(top, 0) : top + kernel, max(left, 0) : left + kernel]
    expected[:, i, j] = getattr(window, how)((1, 2)) / divisor
  y = jax.jit(partial(pool, size=None))(x)
  np.testing.assert_allclose(y, expected, rtol=1e-13)


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


EPSILON = 1e-5


def assert_rounded_once(y, exact):
  """To bfloat16: half a unit in the last of its eight digits."""
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype('float64'), exact, rtol=2**-8, atol=1e-6)


# Batch normalisation


def plain_batch_norm(x, scale, bias, relu=False):
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  y = (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias
  return jnp.maximum(y, 0) if relu else y


def batch_norm(x, scale, bias, relu=False, group=0):
  stats = {'mean': np.zeros(len(scale)), 'var': np.ones(len(scale))}
  variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': stats}
  norm = BatchNorm(True, relu, dtype=jnp.float64, group=group)
  return norm.apply(variables, x, mutable=['batch_stats'])


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize(('rows', 'one_pass'), [(5, False), (68, True)])
def test_batch_norm_and_its_gradients_are_the_plain_ones(rows, one_pass, relu):
  x = 2 * random(4, rows, 4, 3) + 1
  assert (x.size / 3 > FEW_VALUES) == one_pass
  arrays = x, 1 + random(3, seed=1), random(3, seed=2)
  ours = with_gradients(lambda *each: batch_norm(*each, relu)[0], *arrays)
  plain = with_gradients(partial(plain_batch_norm, relu=relu), *arrays)
  assert_close(ours, plain, 1e-12)


@pytest.mark.parametrize('group', [2, 3, 6, 8])
def test_groups_are_normalised_as_if_each_were_alone(group):
  """By torch, value, gradients and running statistics, whose mean it takes."""
  x, scale, bias = random(6, 5, 4, 3), 1 + random(3, seed=1), random(3, seed=2)
  arrays = [torch.tensor(a, requires_grad=True) for a in (x, scale, bias)]
  parts, means, variances = [], [], []
  for part in arrays[0].split(group):
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    part = part.permute(0, 3, 1, 2)
    statistics = mean, variance, *arrays[1:], True
    y = torch.nn.functional.batch_norm(part, *statistics)
    parts.append(y.permute(0, 2, 3, 1).relu())
    means.append(mean)
    variances.append(variance)
  y = torch.cat(parts)
  y.backward(torch.tensor(random(*y.shape, seed=3)))
  theirs = y.detach().numpy(), *(a.grad.numpy() for a in arrays)
  ours = with_gradients(
    lambda *each: batch_norm(*each, True, group)[0], x, scale, bias
  )
  assert_close(ours, theirs, 1e-12)
  stats = batch_norm(x, scale, bias, True, group)[1]['batch_stats']
  for name, each in ('mean', means), ('var', variances):
    np.testing.assert_allclose(stats[name], np.mean(each, 0), rtol=1e-12)


def test_bfloat16_is_normalised_by_statistics_of_float32():
  x = jnp.asarray(random(2, 4, 5, 3), jnp.bfloat16)
  norm = BatchNorm(True, dtype=jnp.bfloat16)
  y, _ = norm.init_with_output(jax.random.key(0), x)
  assert_rounded_once(y, plain_batch_norm(x.astype(jnp.float64), 1.0, 0.0))


def test_variance_of_a_few_close_values_is_not_lost_in_rounding():
  x = jnp.float32([[1000.0], [1000.01], [1000.02], [1000.03]])
  *_, variance = normalize(x, jnp.ones(1), jnp.zeros(1), EPSILON, False)
  np.testing.assert_allclose(variance, [np.var(x, dtype='float64')], rtol=0.01)


def test_one_value_a_channel_cannot_be_normalised_in_training():
  with pytest.raises(ValueError, match='batch of at least 2'):
    batch_norm(np.ones((1, 1, 1, 3)), np.ones(3), np.zeros(3))


# Convolution


@pytest.mark.parametrize(
  ('groups', 'parts', 'stride', 'dilation'),
  [
    *[(1, 1, 2, 1), (1, 1, 1, 4)],
    *[(1, 1, 1, 8), (2, 2, 2, 12)],  # Taps out of reach.
    *[(2, 1, 1, 2), (4, 2, 1, 2), (4, 4, 1, 1), (8, 1, 2, 1)],
  ],
)
def test_convolution_and_gradients_are_xlas(groups, parts, stride, dilation):
  options = {'groups': groups, 'stride': stride, 'dilation': dilation}

  def joined(function, x, kernel):
    outputs = function(x, kernel, parts=parts, **options)
    assert [y.shape[-1] for y in outputs] == [24 // parts] * parts
    return jnp.concatenate(outputs, -1)

  for taps in (1, 3):
    kernel = random(taps, taps, 16 // groups, 24, seed=1)
    ours, plain = (
      with_gradients(partial(joined, function), random(2, 9, 8, 16), kernel)
      for function in (convolve, plain_layers.convolve)
    )
    assert_close(ours, plain, 1e-13)


def test_depthwise_convolution_sums_bfloat16_in_float32():
  x = jnp.asarray(random(1, 5, 5, 2), jnp.bfloat16)
  kernel = jnp.asarray(random(3, 3, 1, 2, seed=1), jnp.float32)
  wide = x.astype(jnp.float64), kernel.astype(jnp.float64)
  exact = depthwise(*wide)
  assert_rounded_once(depthwise(x, kernel), exact)


def test_depthwise_convolution_keeps_its_input_alone():
  """Not its nine shifted copies, each of them in float32."""
  x = struct(2, 7, 9, 5, dtype=jnp.bfloat16)
  conv = DepthwiseConv(3, train=True, dtype=jnp.bfloat16)

  def run(kernel, x):
    return conv.apply({'params': {'kernel': kernel}}, x)

  kernel, residuals = struct(3, 3, 1, 5), lambda *both: jax.vjp(run, *both)[1]
  kept = jax.tree.leaves(jax.eval_shape(residuals, kernel, x))
  assert sorted(leaf.shape for leaf in kept) == [x.shape, kernel.shape]


# Resizing as matrices


@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize(
  ('out', 'given'), [(8, 1), (1, 6), (57, 8), (13, 57), (5, 5)]
)
def test_resize_is_pytorchs_for_ints_and_for_data(out, given, aligned):
  x, shape = random(2, given, 7, 3), (out, 9)
  maps = torch.tensor(x).permute(0, 3, 1, 2)
  options = {'mode': 'bilinear', 'align_corners': aligned}
  theirs = torch.nn.functional.interpolate(maps, shape, **options)
  theirs = theirs.permute(0, 2, 3, 1).numpy()
  resize = jax.jit(layers.resize, static_argnums=(1, 4))
  ours = resize(x, shape, None, None, aligned)
  np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
  # Sizes that are data, in larger canvases.
  sizes = (jnp.array([[y, x]] * 2) for y, x in ((given, 7), shape))
  padded = jnp.pad(x, ((0, 0), (0, 2), (0, 3), (0, 0)), constant_values=9)
  ours = np.array(resize(padded, (out + 3, 10), *sizes, aligned))
  np.testing.assert_allclose(ours[:, :out, :9], theirs, rtol=1e-10, atol=1e-12)
  ours[:, :out, :9] = 0
  assert not ours.any()
  # Ints are computed while a program is traced.
  static = layers.resize_matrix(out, given, out, given, align_corners=aligned)
  assert isinstance(static, np.ndarray)


def test_resize_matrix_is_exact_for_large_sizes():
  out, given = 16_383, 4_001
  sizes = jnp.int32(out), jnp.int32(given)
  rows = layers.resize_matrix(*sizes, out, given, jnp.float32)
  for i in (0, 1, 8_191, 12_345, out - 1):
    position = Fraction((2 * i + 1) * given, 2 * out) - Fraction(1, 2)
    position = min(max(position, 0), given - 1)
    # A triangle around it.
    near = [max(0, 1 - abs(position - place)) for place in range(given)]
    np.testing.assert_allclose(rows[i], np.float32(near), rtol=0, atol=1e-7)


# Convolutions over upsampled maps against those over the concatenation

MERGES = pyramid.convolve_merged, plain_layers.convolve_merged


@pytest.mark.gpu
@pytest.mark.parametrize('true', [None, np.array([[6, 7], [4, 8]])])
@pytest.mark.parametrize(
  ('taps', 'canvas'), [(5, (7, 8)), (3, (6, 8)), (3, (1, 1)), (1, (7, 9))]
)
def test_merged_convolution_is_that_of_the_concatenation(taps, canvas, true):
  """For any odd kernel, on a canvas smaller than it, and with true sizes."""
  size = None if true is None else np.minimum(true, canvas)
  maps = [random(2, 2, 3, 4), random(2, 1, 1, 3)]
  x = layers.zero_outside(random(2, *canvas, 5), size)

  def run(merge, kernel, x, *maps):
    wide = [pyramid.upsampled(each, canvas, size) for each in maps]
    return merge([wide[0], x, wide[1]], kernel)

  arrays = random(taps, taps, 12, 6), jnp.asarray(x), *maps
  ours, plain = (with_gradients(partial(run, f), *arrays) for f in MERGES)
  assert ours[0].shape == (2, *canvas, 6)
  assert_close(ours, plain, 1e-12)


@pytest.mark.gpu
def test_bfloat16_is_not_rounded_more_than_in_the_concatenation():
  """PSPNet's bottleneck; errors against float64, relative to the result."""
  shapes = [(24, 32, 128)] + [(bins, bins, 32) for bins in (1, 2, 3, 6)]
  # What both are given: values that bfloat16 holds, as nn.relu leaves them.
  x, *levels = (
    jnp.maximum(random(2, *shape, seed=shape[0]), 0).astype(jnp.bfloat16)
    for shape in shapes
  )
  kernel = np.float32(random(3, 3, 256, 64) / 48)

  def run(dtype, merge):
    wide = [pyramid.upsampled(p.astype(dtype), (24, 32), None) for p in levels]
    y = merge([x.astype(dtype), *wide], jnp.asarray(kernel, dtype))
    return y.astype(jnp.float64)

  exact = run(jnp.float64, MERGES[1])
  ours, plain = (
    jnp.linalg.norm(run(jnp.bfloat16, merge) - exact) / jnp.linalg.norm(exact)
    for merge in MERGES
  )
  assert 2**-12 < ours <= plain < 2**-7
