"""Building blocks against plain, slow or independent implementations."""

from fractions import Fraction
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden.reference import relative_error
from torch.nn import functional as F

from benchmarks import plain_layers
from resnest_jax.models import convolution, layers, normalization, pooling
from resnest_jax.models.convolution import convolve, depthwise
from resnest_jax.models.normalization import BatchNorm

pytestmark = pytest.mark.usefixtures('float64')

EPSILON = 1e-5


def random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def assert_same_with_gradients(ours, plain, arguments, limits=(1e-13, 1e-13)):
  """Of two functions of arrays: relative errors of values and gradients."""
  results = []
  for function in (ours, plain):
    y, back = jax.vjp(jax.jit(function), *arguments)
    results.append((y, *back(jnp.asarray(random(*y.shape, seed=3)))))
  limits = limits[:1] + len(arguments) * limits[1:]
  for one, other, limit in zip(*results, limits, strict=True):
    assert relative_error(one, other) < limit


def assert_rounded_once(y, exact):
  """To bfloat16: half a unit in the last of its eight digits."""
  assert y.dtype == jnp.bfloat16
  y = y.astype(jnp.float64)
  np.testing.assert_allclose(y, exact, rtol=2**-8, atol=1e-6)


# Batch normalisation


def plain_batch_norm(x, scale, bias, relu):
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  y = (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias
  return nn.relu(y) if relu else y


def batch_norm(x, scale, bias, relu=False):
  stats = {'mean': np.zeros(len(scale)), 'var': np.ones(len(scale))}
  variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': stats}
  norm = BatchNorm(True, relu, dtype=jnp.float64)
  return norm.apply(variables, x, mutable=['batch_stats'])


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize(
  'shape',
  [(4, 5, 6, 3), (4, 17, 16, 3)],
  ids=['two_passes', 'one_pass'],
)
def test_batch_norm_and_its_gradients_are_the_plain_ones(shape, relu):
  assert (np.prod(shape[:3]) > normalization.FEW_VALUES) == (shape[1] == 17)
  assert_same_with_gradients(
    lambda *arguments: batch_norm(*arguments, relu=relu)[0],
    partial(plain_batch_norm, relu=relu),
    (2 * random(*shape) + 1, 1 + random(3, seed=1), random(3, seed=2)),
    (1e-12, 1e-11),
  )


def test_running_variance_of_two_values_is_unbiased():
  x = np.array([1.0, 4.0]).reshape(2, 1, 1, 1)
  changed = batch_norm(x, np.ones(1), np.zeros(1))[1]
  # Unbiased variance of (1, 4) is 4.5, the biased one 2.25.
  np.testing.assert_allclose(changed['batch_stats']['mean'], [0.25])
  np.testing.assert_allclose(changed['batch_stats']['var'], [0.9 + 0.45])


def test_bfloat16_is_normalised_by_statistics_of_float32():
  x = jnp.asarray(random(2, 4, 5, 3), jnp.bfloat16)
  norm = BatchNorm(True, dtype=jnp.bfloat16)
  y, _ = norm.init_with_output(jax.random.key(0), x)
  expected = plain_batch_norm(x.astype(jnp.float64), 1.0, 0.0, relu=False)
  assert_rounded_once(y, expected)


def test_variance_of_a_few_close_values_is_not_lost_in_rounding():
  x = np.float32([1000.0, 1000.01, 1000.02, 1000.03]).reshape(4, 1, 1, 1)
  _, _, variance = normalization.normalize(
    jnp.asarray(x), jnp.ones(1), jnp.zeros(1), EPSILON, False
  )
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
def test_convolution_and_its_gradients_are_xlas(
  groups, parts, stride, dilation
):
  options = {'groups': groups, 'stride': stride, 'dilation': dilation}

  def joined(function, x, kernel):
    outputs = function(x, kernel, parts=parts, **options)
    assert [y.shape[-1] for y in outputs] == [24 // parts] * parts
    return jnp.concatenate(outputs, -1)

  for taps in (1, 3):
    assert_same_with_gradients(
      partial(joined, convolve),
      partial(joined, plain_layers.convolve),
      (random(2, 9, 8, 16), random(taps, taps, 16 // groups, 24, seed=1)),
    )


@pytest.mark.parametrize('dilation', [1, 6, 12])
def test_depthwise_convolution_and_its_gradients_are_xlas(dilation):
  """Also where the outer taps lie beyond the image."""
  plain = partial(plain_layers.convolve, groups=5, dilation=dilation)
  assert_same_with_gradients(
    partial(depthwise, dilation=dilation),
    lambda x, kernel: plain(x, kernel)[0],
    (random(2, 7, 9, 5), random(3, 3, 1, 5, seed=1)),
  )


def test_depthwise_convolution_sums_bfloat16_in_float32():
  x = jnp.asarray(random(1, 5, 5, 2), jnp.bfloat16)
  kernel = jnp.asarray(random(3, 3, 1, 2, seed=1), jnp.float32)
  exact = depthwise(x.astype(jnp.float64), kernel.astype(jnp.float64))
  assert_rounded_once(depthwise(x, kernel), exact)


def test_depthwise_convolution_keeps_its_input_alone():
  """Not its nine shifted copies, each of them in float32."""
  x = jax.ShapeDtypeStruct((2, 7, 9, 5), jnp.bfloat16)
  kernel = jax.ShapeDtypeStruct((3, 3, 1, 5), jnp.float32)
  conv = convolution.DepthwiseConv(3, train=True, dtype=jnp.bfloat16)

  def run(kernel, x):
    return conv.apply({'params': {'kernel': kernel}}, x)

  residuals = jax.eval_shape(lambda *x: jax.vjp(run, *x)[1], kernel, x)
  kept = jax.tree.leaves(residuals)
  assert sorted(leaf.shape for leaf in kept) == [x.shape, kernel.shape]


# Pooling and means


def naive_pool(x, kernel, stride, padding, reduce):
  """Loops over windows; `reduce` gets a window's values inside the image."""
  batch, height, width, channels = x.shape
  y = np.zeros((batch, -(-height // stride), -(-width // stride), channels))
  for i, j in np.ndindex(y.shape[1:3]):
    top, left = i * stride - padding, j * stride - padding
    rows = slice(max(top, 0), top + kernel)
    y[:, i, j] = reduce(x[:, rows, max(left, 0) : left + kernel])
  return y


# The function and what it is: kernel, stride, padding and a window's value.
POOLS = {
  'max': (pooling.max_pool, 3, 2, 1, lambda w: w.max((1, 2))),
  'average': (
    lambda x, size: pooling.average_pool(x, 2, size),
    *(3, 2, 1, lambda w: w.sum((1, 2)) / 9),
  ),
  'average_stride_1': (
    lambda x, size: pooling.average_pool(x, 1, size),
    *(3, 1, 1, lambda w: w.sum((1, 2)) / 9),
  ),
  'shortcut': (
    lambda x, size: pooling.shortcut_pool(x, 2, size),
    *(2, 2, 0, lambda w: w.mean((1, 2))),
  ),
  'same': (pooling.same_pool, 2, 1, 0, lambda w: w.sum((1, 2)) / 4),
}


@pytest.mark.parametrize('name', POOLS)
@pytest.mark.parametrize('lengths', [(1, 1), (2, 3), (9, 8)])
def test_pooling_is_the_naive_one(name, lengths):
  pool, *naive = POOLS[name]
  x = np.abs(random(2, *lengths, 3))
  y, expected = jax.jit(pool, static_argnums=1)(x, None), naive_pool(x, *naive)
  assert y.shape == expected.shape
  np.testing.assert_allclose(y, expected, rtol=1e-13)


# Resizing and adaptive pooling as matrices

RESIZES = [(8, 1), (1, 6), (57, 8), (13, 57), (5, 5)]


@pytest.mark.parametrize(('out', 'given'), RESIZES)
def test_resize_is_jax_images(out, given):
  x = random(2, given, 7, 3)
  expected = jax.image.resize(x, (2, out, 9, 3), 'bilinear', antialias=False)
  ours = jax.jit(layers.resize, static_argnums=1)(x, (out, 9))
  np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(('out', 'given'), RESIZES)
def test_resize_matrix_of_data_is_that_of_ints(out, given):
  static = layers.resize_matrix(out, given, out, given, jnp.float64)
  assert isinstance(static, np.ndarray)
  matrix = jax.jit(layers.resize_matrix, static_argnums=(2, 3, 4))(
    jnp.array([out, 1]), jnp.array([given, 1]), out + 3, given + 2, jnp.float64
  )
  np.testing.assert_allclose(matrix[0, :out, :given], static, atol=1e-14)
  assert not matrix[0, out:].any()
  assert not matrix[0, :, given:].any()
  np.testing.assert_array_equal(np.flatnonzero(matrix[1]), [0])


def test_resize_matrix_is_exact_for_large_sizes():
  out, given = 16_383, 4_001
  rows = layers.resize_matrix(
    jnp.int32(out), jnp.int32(given), out, given, jnp.float32
  )
  for i in (0, 1, 8_191, 12_345, out - 1):
    position = Fraction((2 * i + 1) * given, 2 * out) - Fraction(1, 2)
    position = min(max(position, Fraction(0)), Fraction(given - 1))
    # A triangle around it.
    near = [max(0, 1 - abs(position - place)) for place in range(given)]
    np.testing.assert_allclose(rows[i], np.float32(near), rtol=0, atol=1e-7)


@pytest.mark.parametrize('bins', [1, 2, 3, 6])
def test_adaptive_pool_is_torchs_at_every_true_size(bins):
  sizes = np.array([[8, 12], [5, 9], [1, 2], [9, 13]])
  x = layers.zero_outside(random(4, 9, 13, 3), sizes)
  pool = jax.jit(layers.adaptive_average_pool, static_argnums=1)
  for image, ours, (height, width) in zip(
    x, pool(x, bins, sizes), sizes, strict=True
  ):
    alone = np.array(image[:height, :width])
    expected = F.adaptive_avg_pool2d(torch.tensor(alone.T), bins).numpy().T
    np.testing.assert_allclose(pool(alone[None], bins)[0], expected, rtol=1e-12)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
