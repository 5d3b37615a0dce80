"""Convolutions, implemented as the platform needs (`implementations`)."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnest_jax.models import implementations
from resnest_jax.models.initial import kernel_std
from resnest_jax.models.layers import Array, at_least_float32
from resnest_jax.models.winograd import convolve_3x3

ENOUGH_OUTPUTS = 64  # 'products' is slower with fewer channels.
# 'winograd' needs this many pixels, and pairs of an input and an output
# channel. With a quarter of the pairs a training step gained little.
ENOUGH_PIXELS = 1024
ENOUGH_PAIRS = 2**20


def convolve(
  x: Array,
  kernel: Array,
  *,
  groups: int = 1,
  stride: int = 1,
  dilation: int = 1,
  parts: int = 1,
) -> tuple[Array, ...]:
  """Convolves x (B, H, W, C) with padding dilation * (k // 2).

  The kernel is (k, k, C / groups, out); group g makes the g-th of `groups`
  equal slices of the outputs, as in PyTorch and `lax`. The result is cut into
  `parts`, a divisor of `groups`: arrays (B, H', W', out / parts).
  """
  # XLA's grouped convolution takes 4 to 11 times as long on the CPU, and its
  # partitioner gathers a batch that devices share.
  kernel = _within_reach(kernel, dilation, x.shape[1:3])
  pairs = zip(*(jnp.split(a, groups, -1) for a in (x, kernel)), strict=True)
  outputs = [_dense(*pair, stride, dilation) for pair in pairs]
  each = groups // parts
  return tuple(
    jnp.concatenate(outputs[i : i + each], -1) if each > 1 else outputs[i]
    for i in range(0, groups, each)
  )


def _within_reach(
  kernel: Array, dilation: int, canvas: tuple[int, ...]
) -> Array:
  # Cuts off taps that meet only padding: XLA would multiply the zeros.
  for axis, length in enumerate(canvas):
    if not isinstance(length, int):  # Symbolic: of any length.
      continue
    centre = kernel.shape[axis] // 2
    reach = min(centre, (length - 1) // dilation)
    kernel = lax.slice_in_dim(
      kernel, centre - reach, centre + reach + 1, axis=axis
    )
  return kernel


def _dense(x: Array, kernel: Array, stride: int, dilation: int) -> Array:
  if implementations.chosen('wide') == 'winograd' and _is_wide(
    x, kernel, stride, dilation
  ):
    return convolve_3x3(x, kernel)
  if (
    stride == 1
    and kernel.shape[-1] >= ENOUGH_OUTPUTS
    and implementations.chosen('kernel_gradient') == 'products'
  ):
    return _with_products(x, kernel, dilation)
  return _with_given_gradient(x, kernel, stride, dilation)


def _is_wide(x: Array, kernel: Array, stride: int, dilation: int) -> bool:
  # Not for bfloat16, which lacks the digits that the transforms' sums cost.
  return (
    (*kernel.shape[:2], stride, dilation) == (3, 3, 1, 1)
    and x.dtype == at_least_float32(x.dtype)
    and x.shape[-1] * kernel.shape[-1] >= ENOUGH_PAIRS
    and x.size // x.shape[-1] >= ENOUGH_PIXELS
  )


def _with_given_gradient(
  x: Array, kernel: Array, stride: int, dilation: int
) -> Array:
  # XLA takes a fifth longer for a 1x1 convolution on the CPU.
  if kernel.shape[:2] == (1, 1) and stride == 1:
    return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
  return _convolution(x, kernel, stride, dilation, 1)


def _convolution(
  x: Array, kernel: Array, stride: int, dilation: int, groups: int
) -> Array:
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    _margins(kernel.shape[:2], dilation),
    rhs_dilation=(dilation, dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def _margins(taps: Sequence[int], dilation: int) -> list[tuple[int, int]]:
  return [(dilation * (count // 2),) * 2 for count in taps]


def _windows(x: Array, taps: tuple[int, int], dilation: int) -> Iterator[Array]:
  # The window of x (B, H, W, C) that each tap meets, in the kernel's order.
  height, width = x.shape[1:3]
  padded = jnp.pad(x, ((0, 0), *_margins(taps, dilation), (0, 0)))
  for i, j in np.ndindex(taps):
    top, left = i * dilation, j * dilation
    yield padded[:, top : top + height, left : left + width]


# On the CPU XLA's kernel gradient takes 1.3 to 2 times as long.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _with_products(x: Array, kernel: Array, dilation: int) -> Array:
  return _with_given_gradient(x, kernel, 1, dilation)


def _products_forward(x, kernel, dilation):
  return _with_given_gradient(x, kernel, 1, dilation), (x, kernel)


def _products_backward(dilation, saved, dy):
  x, kernel = saved
  taps, wider = kernel.shape[:2], x.shape[-1] > dy.shape[-1]

  def product(first: Array, second: Array) -> Array:
    pixels = ((0, 1, 2), (0, 1, 2))
    return lax.dot_general(first, second, (pixels, ((), ())))

  # XLA copies the first factor to transpose it: with one tap the smaller array,
  # with several the larger one, whose copy all taps share.
  if taps == (1, 1):
    dkernel = product(dy, x).T if wider else product(x, dy)
  elif wider:
    # Tap t pairs x[q] with dy[q - t], so the windows come in reverse.
    windows = reversed([*_windows(dy, taps, dilation)])
    dkernel = jnp.stack([product(x, window) for window in windows])
  else:
    windows = [*_windows(x, taps, dilation)]
    # Transposed together: XLA turns a single transposed product into one of
    # other dimensions, which its CPU library does not take.
    dkernel = jnp.stack([product(dy, w) for w in windows]).swapaxes(1, 2)
  # In the loop over blocks the gradient of x that XLA derives has a kernel in a
  # layout that its CPU library does not take, and is some three times slower.
  turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
  dx = _with_given_gradient(dy, turned, 1, dilation)
  return dx, dkernel.reshape(kernel.shape)


_with_products.defvjp(_products_forward, _products_backward)


def kernel_of(layer: nn.Module, *shape: int) -> Array:
  """Declares the kernel (..., inputs, outputs) of a module with a `dtype`."""
  start = nn.initializers.normal(kernel_std(layer.path, shape))
  return layer.param('kernel', start, shape, at_least_float32(layer.dtype))


class Conv(nn.Module):
  """Convolution whose padding keeps ceil(H / stride) rows.

  With `parts` > 1 the result is a tuple of that many slices of the channels.
  Inputs beyond `apart` are convolved by themselves and added.
  """

  features: int
  kernel_size: int = 1
  stride: int = 1
  dilation: int = 1
  groups: int = 1
  parts: int = 1
  use_bias: bool = False
  dtype: Any = jnp.float32
  apart: int | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array | tuple[Array, ...]:
    k = self.kernel_size
    kernel = kernel_of(self, k, k, x.shape[-1] // self.groups, self.features)
    # Cast here, gradients are computed, and summed over devices, in `dtype`.
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    options = {'stride': self.stride, 'dilation': self.dilation}
    options |= {'groups': self.groups, 'parts': self.parts}
    if more := self.apart and x.shape[-1] > self.apart:
      more = x[..., self.apart :], kernel[:, :, self.apart :]
      x, kernel = x[..., : self.apart], kernel[:, :, : self.apart]
    outputs = convolve(x, kernel, **options)
    if more:
      # Kernels of 0 add an exact 0; within one sum they would change how the
      # others are rounded.
      outputs = tuple(map(jnp.add, outputs, convolve(*more, **options)))
    if self.use_bias:
      shape, stored = (self.features,), at_least_float32(self.dtype)
      bias = self.param('bias', nn.initializers.zeros, shape, stored)
      biases = jnp.split(bias.astype(self.dtype), self.parts)
      outputs = tuple(y + b for y, b in zip(outputs, biases, strict=True))
    return outputs if self.parts > 1 else outputs[0]


def depthwise(x: Array, kernel: Array, dilation: int = 1) -> Array:
  """Depthwise convolution, with the padding of `convolve`; (k, k, 1, C)."""
  kernel = _within_reach(kernel, dilation, x.shape[1:3])
  if implementations.chosen('depthwise') == 'convolution':
    return _convolution(x, kernel.astype(x.dtype), 1, dilation, x.shape[-1])
  # XLA's convolution takes 20 to 40 times as long as one fused loop on the CPU.
  total = jnp.zeros(x.shape, at_least_float32(x.dtype))
  taps = kernel.shape[:2]
  windows = _windows(x, taps, dilation)
  for tap, window in zip(np.ndindex(taps), windows, strict=True):
    total += window.astype(total.dtype) * kernel[tap].astype(total.dtype)
  return total.astype(x.dtype)


class DepthwiseConv(nn.Module):
  """Depthwise convolution; the kernel is (k, k, 1, channels)."""

  kernel_size: int
  dilation: int = 1
  train: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    k = self.kernel_size
    kernel = kernel_of(self, k, k, 1, x.shape[-1])
    run = partial(depthwise, dilation=self.dilation)
    # The derivative of the sum would keep k * k shifted copies of the input.
    run = jax.checkpoint(run, prevent_cse=False) if self.train else run
    return run(x.astype(self.dtype), kernel)
