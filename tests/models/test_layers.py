"""Building blocks against plain, slow or independent implementations."""

from fractions import Fraction
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import relative_error
from jax import lax

from resnest_jax.models import convolution, layers, normalization, pooling
from resnest_jax.models.convolution import Conv, convolve, depthwise
from resnest_jax.models.normalization import BatchNorm

EPSILON = 1e-5


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


# Batch normalisation


def plain_batch_norm(x, scale, bias, relu):
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  y = (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias
  return nn.relu(y) if relu else y


def affine(channels):
  """Random scale and bias."""
  rng = np.random.default_rng(5)
  return rng.uniform(0.5, 1.5, channels), 0.3 * rng.standard_normal(channels)


def batch_norm(x, scale, bias, *, train=True, stats=None, size=None, **fields):
  channels = len(scale)
  stats = stats or {'mean': np.zeros(channels), 'var': np.ones(channels)}
  variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': stats}
  norm = BatchNorm(train, dtype=jnp.float64, **fields)
  apply = jax.jit(partial(norm.apply, mutable=['batch_stats']))
  return apply(variables, x, size)


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize(
  'shape',
  [(4, 5, 6, 3), (4, 17, 16, 3)],
  ids=['two_passes', 'one_pass'],
)
def test_batch_norm_and_its_gradients_are_the_plain_ones(shape, relu):
  assert (np.prod(shape[:3]) > normalization.FEW_VALUES) == (shape[1] == 17)
  x, direction = 2 * random(*shape) + 1, random(*shape, seed=1)
  arguments = (x, *affine(3))

  def ours(x, scale, bias):
    y, _ = batch_norm(x, scale, bias, relu=relu)
    return jnp.sum(y * direction), y

  def plain(x, scale, bias):
    y = plain_batch_norm(x, scale, bias, relu)
    return jnp.sum(y * direction), y

  grads, y = jax.jit(jax.grad(ours, (0, 1, 2), has_aux=True))(*arguments)
  expected_grads, expected = jax.jit(jax.grad(plain, (0, 1, 2), has_aux=True))(
    *arguments
  )
  assert relative_error(y, expected) < 1e-12
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    assert relative_error(grad, expected_grad) < 1e-11


def test_batch_norm_equals_flax_up_to_the_unbiased_variance():
  x, (scale, bias) = 3 * random(2, 4, 5, 3) - 1, affine(3)
  stats = {'mean': random(3), 'var': np.array([0.5, 1.0, 2.0])}
  variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': stats}
  flax_norm = nn.BatchNorm(
    False, momentum=0.9, epsilon=EPSILON, use_fast_variance=False
  )
  expected, changed = flax_norm.apply(variables, x, mutable=['batch_stats'])
  expected_stats = changed['batch_stats']
  y, changed = batch_norm(x, scale, bias, stats=stats)
  assert relative_error(y, expected) < 1e-12
  assert (
    relative_error(changed['batch_stats']['mean'], expected_stats['mean'])
    < 1e-14
  )
  # Flax adds 0.1 of the biased variance, PyTorch n / (n - 1) times as much.
  n = 2 * 4 * 5
  added = expected_stats['var'] - 0.9 * stats['var']
  expected_var = 0.9 * stats['var'] + added * n / (n - 1)
  assert relative_error(changed['batch_stats']['var'], expected_var) < 1e-14


def test_running_variance_of_two_values_is_unbiased():
  x = np.array([1.0, 4.0]).reshape(2, 1, 1, 1)
  _, changed = batch_norm(x, np.ones(1), np.zeros(1))
  # Unbiased variance of (1, 4) is 4.5, the biased one 2.25.
  np.testing.assert_allclose(changed['batch_stats']['mean'], [0.25])
  np.testing.assert_allclose(changed['batch_stats']['var'], [0.9 + 0.45])


def test_evaluation_uses_running_statistics_and_keeps_the_outside_zero():
  x = layers.zero_outside(jnp.asarray(random(2, 4, 5, 3)), SIZES)
  scale, bias = affine(3)
  stats = {'mean': random(3), 'var': np.array([0.5, 1.0, 2.0])}
  y, changed = batch_norm(
    x, scale, bias, train=False, stats=stats, size=SIZES, relu=True
  )
  gain = scale / np.sqrt(stats['var'] + EPSILON)
  expected = np.maximum((x - stats['mean']) * gain + bias, 0)
  for index, (height, width) in enumerate(SIZES):
    inside = np.s_[index, :height, :width]
    np.testing.assert_allclose(y[inside], expected[inside], rtol=1e-12)
    assert not y[index, height:].any()
    assert not y[index, :, width:].any()
  assert jax.tree.all(
    jax.tree.map(np.array_equal, changed['batch_stats'], stats)
  )


def test_tuple_of_channels_is_normalised_like_the_whole():
  x, (scale, bias) = random(2, 4, 5, 6), affine(6)
  whole, changed = batch_norm(x, scale, bias, relu=True)
  parts, parts_changed = batch_norm(
    (x[..., :2], x[..., 2:]), scale, bias, relu=True
  )
  assert [part.shape[-1] for part in parts] == [2, 4]
  np.testing.assert_allclose(np.concatenate(parts, -1), whole, rtol=1e-13)
  for name in ('mean', 'var'):
    np.testing.assert_allclose(
      parts_changed['batch_stats'][name],
      changed['batch_stats'][name],
      rtol=1e-14,
    )


@pytest.mark.parametrize('train', [False, True])
def test_bfloat16_is_kept_and_statistics_are_float32(train):
  x = jnp.asarray(random(2, 4, 5, 3), jnp.bfloat16)
  norm = BatchNorm(train, dtype=jnp.bfloat16)
  y, variables = norm.init_with_output(jax.random.key(0), x)
  assert y.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    jnp.dtype(jnp.float32)
  }
  exact = np.asarray(x, np.float64)
  expected = exact / np.sqrt(1 + EPSILON)
  if train:
    expected = plain_batch_norm(exact, 1.0, 0.0, relu=False)
  # Half a unit in the last of bfloat16's eight digits.
  np.testing.assert_allclose(
    np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-6
  )


