"""Pooling of a few pixels, with true sizes (see `layers`)."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from resnest_jax.models import implementations
from resnest_jax.models.layers import Array, Size, strided, zero_outside


def _window(x: Array, axis: int, kernel: int, stride: int, length: int):
  # Folding the `kernel` strided slices elementwise pools along the axis.
  return [
    lax.slice_in_dim(x, i, i + stride * (length - 1) + 1, stride, axis)
    for i in range(kernel)
  ]


def _pool(x: Array, fold, kernel: int, stride: int, padding) -> Array:
  # Separable: over rows, then over columns. Fused slices take a third of the
  # time of XLA's window reduction for maxima on the CPU. Where devices share
  # rows, the gradient of its maximum would gather whole feature maps.
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
  # XLA's operation. Its gradient at equal maxima goes to the first one, that of
  # the slices to all. After a ReLU these are zeros, where no gradient passes.
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
  """3x3 max-pool, stride 2, padding 1, of values >= 0: the padding is zero."""
  pooled = _pool(x, jnp.maximum, 3, 2, (1, 1))
  return zero_outside(pooled, strided(size, 2))


def average_pool(x: Array, stride: int, size: Size) -> Array:
  """3x3 average pool, padding 1; the padding counts."""
  pooled = _pool(x, jnp.add, 3, stride, (1, 1)) / 9
  return zero_outside(pooled, strided(size, stride))


def shortcut_pool(x: Array, stride: int, size: Size) -> Array:
  """Average pool of kernel = stride, in ceil mode; padding does not count."""
  if stride == 1:
    return x
  # Ceil mode: the last window may reach beyond the canvas.
  odd = [-length % stride for length in x.shape[1:3]]
  x = jnp.pad(x, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)))
  total = _pool(x, jnp.add, stride, stride, (0, 0))
  lengths = np.subtract(x.shape[1:3], odd) if size is None else size

  # True pixels of each window, (1 or B, length). Windows beyond the true size
  # hold zeros; clipping to 1 avoids 0 / 0 there.
  def counts(axis: int) -> Array:
    starts = stride * np.arange(total.shape[axis + 1])
    inside = jnp.asarray(lengths)[..., axis, None] - starts
    return jnp.clip(inside, 1, stride).astype(total.dtype)

  rows, columns = counts(0), counts(1)
  return total / (rows[..., :, None, None] * columns[..., None, :, None])


def same_pool(x: Array, size: Size) -> Array:
  """2x2 average pool, stride 1; a zero row and column below and right count."""
  return zero_outside(_pool(x, jnp.add, 2, 1, (0, 1)) / 4, size)
