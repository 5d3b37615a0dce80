"""Building blocks: convolution, batch normalisation, pooling, resizing.

Activations are (B, H, W, C). Every block also takes `size`: None, or an int
array (B, 2) with the true height and width of each image inside its padded
H x W canvas. Blocks expect zeros outside the true size and leave zeros there,
so that a convolution sees the zero padding of the unpadded image, and means
and interpolation count true pixels only. With None the canvas is the image.

The forms are chosen for XLA: a grouped convolution is a few dense ones (the
partitioner gathers the whole batch for a grouped one, and its backward is
slow), 1x1 convolutions are matrix products, pooling is strided slices,
resizing and adaptive pooling are products with small matrices.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnest_jax.models.initial import kernel_std

Array = jax.Array
Size = Array | None


def at_least_float32(dtype: Any) -> Any:
  """The type in which statistics, sums and losses of `dtype` are computed."""
  return jnp.promote_types(dtype, jnp.float32)


def param_dtype(dtype: Any) -> Any:
  """Parameters are float32, or float64 where activations are."""
  return at_least_float32(dtype)


def strided(size: Size, stride: int) -> Size:
  """True sizes after a layer of this stride: ceil(size / stride)."""
  return None if size is None else -(-size // stride)


def zero_outside(x: Array, size: Size) -> Array:
  """Sets what lies outside each image's true size to zero."""
  if size is None:
    return x
  rows = jnp.arange(x.shape[1]) < size[:, :1]
  columns = jnp.arange(x.shape[2]) < size[:, 1:]
  inside = rows[:, :, None] & columns[:, None, :]
  return jnp.where(inside[..., None], x, jnp.zeros((), x.dtype))


def spatial_mean(x: Array, size: Size) -> Array:
  """Mean over the true pixels: (B, H, W, C) -> (B, 1, 1, C)."""
  total = jnp.sum(x, (1, 2), at_least_float32(x.dtype), keepdims=True)
  if size is None:
    count = x.shape[1] * x.shape[2]
  else:
    count = (size[:, 0] * size[:, 1]).astype(total.dtype)[:, None, None, None]
  return (total / count).astype(x.dtype)


