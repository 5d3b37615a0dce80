"""Types, true sizes, means and resizing, shared by all layers.

Activations are (B, H, W, C). Blocks also take `size`: int (B, 2), the true
height and width of each image inside its padded canvas, or None, where the
canvas is the image. They expect and leave zeros outside the true size, so that
a convolution sees the padding of the unpadded image.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Size = Array | None
Length = int | Array  # The same for all images, or (...).
# By default TPUs would round float32 factors to bfloat16, and GPUs to TF32, and
# labels would move where two scores are close.
einsum = partial(jnp.einsum, precision='highest')


def at_least_float32(dtype: Any) -> Any:
  """Type of parameters, statistics and losses at activations of `dtype`."""
  return jnp.promote_types(dtype, jnp.float32)


def strided(size: Size, stride: int) -> Size:
  """True sizes after a layer of this stride: ceil(size / stride)."""
  return None if size is None else -(-size // stride)


def true_pixels(size: Array, canvas: tuple[int, int]) -> Array:
  """Bool (B, *canvas, 1), whether a pixel is inside its image's true size."""
  rows, columns = (jnp.arange(length) for length in canvas)
  rows, columns = rows < size[:, :1], columns < size[:, 1:]
  return (rows[:, :, None] & columns[:, None, :])[..., None]


def zero_outside(x: Array, size: Size) -> Array:
  """Sets x (B, H, W, C) to zero outside each image's true size."""
  if size is None:
    return x
  inside = true_pixels(size, x.shape[1:3])
  return jnp.where(inside, x, jnp.zeros((), x.dtype))


def spatial_mean(x: Array, size: Size) -> Array:
  """Mean over the true pixels: (B, H, W, C) -> (B, 1, 1, C)."""
  total = jnp.sum(x, (1, 2), at_least_float32(x.dtype), keepdims=True)
  if size is None:
    count = x.shape[1] * x.shape[2]
  else:
    count = (size[:, 0] * size[:, 1]).astype(total.dtype)[:, None, None, None]
  return (total / count).astype(x.dtype)


def resize_taps(
  outputs: Array,
  out_size: Length,
  in_size: Length,
  dtype: Any,
  align_corners: bool = False,
) -> tuple[Array, Array, Array]:
  """Two inputs (..., n) of a bilinear resize and the second one's weight."""
  # NumPy stays NumPy: constants of a program are computed while it is traced.
  xp = np if isinstance(outputs, np.ndarray) else jnp
  out_size = xp.asarray(out_size)[..., None]
  in_size = xp.asarray(in_size)[..., None]
  # The source position, (i + 1/2) in / out - 1/2 or, with aligned corners,
  # i (in - 1) / (out - 1), times a unit: in integers, which are exact at any
  # size below 2 ** 14. Beyond the edges their pixels repeat.
  if align_corners:
    unit = xp.maximum(out_size - 1, 1)
    position = outputs * (in_size - 1)
  else:
    unit = 2 * out_size
    position = xp.maximum((2 * outputs + 1) * in_size - out_size, 0)
  low = xp.minimum(position // unit, in_size - 1)
  high = xp.minimum(low + 1, in_size - 1)
  weight = (position % unit).astype(dtype) / unit
  return low, high, weight.astype(dtype)


def resize_rows(
  outputs: Array,
  out_size: Length,
  in_size: Length,
  in_length: int,
  dtype: Any,
  align_corners: bool = False,
) -> Array:
  """Rows of `resize_matrix` for outputs (..., n) within the true size."""
  xp = np if isinstance(outputs, np.ndarray) else jnp
  taps = resize_taps(outputs, out_size, in_size, dtype, align_corners)
  low, high, weight = taps
  inputs = xp.arange(in_length)
  matrix = (inputs == low[..., None]) * (1 - weight)[..., None]
  return matrix + (inputs == high[..., None]) * weight[..., None]


def resize_matrix(
  out_size: Length,
  in_size: Length,
  out_length: int,
  in_length: int,
  dtype: Any = jnp.float32,
  align_corners: bool = False,
) -> Array:
  """Matrix of a bilinear interpolation along one axis, as in PyTorch.

  Lengths are the canvas', at least the true sizes. The matrix is (...,
  out_length, in_length), zero beyond the sizes; ints give a NumPy array.
  """
  static = all(isinstance(n, (int, np.integer)) for n in (out_size, in_size))
  xp = np if static else jnp
  outputs = xp.arange(out_length)
  sizes = out_size, in_size, in_length
  rows = resize_rows(outputs, *sizes, dtype, align_corners)
  inside = outputs < xp.asarray(out_size)[..., None]
  return (rows * inside[..., None]).astype(dtype)


def pool_matrix(
  bins: int, in_size: Length, in_length: int, dtype: Any
) -> Array:
  """Matrix (..., bins, in_length) of PyTorch's adaptive average pooling."""
  xp = np if isinstance(in_size, int) else jnp
  in_size = xp.asarray(in_size)[..., None]
  index, inputs = xp.arange(bins), xp.arange(in_length)
  start = index * in_size // bins
  end = -(-(index + 1) * in_size // bins)
  inside = (inputs >= start[..., None]) & (inputs < end[..., None])
  return (inside / (end - start)[..., None]).astype(dtype)


def apply_matrices(x: Array, rows: Array, columns: Array) -> Array:
  """Multiplies each image and channel: rows @ x @ columns^T.

  x is (B, H, W, C), rows ([B,] H', H), columns ([B,] W', W).
  """
  b = 'b' if rows.ndim == 3 else ''
  x = einsum(f'bhwc,{b}ih->biwc', x, jnp.asarray(rows, x.dtype))
  return einsum(f'biwc,{b}jw->bijc', x, jnp.asarray(columns, x.dtype))


def _lengths(size: Size, canvas: tuple[int, int]) -> Iterator[Length]:
  for axis, length in enumerate(canvas):
    yield length if size is None else size[:, axis]


def resize_matrices(
  given: tuple[int, int],
  shape: tuple[int, int],
  in_size: Size,
  out_size: Size,
  dtype: Any,
  align_corners: bool = False,
) -> tuple[Array, Array]:
  """The matrices with which `resize` takes a canvas `given` to `shape`."""
  sizes = _lengths(out_size, shape), _lengths(in_size, given)
  each = zip(*sizes, shape, given, strict=True)
  return tuple(resize_matrix(*x, dtype, align_corners) for x in each)


def resize(
  x: Array,
  shape: tuple[int, int],
  in_size: Size = None,
  out_size: Size = None,
  align_corners: bool = False,
) -> Array:
  """Bilinear resize as in PyTorch, without antialiasing.

  Takes x (B, H, W, C) to (B, *shape, C), which is zero outside `out_size`.
  """
  # No gathers: sizes may be data, and the backward pass is no scatter.
  dtype = at_least_float32(x.dtype)
  sizes = x.shape[1:3], shape, in_size, out_size
  return apply_matrices(x, *resize_matrices(*sizes, dtype, align_corners))


def adaptive_average_pool(x: Array, bins: int, size: Size = None) -> Array:
  """Adaptive average pooling: (B, H, W, C) -> (B, bins, bins, C)."""
  dtype = at_least_float32(x.dtype)
  canvas = x.shape[1:3]
  each = zip(_lengths(size, canvas), canvas, strict=True)
  matrices = [pool_matrix(bins, *lengths, dtype) for lengths in each]
  return apply_matrices(x, *matrices)
