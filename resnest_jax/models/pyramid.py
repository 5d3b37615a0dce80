"""Convolutions over a feature map and coarser ones, upsampled and concatenated.

The bottlenecks of pyramid pooling and of ASPP are such. An upsampled map is
R p C^T for each channel, p being a few bins. A tap of the kernel shifts the
rows of R and of C, so that the convolution is

    sum over taps (dy, dx) of R_dy (p W[dy, dx]) C_dx^T

and the upsampled map is never made. PSPNet saves a seventh of its operations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from resnest_jax.models.convolution import convolve
from resnest_jax.models.initial import kernel_std
from resnest_jax.models.layers import (
  Array,
  Size,
  at_least_float32,
  param_dtype,
  resize_matrices,
)
from resnest_jax.models.normalization import BatchNorm


class Upsampled(NamedTuple):
  """Stands for `apply_matrices(*self)`, (B, H, W, C)."""

  values: Array  # (B, h, w, C)
  rows: Array  # (H, h) or (B, H, h)
  columns: Array  # (W, w) or (B, W, w)

  @property
  def channels(self) -> int:
    return self.values.shape[-1]


def upsampled(x: Array, shape: tuple[int, int], size: Size) -> Upsampled:
  """A bilinear `layers.resize` of true pixels (B, h, w, C), not carried out.

  `shape` and `size` (B, 2) are the result's canvas and true sizes.
  """
  given = x.shape[1:3]
  # Bins are true in all images, and matrices need both sizes or neither.
  whole = None if size is None else jnp.zeros_like(size) + np.asarray(given)
  dtype = at_least_float32(x.dtype)
  return Upsampled(x, *resize_matrices(given, shape, whole, size, dtype))


def _shifted(matrix: Array, taps: int) -> Array:
  # (..., N, n) -> (..., N, taps, n): the rows that each tap meets, zero beyond
  # the ends, as the convolution's padding.
  xp = np if isinstance(matrix, np.ndarray) else jnp
  length, reach = matrix.shape[-2], taps // 2
  margins = [(0, 0)] * (matrix.ndim - 2) + [(reach, reach), (0, 0)]
  padded = xp.pad(matrix, margins)
  return xp.stack(
    [padded[..., tap : tap + length, :] for tap in range(taps)], -2
  )


def convolve_upsampled(
  inputs: Sequence[Upsampled], kernels: Sequence[Array]
) -> Array:
  """Sums the convolutions of upsampled maps, with padding k // 2.

  Each input has its kernel (k, k, C, out), and all have one canvas. Returns
  (B, H, W, out), at least float32.
  """
  bands, rows = [], []
  wide = at_least_float32(kernels[0].dtype)
  for (values, row, column), kernel in zip(inputs, kernels, strict=True):
    taps = len(kernel)
    b = 'b' if column.ndim == 3 else ''
    # Each tap (y, x) of each bin: (B, h, w, k, k, out). In the kernel's type,
    # in which devices exchange its gradient.
    seen = jnp.einsum('bhwc,yxco->bhwyxo', values.astype(kernel.dtype), kernel)
    # Columns first, while there are only h rows: (B, k, h, W, out).
    columns = jnp.asarray(_shifted(column, taps), wide)
    band = jnp.einsum(
      f'bhwyxo,{b}jxw->byhjo', seen.astype(wide), columns, precision='highest'
    )
    # Not len(band): exports for any number of images trace a symbolic B.
    bands.append(band.reshape(band.shape[0], -1, *band.shape[3:]))
    shifted = _shifted(row, taps)
    rows.append(shifted.reshape(*shifted.shape[:-2], -1))
  # Rows last: one product sums over the taps and bins of all levels.
  xp = np if isinstance(rows[0], np.ndarray) else jnp
  return jnp.einsum(
    f'{b}ik,bkjo->bijo',
    jnp.asarray(xp.concatenate(rows, -1), wide),
    jnp.concatenate(bands, 1),
    precision='highest',
  )


def convolve_merged(
  inputs: Sequence[Array | Upsampled], kernel: Array
) -> Array:
  """Convolves a concatenation, of which one input is an array (B, H, W, C).

  The kernel is (k, k, all channels, out), in the order of the inputs. Returns
  (B, H, W, out), at least float32.
  """
  coarse = [isinstance(x, Upsampled) for x in inputs]
  kernels = jnp.split(kernel, np.cumsum(_channels(inputs))[:-1], 2)
  place = coarse.index(False)
  y = convolve(inputs[place].astype(kernel.dtype), kernels[place])[0]
  others = [i for i, is_coarse in enumerate(coarse) if is_coarse]
  z = convolve_upsampled(
    [inputs[i] for i in others], [kernels[i] for i in others]
  )
  # The sum is not rounded to bfloat16 again: its error stays below that of the
  # convolution over the concatenation.
  return y.astype(z.dtype) + z


def _channels(inputs: Sequence[Array | Upsampled]) -> list[int]:
  return [
    x.channels if isinstance(x, Upsampled) else x.shape[-1] for x in inputs
  ]


class MergeConv(nn.Module):
  """`convolve_merged` with the kernel of a `Conv` over the concatenation."""

  features: int
  kernel_size: int = 3
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: Sequence[Array | Upsampled]) -> Array:
    k = self.kernel_size
    shape = (k, k, sum(_channels(inputs)), self.features)
    kernel = self.param(
      'kernel',
      nn.initializers.normal(kernel_std(self.path, shape)),
      shape,
      param_dtype(self.dtype),
    )
    return convolve_merged(inputs, kernel.astype(self.dtype))


class MergeConvBN(nn.Module):
  """3x3 `MergeConv`, batch norm and ReLU."""

  features: int
  train: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, inputs: Sequence[Array | Upsampled], size: Size = None
  ) -> Array:
    x = MergeConv(self.features, dtype=self.dtype, name='conv')(inputs)
    norm = BatchNorm(self.train, relu=True, dtype=self.dtype, name='bn')
    return norm(x, size)