def _within_reach(
  kernel: Array, dilation: int, canvas: tuple[int, ...]
) -> Array:
  """Cuts off the taps that meet nothing but padding on a canvas this small."""
  for axis, length in enumerate(canvas):
    centre = kernel.shape[axis] // 2
    reach = min(centre, (length - 1) // dilation)
    kernel = lax.slice_in_dim(
      kernel, centre - reach, centre + reach + 1, axis=axis
    )
  return kernel


def convolve(
  x: Array,
  kernel: Array,
  *,
  groups: int = 1,
  stride: int = 1,
  dilation: int = 1,
  parts: int = 1,
) -> tuple[Array, ...]:
  """Convolution with padding dilation * (k // 2), as dense convolutions.

  Args:
    x: (B, H, W, C).
    kernel: (k, k, C / groups, out); the outputs of group g are the g-th
      of `groups` equal slices, as in PyTorch and in `lax`.
    groups: number of groups.
    stride: window stride.
    dilation: spacing of the taps.
    parts: into how many equal slices of channels the result is cut; it must
      divide `groups`.

  Returns:
    `parts` arrays (B, H', W', out / parts), never concatenated.
  """
  kernel = _within_reach(kernel, dilation, x.shape[1:3])
  padding = [dilation * (taps // 2) for taps in kernel.shape[:2]]

  def dense(x: Array, kernel: Array) -> Array:
    if kernel.shape[:2] == (1, 1) and stride == 1:
      return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
    return lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      [(margin, margin) for margin in padding],
      rhs_dilation=(dilation, dilation),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  outputs = [
    dense(x, kernel)
    for x, kernel in zip(
      jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True
    )
  ]
  each = groups // parts
  return tuple(
    jnp.concatenate(outputs[i : i + each], -1) if each > 1 else outputs[i]
    for i in range(0, groups, each)
  )


class Conv(nn.Module):
  """Convolution whose padding keeps ceil(H / stride) rows.

  The kernel is (k, k, in / groups, features): PyTorch's tensor, transposed.
  With `parts` > 1 the result is a tuple of that many slices of the channels.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  dilation: int = 1
  groups: int = 1
  parts: int = 1
  use_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array | tuple[Array, ...]:
    k = self.kernel_size
    stored = param_dtype(self.dtype)
    shape = (k, k, x.shape[-1] // self.groups, self.features)
    kernel = self.param(
      'kernel',
      nn.initializers.normal(kernel_std(self.path, shape)),
      shape,
      stored,
    )
    outputs = convolve(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      groups=self.groups,
      stride=self.stride,
      dilation=self.dilation,
      parts=self.parts,
    )
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,), stored)
      biases = jnp.split(bias.astype(self.dtype), self.parts)
      outputs = tuple(y + b for y, b in zip(outputs, biases, strict=True))
    return outputs if self.parts > 1 else outputs[0]


def depthwise(x: Array, kernel: Array, dilation: int = 1) -> Array:
  """Depthwise convolution with padding dilation * (k // 2), stride 1.

  It is k * k shifted products, which XLA fuses into one loop: as a convolution
  it is many times slower on CPU and GPU, in the backward pass above all.

  Args:
    x: (B, H, W, C).
    kernel: (k, k, 1, C), the layout of a convolution with C groups.
    dilation: spacing of the taps.

  Returns:
    (B, H, W, C), summed in at least float32.
  """
  height, width = x.shape[1:3]
  kernel = _within_reach(kernel, dilation, (height, width))
  rows, columns = kernel.shape[:2]
  margins = [(dilation * (taps // 2),) * 2 for taps in (rows, columns)]
  padded = jnp.pad(x, ((0, 0), *margins, (0, 0)))
  total = jnp.zeros(x.shape, at_least_float32(x.dtype))
  for i, j in np.ndindex(rows, columns):
    top, left = i * dilation, j * dilation
    window = padded[:, top : top + height, left : left + width]
    total += window.astype(total.dtype) * kernel[i, j].astype(total.dtype)
  return total.astype(x.dtype)


class DepthwiseConv(nn.Module):
  """Depthwise convolution; the kernel is (k, k, 1, channels).

  In training the backward pass keeps its input alone, and not the k * k shifted
  copies of it that the sum over taps asks for.
  """

  kernel_size: int
  dilation: int = 1
  train: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    k = self.kernel_size
    shape = (k, k, 1, x.shape[-1])
    kernel = self.param(
      'kernel',
      nn.initializers.normal(kernel_std(self.path, shape)),
      shape,
      param_dtype(self.dtype),
    )
    run = partial(depthwise, dilation=self.dilation)
    run = jax.checkpoint(run, prevent_cse=False) if self.train else run
    return run(x.astype(self.dtype), kernel)


def _window(x: Array, axis: int, kernel: int, stride: int, length: int):
  """The `kernel` strided slices whose elementwise fold pools along `axis`."""
  return [
    lax.slice_in_dim(x, i, i + stride * (length - 1) + 1, stride, axis)
    for i in range(kernel)
  ]


def _pool(x: Array, fold, kernel: int, stride: int, padding) -> Array:
  """Separable pooling over zero-padded rows, then columns."""
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


def resize_taps(
  outputs: Array, out_size: int | Array, in_size: int | Array, dtype: Any
) -> tuple[Array, Array, Array]:
  """Between which inputs some outputs of a bilinear interpolation lie.

  Args:
    outputs: int (..., n), which.
    out_size: true number of outputs, an int or an int array (...).
    in_size: true number of inputs, likewise.
    dtype: of the weights.

  Returns:
    Two inputs and the weight of the second, each (..., n).
  """
  xp = np if isinstance(outputs, np.ndarray) else jnp
  out_size = xp.asarray(out_size)[..., None]
  in_size = xp.asarray(in_size)[..., None]
  # Source position ((i + 1/2) in / out - 1/2), times 2 out.
  position = xp.maximum((2 * outputs + 1) * in_size - out_size, 0)
  low = xp.minimum(position // (2 * out_size), in_size - 1)
  high = xp.minimum(low + 1, in_size - 1)
  weight = (position % (2 * out_size)).astype(dtype) / (2 * out_size)
  return low, high, weight.astype(dtype)


def resize_rows(
  outputs: Array,
  out_size: int | Array,
  in_size: int | Array,
  in_length: int,
  dtype: Any,
) -> Array:
  """The rows of `resize_matrix` for some outputs (..., n) that are inside."""
  xp = np if isinstance(outputs, np.ndarray) else jnp
  low, high, weight = resize_taps(outputs, out_size, in_size, dtype)
  inputs = xp.arange(in_length)
  matrix = (inputs == low[..., None]) * (1 - weight)[..., None]
  return matrix + (inputs == high[..., None]) * weight[..., None]


def resize_matrix(
  out_size: int | Array,
  in_size: int | Array,
  out_length: int,
  in_length: int,
  dtype: Any = jnp.float32,
) -> Array:
  """Bilinear interpolation along one axis (align_corners False) as a matrix.

  Sizes may be data, so that one compiled program serves all of them. The
  positions are computed in integers: exact at any size below 2 ** 14.

  Args:
    out_size: true number of outputs, an int or an int array (...).
    in_size: true number of inputs, likewise.
    out_length: rows of the matrix, >= out_size.
    in_length: columns of the matrix, >= in_size.
    dtype: of the weights.

  Returns:
    (..., out_length, in_length), zero beyond the true sizes; a NumPy array
    when the sizes are ints.
  """
  static = all(isinstance(n, (int, np.integer)) for n in (out_size, in_size))
  xp = np if static else jnp
  outputs = xp.arange(out_length)
  rows = resize_rows(outputs, out_size, in_size, in_length, dtype)
  inside = outputs < xp.asarray(out_size)[..., None]
  return (rows * inside[..., None]).astype(dtype)


def pool_matrix(
  bins: int, in_size: int | Array, in_length: int, dtype: Any = jnp.float32
) -> Array:
  """Adaptive average pooling along one axis as a matrix.

  Bin i averages inputs floor(i n / bins) to ceil((i + 1) n / bins), as
  PyTorch's adaptive_avg_pool.

  Returns:
    (..., bins, in_length), zero beyond the true size.
  """
  xp = np if isinstance(in_size, (int, np.integer)) else jnp
  in_size = xp.asarray(in_size)[..., None]
  index, inputs = xp.arange(bins), xp.arange(in_length)
  start = index * in_size // bins
  end = -(-(index + 1) * in_size // bins)
  inside = (inputs >= start[..., None]) & (inputs < end[..., None])
  return (inside / (end - start)[..., None]).astype(dtype)


def apply_matrices(x: Array, rows: Array, columns: Array) -> Array:
  """rows @ x @ columns^T for each image and channel.

  Args:
    x: (B, H, W, C).
    rows: (H', H) or (B, H', H).
    columns: (W', W) or (B, W', W).

  Returns:
    (B, H', W', C).
  """
  b = 'b' if rows.ndim == 3 else ''
  x = jnp.einsum(
    f'bhwc,{b}ih->biwc', x, jnp.asarray(rows, x.dtype), precision='highest'
  )
  return jnp.einsum(
    f'biwc,{b}jw->bijc', x, jnp.asarray(columns, x.dtype), precision='highest'
  )


def resize(
  x: Array, shape: tuple[int, int], in_size: Size = None, out_size: Size = None
) -> Array:
  """Bilinear resize, align_corners False, no antialiasing.

  Args:
    x: (B, H, W, C).
    shape: height and width of the result's canvas.
    in_size: true sizes (B, 2) in x; None: the whole canvas.
    out_size: true sizes (B, 2) in the result; None: the whole canvas.

  Returns:
    (B, *shape, C), zero outside `out_size`.
  """
  dtype = at_least_float32(x.dtype)
  matrices = [
    resize_matrix(
      shape[axis] if out_size is None else out_size[:, axis],
      x.shape[axis + 1] if in_size is None else in_size[:, axis],
      shape[axis],
      x.shape[axis + 1],
      dtype,
    )
    for axis in (0, 1)
  ]
  if matrices[0].ndim != matrices[1].ndim:
    raise ValueError('rows and columns must both have true sizes or neither.')
  return apply_matrices(x, *matrices)


def adaptive_average_pool(x: Array, bins: int, size: Size = None) -> Array:
  """Adaptive average pooling: (B, H, W, C) -> (B, bins, bins, C)."""
  dtype = at_least_float32(x.dtype)
  rows, columns = (
    pool_matrix(
      bins,
      x.shape[axis + 1] if size is None else size[:, axis],
      x.shape[axis + 1],
      dtype,
    )
    for axis in (0, 1)
  )
  return apply_matrices(x, rows, columns)
