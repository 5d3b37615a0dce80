"""Pooling of a few pixels, with true sizes (see `layers`)."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from resnest_jax.models import implementations
from resnest_jax.models.layers import Array, Size, strided, zero_outside


def _pool(x: Array, fold, kernel: int, stride: int, padding) -> Array:
  if implementations.chosen('pooling') == 'reduce_window':
    return _reduce_window(x, fold, kernel, stride, padding)
  for axis in (1, 2):
    pad = [(0, 0)] * 4
    pad[axis] = padding
    padded = jnp.pad(x, pad)
    span = (padded.shape[axis] - kernel) // stride * stride + 1
    windows = [
      lax.slice_in_dim(padded, i, i + span, stride, axis) for i in range(kernel)
    ]
    x = functools.reduce(fold, windows)
  return x


def _reduce_window(x: Array, fold, kernel: int, stride: int, padding) -> Array:
  # Its gradient differs at equal maxima: zeros after a ReLU, where none passes.
  reduce, start = {jnp.maximum: (lax.max, -np.inf), jnp.add: (lax.add, 0)}[fold]
  sizes, strides = ((1, n, n, 1) for n in (kernel, stride))
  margins = ((0, 0), padding, padding, (0, 0))
  start = np.asarray(start, x.dtype)
  return lax.reduce_window(x, start, reduce, sizes, strides, margins)


def max_pool(x: Array, size: Size, stride: int = 2) -> Array:
  """3x3 max-pool, padding 1, of values >= 0: the padding is zero."""
  pooled = _pool(x, jnp.maximum, 3, stride, (1, 1))
  return zero_outside(pooled, strided(size, stride))


def average_pool(x: Array, stride: int, size: Size) -> Array:
  """3x3 average pool, padding 1; the padding counts."""
  pooled = _pool(x, jnp.add, 3, stride, (1, 1)) / 9
  return zero_outside(pooled, strided(size, stride))


def shortcut_pool(x: Array, stride: int, size: Size) -> Array:
  """Average pool of kernel = stride, in ceil mode; padding does not count."""
  if stride == 1:
    return x
  # Of a symbolic length as many as any needs; they are not counted.
  odd = [
    -length % stride if isinstance(length, int) else stride - 1
    for length in x.shape[1:3]
  ]
  x = jnp.pad(x, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)))
  total = _pool(x, jnp.add, stride, stride, (0, 0))
  lengths = np.subtract(x.shape[1:3], odd) if size is None else size

  # True pixels of each window, (1 or B, length); 1 beyond the true size.
  def counts(axis: int) -> Array:
    starts = stride * jnp.arange(total.shape[axis + 1])
    inside = jnp.asarray(lengths)[..., axis, None] - starts
    return jnp.clip(inside, 1, stride).astype(total.dtype)

  rows, columns = counts(0), counts(1)
  return total / (rows[..., :, None, None] * columns[..., None, :, None])


def same_pool(x: Array, size: Size) -> Array:
  """2x2 average pool, stride 1; a zero row and column below and right count."""
  return zero_outside(_pool(x, jnp.add, 2, 1, (0, 1)) / 4, size)
