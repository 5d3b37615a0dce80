"""Building blocks against plain, slow or independent implementations."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import assert_close, random, struct, with_gradients

from benchmarks import plain_layers
from resnest_jax.models import convolution, layers, pyramid
from resnest_jax.models.normalization import FEW_VALUES, BatchNorm, normalize

pytestmark = pytest.mark.usefixtures('float64')

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


def batch_norm(x, scale, bias, relu=False):
  stats = {'mean': np.zeros(len(scale)), 'var': np.ones(len(scale))}
  variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': stats}
  norm = BatchNorm(True, relu, dtype=jnp.float64)
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
def test_convolution_and_its_gradients_are_xlas(
  groups, parts, stride, dilation
):
  options = {'groups': groups, 'stride': stride, 'dilation': dilation}

  def joined(function, x, kernel):
    outputs = function(x, kernel, parts=parts, **options)
    assert [y.shape[-1] for y in outputs] == [24 // parts] * parts
    return jnp.concatenate(outputs, -1)

  for taps in (1, 3):
    kernel = random(taps, taps, 16 // groups, 24, seed=1)
    ours, plain = (
      with_gradients(partial(joined, function), random(2, 9, 8, 16), kernel)
      for function in (convolution.convolve, plain_layers.convolve)
    )
    assert_close(ours, plain, 1e-13)


def test_depthwise_convolution_sums_bfloat16_in_float32():
  x = jnp.asarray(random(1, 5, 5, 2), jnp.bfloat16)
  kernel = jnp.asarray(random(3, 3, 1, 2, seed=1), jnp.float32)
  wide = x.astype(jnp.float64), kernel.astype(jnp.float64)
  exact = convolution.depthwise(*wide)
  assert_rounded_once(convolution.depthwise(x, kernel), exact)


def test_depthwise_convolution_keeps_its_input_alone():
  """Not its nine shifted copies, each of them in float32."""
  x = struct(2, 7, 9, 5, dtype=jnp.bfloat16)
  conv = convolution.DepthwiseConv(3, train=True, dtype=jnp.bfloat16)

  def run(kernel, x):
    return conv.apply({'params': {'kernel': kernel}}, x)

  kernel, residuals = struct(3, 3, 1, 5), lambda *both: jax.vjp(run, *both)[1]
  kept = jax.tree.leaves(jax.eval_shape(residuals, kernel, x))
  assert sorted(leaf.shape for leaf in kept) == [x.shape, kernel.shape]


# Resizing as matrices

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
  assert not matrix[0].at[:out, :given].set(0).any()
  np.testing.assert_array_equal(np.flatnonzero(matrix[1]), [0])


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