def test_variance_of_a_few_close_values_is_not_lost_in_rounding():
  x = jnp.asarray([1000.0, 1000.01, 1000.02, 1000.03], jnp.float32)
  _, _, variance = normalization.normalize(
    x.reshape(4, 1, 1, 1), jnp.ones(1), jnp.zeros(1), EPSILON, False
  )
  expected = np.var(np.asarray(x, np.float64))
  np.testing.assert_allclose(variance, [expected], rtol=0.01)


def test_one_value_a_channel_cannot_be_normalised_in_training():
  with pytest.raises(ValueError, match='batch of at least 2'):
    batch_norm(np.ones((1, 1, 1, 3)), np.ones(3), np.zeros(3))


# Convolution


@pytest.mark.parametrize(
  ('groups', 'parts', 'stride', 'dilation'),
  [
    *[(1, 1, 1, 1), (1, 1, 2, 1), (1, 1, 1, 4)],
    *[(1, 1, 1, 8), (1, 1, 1, 12), (2, 2, 2, 12)],  # Taps out of reach.
    *[(2, 2, 1, 1), (2, 1, 1, 2), (2, 2, 2, 1)],
    *[(4, 2, 1, 2), (4, 4, 1, 1), (4, 1, 2, 1)],
    *[(8, 4, 1, 1), (8, 2, 1, 4), (8, 1, 1, 1)],
  ],
)
def test_convolution_and_its_gradients_are_laxs(
  groups, parts, stride, dilation
):
  x, kernel = random(2, 9, 8, 16), random(3, 3, 16 // groups, 24, seed=1)
  direction = random(2, -(-9 // stride), 8 // stride, 24, seed=2)

  def ours(x, kernel):
    outputs = convolve(
      x, kernel, groups=groups, stride=stride, dilation=dilation, parts=parts
    )
    assert [y.shape[-1] for y in outputs] == [24 // parts] * parts
    y = jnp.concatenate(outputs, -1)
    return jnp.sum(y * direction), y

  def plain(x, kernel):
    y = lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      [(dilation, dilation)] * 2,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )
    return jnp.sum(y * direction), y

  grads, y = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(x, kernel)
  expected_grads, expected = jax.jit(jax.grad(plain, (0, 1), has_aux=True))(
    x, kernel
  )
  assert relative_error(y, expected) < 1e-13
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    assert relative_error(grad, expected_grad) < 1e-13


@pytest.mark.parametrize(('groups', 'parts'), [(1, 1), (2, 2), (4, 2)])
def test_pointwise_convolution_with_bias_is_a_matrix_product(groups, parts):
  x = random(2, 3, 4, 8)
  kernel, bias = random(1, 1, 8 // groups, 12, seed=1), random(12, seed=2)
  conv = Conv(12, groups=groups, parts=parts, use_bias=True, dtype=jnp.float64)
  outputs = jax.jit(conv.apply)({'params': {'kernel': kernel, 'bias': bias}}, x)
  y = np.concatenate(outputs, -1) if parts > 1 else outputs
  inputs, each = 8 // groups, 12 // groups
  for g in range(groups):
    expected = (
      x[..., g * inputs : (g + 1) * inputs]
      @ (kernel[0, 0, :, g * each : (g + 1) * each])
    )
    channels = np.s_[g * each : (g + 1) * each]
    np.testing.assert_allclose(
      y[..., channels], expected + bias[channels], rtol=1e-10
    )


@pytest.mark.parametrize('dilation', [1, 2, 6, 12])
def test_depthwise_convolution_and_its_gradients_are_laxs(dilation):
  """Also where the outer taps lie beyond the image."""
  x, kernel = random(2, 7, 9, 5), random(3, 3, 1, 5, seed=1)
  direction = random(2, 7, 9, 5, seed=2)

  def ours(x, kernel):
    y = depthwise(x, kernel, dilation)
    return jnp.sum(y * direction), y

  def plain(x, kernel):
    y = lax.conv_general_dilated(
      x,
      kernel,
      (1, 1),
      [(dilation, dilation)] * 2,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=5,
    )
    return jnp.sum(y * direction), y

  grads, y = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(x, kernel)
  expected_grads, expected = jax.jit(jax.grad(plain, (0, 1), has_aux=True))(
    x, kernel
  )
  assert relative_error(y, expected) < 1e-13
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    assert relative_error(grad, expected_grad) < 1e-13


def test_depthwise_convolution_sums_bfloat16_in_float32():
  x = jnp.asarray(random(1, 5, 5, 2), jnp.bfloat16)
  kernel = jnp.asarray(random(3, 3, 1, 2, seed=1), jnp.float32)
  y = depthwise(x, kernel)
  assert y.dtype == jnp.bfloat16
  exact = depthwise(x.astype(jnp.float64), kernel.astype(jnp.float64))
  # One rounding at the end: half a unit in the last of eight digits.
  np.testing.assert_allclose(
    np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-6
  )


def test_depthwise_convolution_keeps_its_input_alone():
  """Not its nine shifted copies, each of them in float32."""
  x = jax.ShapeDtypeStruct((2, 7, 9, 5), jnp.bfloat16)
  kernel = jax.ShapeDtypeStruct((3, 3, 1, 5), jnp.float32)
  conv = convolution.DepthwiseConv(3, train=True, dtype=jnp.bfloat16)

  def residuals(kernel, x):
    def run(kernel, x):
      return conv.apply({'params': {'kernel': kernel}}, x)

    return jax.vjp(run, kernel, x)[1]

  kept = jax.tree.leaves(jax.eval_shape(residuals, kernel, x))
  assert sorted(leaf.shape for leaf in kept) == [x.shape, kernel.shape]


# Pooling and means

SIZES = np.array([[4, 3], [3, 5]])
LENGTHS = [(1, 1), (2, 3), (7, 8), (8, 9), (9, 7)]


def naive_pool(x, kernel, stride, padding, ceil_mode, reduce):
  """Loops over windows; `reduce` gets a window's values inside the image."""
  batch, height, width, channels = x.shape

  def length(n):
    span = n + 2 * padding - kernel
    return (-(-span // stride) if ceil_mode else span // stride) + 1

  y = np.zeros((batch, length(height), length(width), channels))
  for i in range(y.shape[1]):
    for j in range(y.shape[2]):
      top, left = i * stride - padding, j * stride - padding
      window = x[
        :,
        max(top, 0) : min(top + kernel, height),
        max(left, 0) : min(left + kernel, width),
      ]
      y[:, i, j] = reduce(window)
  return y


POOLS = {
  'max': (
    pooling.max_pool,
    lambda x: naive_pool(x, 3, 2, 1, False, lambda w: w.max((1, 2))),
    2,
  ),
  'average': (
    lambda x, size: pooling.average_pool(x, 2, size),
    lambda x: naive_pool(x, 3, 2, 1, False, lambda w: w.sum((1, 2)) / 9),
    2,
  ),
  'average_stride_1': (
    lambda x, size: pooling.average_pool(x, 1, size),
    lambda x: naive_pool(x, 3, 1, 1, False, lambda w: w.sum((1, 2)) / 9),
    1,
  ),
  'shortcut': (
    lambda x, size: pooling.shortcut_pool(x, 2, size),
    lambda x: naive_pool(x, 2, 2, 0, True, lambda w: w.mean((1, 2))),
    2,
  ),
  'same': (
    pooling.same_pool,
    lambda x: naive_pool(
      np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))),
      *(2, 1, 0, False),
      lambda w: w.mean((1, 2)),
    ),
    1,
  ),
}


@pytest.mark.parametrize('name', POOLS)
@pytest.mark.parametrize('lengths', LENGTHS)
def test_pooling_is_the_naive_one(name, lengths):
  pool, naive, _ = POOLS[name]
  x = np.abs(random(2, *lengths, 3))
  y, expected = jax.jit(pool, static_argnums=1)(x, None), naive(x)
  assert y.shape == expected.shape
  np.testing.assert_allclose(y, expected, rtol=1e-13)


@pytest.mark.parametrize('name', POOLS)
def test_pooling_sees_the_true_size_only(name):
  pool, _, stride = POOLS[name]
  pool = jax.jit(pool)
  sizes = np.array([[7, 8], [8, 5], [1, 9], [10, 12]])
  x = np.asarray(layers.zero_outside(np.abs(random(4, 10, 12, 3)), sizes))
  y = np.asarray(pool(x, sizes))
  for index, (height, width) in enumerate(sizes):
    alone = pool(x[index : index + 1, :height, :width], None)[0]
    rows, columns = -(-height // stride), -(-width // stride)
    assert alone.shape[:2] == (rows, columns)
    np.testing.assert_allclose(y[index, :rows, :columns], alone, rtol=1e-13)
    assert not y[index, rows:].any()
    assert not y[index, :, columns:].any()


def test_shortcut_of_stride_1_is_the_identity():
  x = random(1, 3, 4, 2)
  np.testing.assert_array_equal(pooling.shortcut_pool(x, 1, None), x)


def test_spatial_mean_counts_true_pixels():
  x = random(2, 4, 5, 3)
  means = layers.spatial_mean(layers.zero_outside(x, SIZES), SIZES)
  for index, (height, width) in enumerate(SIZES):
    np.testing.assert_allclose(
      means[index, 0, 0], x[index, :height, :width].mean((0, 1)), rtol=1e-13
    )
  np.testing.assert_allclose(
    layers.spatial_mean(x, None)[:, 0, 0], x.mean((1, 2)), rtol=1e-13
  )


# Resizing and adaptive pooling as matrices

RESIZES = [(1, 1), (8, 1), (1, 6), (64, 8), (57, 8), (8, 64), (13, 57), (5, 5)]


@pytest.mark.parametrize(('out', 'given'), RESIZES)
def test_resize_is_jax_images(out, given):
  x = random(2, given, 7, 3)
  expected = jax.image.resize(x, (2, out, 9, 3), 'bilinear', antialias=False)
  np.testing.assert_allclose(
    jax.jit(layers.resize, static_argnums=1)(x, (out, 9)),
    expected,
    rtol=1e-10,
    atol=1e-12,
  )


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
  for i in (0, 1, 2, 8_191, 12_345, out - 2, out - 1):
    position = Fraction((2 * i + 1) * given, 2 * out) - Fraction(1, 2)
    position = min(max(position, Fraction(0)), Fraction(given - 1))
    low = int(position)
    expected = np.zeros(given, np.float32)
    expected[low] = float(1 - (position - low))
    if low + 1 < given:
      expected[low + 1] = float(position - low)
    np.testing.assert_allclose(rows[i], expected, rtol=0, atol=1e-7)


def test_resize_between_true_sizes_is_the_unpadded_one():
  in_sizes, out_sizes = SIZES, np.array([[9, 11], [12, 4]])
  x = np.asarray(layers.zero_outside(random(2, 4, 5, 3), in_sizes))
  resize = jax.jit(layers.resize, static_argnums=1)
  y = np.asarray(resize(x, (12, 13), in_sizes, out_sizes))
  for index in range(2):
    (h, w), (rows, columns) = in_sizes[index], out_sizes[index]
    alone = resize(x[index : index + 1, :h, :w], (int(rows), int(columns)))[0]
    np.testing.assert_allclose(y[index, :rows, :columns], alone, rtol=1e-12)
    assert not y[index, rows:].any()
    assert not y[index, :, columns:].any()


def naive_adaptive_pool(x, bins):
  batch, height, width, channels = x.shape
  y = np.zeros((batch, bins, bins, channels))
  for i in range(bins):
    for j in range(bins):
      rows = slice(i * height // bins, -(-(i + 1) * height // bins))
      columns = slice(j * width // bins, -(-(j + 1) * width // bins))
      y[:, i, j] = x[:, rows, columns].mean((1, 2))
  return y


@pytest.mark.parametrize('bins', [1, 2, 3, 6])
def test_adaptive_pool_is_the_naive_one_at_every_true_size(bins):
  sizes = np.array([[8, 12], [5, 9], [1, 2], [9, 13]])
  x = np.asarray(layers.zero_outside(random(4, 9, 13, 3), sizes))
  pool = jax.jit(layers.adaptive_average_pool, static_argnums=1)
  pooled = pool(x, bins, sizes)
  for index, (height, width) in enumerate(sizes):
    alone = x[index : index + 1, :height, :width]
    expected = naive_adaptive_pool(alone, bins)
    np.testing.assert_allclose(pool(alone, bins), expected, rtol=1e-12)
    np.testing.assert_allclose(pooled[index], expected[0], rtol=1e-12)
