"""Convolutions over a feature map and coarser ones, upsampled and concatenated.

An upsampled map is R p C^T for each channel, p being a few bins. A tap of the
kernel shifts the rows of R and of C, so that the convolution is the sum over
taps (dy, dx) of R_dy (p W[dy, dx]) C_dx^T, and the upsampled map is never made.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from resnest_jax.models.convolution import convolve, kernel_of
from resnest_jax.models.layers import (
  Array,
  Size,
  at_least_float32,
  einsum,
  resize_matrices,
)


class Upsampled(NamedTuple):
  """Stands for `apply_matrices(*self)`, (B, H, W, C)."""

  values: Array  # (B, h, w, C)
  rows: Array  # (H, h) or (B, H, h)
  columns: Array  # (W, w) or (B, W, w)


Inputs = Sequence[Array | Upsampled]


def upsampled(
  x: Array, shape: tuple[int, int], size: Size, align_corners: bool = False
) -> Upsampled:
  """A bilinear `layers.resize` of true pixels (B, h, w, C), not carried out.

  `shape` and `size` (B, 2) are the result's canvas and true sizes.
  """
  given = x.shape[1:3]
  # Bins are true in all images, and matrices need both sizes or neither.
  whole = None if size is None else jnp.zeros_like(size) + np.asarray(given)
  dtype = at_least_float32(x.dtype)
  sizes = given, shape, whole, size
  return Upsampled(x, *resize_matrices(*sizes, dtype, align_corners))


def _shifted(matrix: Array, taps: int) -> Array:
  # (..., N, n) -> (..., N, taps, n)
  xp = np if isinstance(matrix, np.ndarray) else jnp
  length, reach = matrix.shape[-2], taps // 2
  margins = [(0, 0)] * (matrix.ndim - 2) + [(reach, reach), (0, 0)]
  padded = xp.pad(matrix, margins)
  rows = [padded[..., tap : tap + length, :] for tap in range(taps)]
  return xp.stack(rows, -2)


def convolve_upsampled(
  inputs: Sequence[Upsampled], kernels: Sequence[Array]
) -> Array:
  """Sums the convolutions of upsampled maps, with padding k // 2.

  Each has its kernel (k, k, C, out). Returns (B, H, W, out) in float32.
  """
  bands, rows = [], []
  wide = at_least_float32(kernels[0].dtype)
  for (values, row, column), kernel in zip(inputs, kernels, strict=True):
    taps = len(kernel)
    b = 'b' if column.ndim == 3 else ''
    # In the kernel's type, in which devices exchange its gradient.
    seen = jnp.einsum('bhwc,yxco->bhwyxo', values.astype(kernel.dtype), kernel)
    columns = jnp.asarray(_shifted(column, taps), wide)
    band = einsum(f'bhwyxo,{b}jxw->byhjo', seen.astype(wide), columns)
    # Not len(band): exports for any number of images trace a symbolic B.
    bands.append(band.reshape(band.shape[0], -1, *band.shape[3:]))
    shifted = _shifted(row, taps)
    rows.append(shifted.reshape(*shifted.shape[:-2], -1))
  xp = np if isinstance(rows[0], np.ndarray) else jnp
  rows = jnp.asarray(xp.concatenate(rows, -1), wide)
  return einsum(f'{b}ik,bkjo->bijo', rows, jnp.concatenate(bands, 1))


def convolve_merged(inputs: Inputs, kernel: Array) -> Array:
  """Convolves a concatenation, of which one input is an array (B, H, W, C).

  The kernel (k, k, all channels, out) has the order of the inputs.
  """
  kernels = jnp.split(kernel, np.cumsum(_channels(inputs))[:-1], 2)
  pairs = list(zip(inputs, kernels, strict=True))
  ((x, own),) = (each for each in pairs if not isinstance(each[0], Upsampled))
  y = convolve(x.astype(kernel.dtype), own)[0]
  coarse = [each for each in pairs if isinstance(each[0], Upsampled)]
  z = convolve_upsampled(*zip(*coarse, strict=True))
  # Not rounded to bfloat16 again.
  return y.astype(z.dtype) + z


def _channels(inputs: Inputs) -> list[int]:
  arrays = [x.values if isinstance(x, Upsampled) else x for x in inputs]
  return [array.shape[-1] for array in arrays]


class MergeConv(nn.Module):
  """`convolve_merged` with the kernel of a `Conv` over a concatenation."""

  features: int
  kernel_size: int = 3
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: Inputs) -> Array:
    k, channels = self.kernel_size, sum(_channels(inputs))
    kernel = kernel_of(self, k, k, channels, self.features)
    return convolve_merged(inputs, kernel.astype(self.dtype))
