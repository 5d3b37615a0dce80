"""Pooling of a few pixels, and its true sizes (see `layers`)."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from resnest_jax.models import implementations
from resnest_jax.models.layers import Array, Size, strided, zero_outside


def _window(x: Array, axis: int, kernel: int, stride: int, length: int):
  """The `kernel` strided slices whose elementwise fold pools along `axis`."""
  return [
    lax.slice_in_dim(x, i, i + stride * (length - 1) + 1, stride, axis)
    for i in range(kernel)
  ]


def _pool(x: Array, fold, kernel: int, stride: int, padding) -> Array:
  """Separable pooling over zero-padded rows, then columns."""
  if implementations.chosen('pooling') == 'reduce_window':
    return _reduce_window(x, fold, kernel, stride, padding)
  for axis in (1, 2):
    pad = [(0, 0)] * 4
    pad[axis] = padding
    padded = jnp.pad(x, pad)
    length = (padded.shape[axis] - kernel) // stride + 1
    windows = _window(padded, axis, kernel, stride, length)
    x = windows[0]
    for window in windows[1:]:
      x = fold(x, window)
  return x


def _reduce_window(x: Array, fold, kernel: int, stride: int, padding) -> Array:
  """The same as XLA's operation, whose gradient at ties goes to one value."""
  reduce, start = {jnp.maximum: (lax.max, -np.inf), jnp.add: (lax.add, 0)}[fold]
  margins = ((0, 0), padding, padding, (0, 0))
  return lax.reduce_window(
    x,
    np.asarray(start, x.dtype),
    reduce,
    (1, kernel, kernel, 1),
    (1, stride, stride, 1),
    margins,
  )


def max_pool(x: Array, size: Size) -> Array:
  """Max-pool 3x3, stride 2, padding 1, of non-negative values."""
  pooled = _pool(x, jnp.maximum, 3, 2, (1, 1))
  return zero_outside(pooled, strided(size, 2))


def average_pool(x: Array, stride: int, size: Size) -> Array:
  """Average pool 3x3, padding 1, the padding counted."""
  pooled = _pool(x, jnp.add, 3, stride, (1, 1)) / 9
  return zero_outside(pooled, strided(size, stride))


def shortcut_pool(x: Array, stride: int, size: Size) -> Array:
  """Average pool of kernel = stride in ceil mode, the padding not counted."""
  if stride == 1:
    return x
  odd = [-length % stride for length in x.shape[1:3]]
  x = jnp.pad(x, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)))
  total = _pool(x, jnp.add, stride, stride, (0, 0))
  lengths = np.subtract(x.shape[1:3], odd) if size is None else size

  def counts(axis: int) -> Array:
    starts = stride * np.arange(total.shape[axis + 1])
    inside = jnp.asarray(lengths)[..., axis, None] - starts
    return jnp.clip(inside, 1, stride).astype(total.dtype)

  rows, columns = counts(0), counts(1)
  return total / (rows[..., :, None, None] * columns[..., None, :, None])


def same_pool(x: Array, size: Size) -> Array:
  """Average pool 2x2, stride 1, one zero row and column below and right."""
  return zero_outside(_pool(x, jnp.add, 2, 1, (0, 1)) / 4, size)
