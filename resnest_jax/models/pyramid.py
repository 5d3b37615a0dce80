"""Convolutions over a feature map and coarser ones, upsampled and concatenated.

Bottlenecks of pyramid pooling and of ASPP are such. An upsampled map is
R p C^T for each channel, with p of a few bins, and a shift of it by a tap of
the convolution is a shift of the rows of R and of C. So

    sum over taps (dy, dx) of R_dy (p W[dy, dx]) C_dx^T

is what the convolution makes of it. It is linear in what it is applied to, so
the upsampled maps neither have to be computed nor convolved: in PSPNet they are
half of the channels of the largest convolution, and a seventh of the network's
operations. The kernel is that of the concatenation.
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
  """Stands for `apply_matrices(*self)`, (B, H, W, C).

  Attributes:
    values: (B, h, w, C).
    rows: (H, h) or (B, H, h).
    columns: (W, w) or (B, W, w).
  """

  values: Array
  rows: Array
  columns: Array

  @property
  def channels(self) -> int:
    return self.values.shape[-1]


def upsampled(x: Array, shape: tuple[int, int], size: Size) -> Upsampled:
  """A bilinear resize (see `layers.resize`) that is still to be done.

  Args:
    x: (B, h, w, C), all of it true pixels.
    shape: height and width of the result's canvas.
    size: true sizes (B, 2) in the result; None: the whole canvas.
  """
  given = x.shape[1:3]
  whole = None if size is None else jnp.zeros_like(size) + np.asarray(given)
  dtype = at_least_float32(x.dtype)
  return Upsampled(x, *resize_matrices(given, shape, whole, size, dtype))


def _shifted(matrix: Array, taps: int) -> Array:
  """The rows that each tap of a kernel meets: (..., N, n) to (..., N, taps, n).

  Rows beyond the ends are zero, as the padding is.
  """
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
  """The sum of the convolutions of upsampled maps, with padding k // 2.

  Args:
    inputs: of the same canvas.
    kernels: one for each, (k, k, C, out), of the type in which they meet the
      bins. Devices exchange their gradients in it.

  Returns:
    (B, H, W, out), at least float32.
  """
  bands, rows = [], []
  wide = at_least_float32(kernels[0].dtype)
  for (values, row, column), kernel in zip(inputs, kernels, strict=True):
    taps = len(kernel)
    b = 'b' if column.ndim == 3 else ''
    # What each tap (y, x) makes of each bin, and then all of them of a column.
    seen = jnp.einsum('bhwc,yxco->bhwyxo', values.astype(kernel.dtype), kernel)
    columns = jnp.asarray(_shifted(column, taps), wide)
    band = jnp.einsum(
      f'bhwyxo,{b}jxw->byhjo', seen.astype(wide), columns, precision='highest'
    )
    # Not len(band): a program for any number of images has no such number.
    bands.append(band.reshape(band.shape[0], -1, *band.shape[3:]))
    shifted = _shifted(row, taps)
    rows.append(shifted.reshape(*shifted.shape[:-2], -1))
  # All levels have their rows from one product.
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
  """The convolution over a concatenation, of which some is upsampled.

  Args:
    inputs: in the order of the channels; just one is an array (B, H, W, C).
    kernel: (k, k, all channels, out).

  Returns:
    (B, H, W, out), at least float32, so that the sum of the two parts is not
    rounded once more.
  """
  coarse = [isinstance(x, Upsampled) for x in inputs]
  kernels = jnp.split(kernel, np.cumsum(_channels(inputs))[:-1], 2)
  place = coarse.index(False)
  y = convolve(inputs[place].astype(kernel.dtype), kernels[place])[0]
  others = [i for i, is_coarse in enumerate(coarse) if is_coarse]
  z = convolve_upsampled(
    [inputs[i] for i in others], [kernels[i] for i in others]
  )
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
  """`MergeConv` 3x3, batch normalisation and ReLU."""

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
