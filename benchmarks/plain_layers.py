"""Layers as Flax, jax-resnet and others write them, to compare ours with.

They are the same functions as the layers of `resnest_jax.models`, and no
platform was found on which they are faster.
"""

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import jax.numpy as jnp
import numpy as np
from jax import lax

from resnest_jax.models import (
  convolution,
  implementations,
  normalization,
  pyramid,
)
from resnest_jax.models.layers import Array, apply_matrices

# Where platforms differ, the implementation that Flax has.
IMPLEMENTATIONS = {
  'wide': 'convolution',
  'depthwise': 'convolution',
  'kernel_gradient': 'convolution',
  'pooling': 'reduce_window',
  'blocks': 'unrolled',
}


def convolve(
  x: Array,
  kernel: Array,
  *,
  groups: int = 1,
  stride: int = 1,
  dilation: int = 1,
  parts: int = 1,
) -> tuple[Array, ...]:
  """`convolution.convolve` as XLA's grouped convolution, 1x1 included."""
  margin = dilation * (kernel.shape[0] // 2)
  y = lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(margin, margin)] * 2,
    rhs_dilation=(dilation, dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )
  return tuple(jnp.split(y, parts, -1))


def block_diagonal(
  x: Array, kernel: Array, *, groups: int, dilation: int, parts: int
) -> tuple[Array, ...]:
  """The same as one dense convolution, whose kernel is 0 between groups."""
  *taps, inputs, outputs = kernel.shape
  each = kernel.reshape(*taps, inputs, groups, outputs // groups)
  same = np.eye(groups, dtype=bool)[:, None, :, None]
  # (k, k, groups, inputs, groups, outputs of a group)
  full = jnp.where(same, each[:, :, None], jnp.zeros((), kernel.dtype))
  dense = full.reshape(*taps, groups * inputs, outputs)
  (y,) = convolution.convolve(x, dense, dilation=dilation)
  return tuple(jnp.split(y, parts, -1))


def space_to_batch(x: Array, kernel: Array, *, dilation: int) -> Array:
  """A dilated convolution as one of every d-th row and column, if d divides."""
  batch, height, width, _ = x.shape
  d = dilation
  x = x.reshape(batch, height // d, d, width // d, d, -1)
  x = x.transpose(0, 2, 4, 1, 3, 5)
  x = x.reshape(batch * d * d, height // d, width // d, -1)
  (x,) = convolution.convolve(x, kernel)
  x = x.reshape(batch, d, d, height // d, width // d, -1)
  return x.transpose(0, 3, 1, 4, 2, 5).reshape(batch, height, width, -1)


def convolve_merged(
  inputs: Sequence[Array | pyramid.Upsampled], kernel: Array
) -> Array:
  """`pyramid.convolve_merged`: upsamples, concatenates and convolves."""
  maps = [
    apply_matrices(*x) if isinstance(x, pyramid.Upsampled) else x
    for x in inputs
  ]
  x = jnp.concatenate([x.astype(kernel.dtype) for x in maps], -1)
  return convolution.convolve(x, kernel)[0]


def normalize(
  x: Array, scale: Array, bias: Array, epsilon: float, relu: bool
) -> tuple[Array, Array, Array]:
  """`normalization.normalize`, differentiated as it is written."""
  mean, variance = normalization.moments(x)
  inverse = lax.rsqrt(variance + epsilon)
  y = (x.astype(mean.dtype) - mean) * (inverse * scale) + bias
  return (jnp.maximum(y, 0) if relu else y).astype(x.dtype), mean, variance


@contextlib.contextmanager
def plain_network() -> Iterator[None]:
  """What is traced inside has all layers as Flax and jax-resnet write them."""
  with (
    # So that JAX takes no block that was traced outside.
    implementations.use(**IMPLEMENTATIONS),
    mock.patch.object(convolution, 'convolve', convolve),
    mock.patch.object(pyramid, 'convolve_merged', convolve_merged),
    mock.patch.object(normalization, 'normalize', normalize),
  ):
    yield
