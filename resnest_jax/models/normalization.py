"""Batch normalisation, and the blocks of convolution, norm and ReLU."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from resnest_jax.models.convolution import Conv, DepthwiseConv
from resnest_jax.models.initial import norm_scale
from resnest_jax.models.layers import (
  Array,
  Size,
  at_least_float32,
  zero_outside,
)
from resnest_jax.models.pyramid import Inputs, MergeConv
from resnest_jax.models.remat import STATISTICS

MOMENTUM = 0.9  # of running statistics; PyTorch's momentum of 0.1

# Up to this many values per channel the variance takes a second pass, as
# E[x^2] - E[x]^2 cancels when values, say of a split attention, lie close.
FEW_VALUES = 1024


def moments(x: Array) -> tuple[Array, Array]:
  """Mean and biased variance of each channel, over all axes but the last."""
  axes = tuple(range(x.ndim - 1))
  count = x.size // x.shape[-1]
  exact = x.astype(at_least_float32(x.dtype))
  mean = jnp.sum(exact, axes) / count
  if count <= FEW_VALUES:
    variance = jnp.sum(jnp.square(exact - mean), axes) / count
  else:  # One pass over memory; rounding may push a variance below zero.
    square = jnp.sum(exact * exact, axes) / count
    variance = jnp.maximum(square - mean * mean, 0)
  return mean, variance


def running(kept: Array, new: Array) -> Array:
  """Running statistic after one more batch; carries no gradient."""
  new = lax.stop_gradient(new)
  return MOMENTUM * kept + (1 - MOMENTUM) * new


# The backward pass that JAX derives takes more than twice the memory.
@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
  x: Array, scale: Array, bias: Array, epsilon: float, relu: bool
) -> tuple[Array, Array, Array]:
  """Training-mode batch norm over all axes but the last, optionally with ReLU.

  Under jit with a sharded batch, that is the global batch. Returns the array,
  and mean and biased variance per channel, whose gradients are ignored.
  """
  return _normalize_forward(x, scale, bias, epsilon, relu)[0]


def _normalize_forward(x, scale, bias, epsilon, relu):
  # Named for `remat`, which keeps the moments.
  mean, variance = (checkpoint_name(m, STATISTICS) for m in moments(x))
  exact = x.astype(mean.dtype)
  inverse = lax.rsqrt(variance + epsilon)
  gain = inverse * scale
  y = exact * gain + (bias - mean * gain)
  if relu:
    y = jnp.maximum(y, 0)
  saved = (x, scale, bias, mean, inverse)
  return (y.astype(x.dtype), mean, variance), saved


def _normalize_backward(epsilon, relu, saved, cotangents):
  del epsilon
  x, scale, bias, mean, inverse = saved
  axes = tuple(range(x.ndim - 1))
  count = x.size // x.shape[-1]
  exact, gain = x.astype(mean.dtype), scale * inverse
  dy = cotangents[0].astype(mean.dtype)
  if relu:
    dy = jnp.where(exact * gain + (bias - mean * gain) > 0, dy, 0)
  # These two sums also give the gradients through mean and variance.
  dbias = jnp.sum(dy, axes)
  dscale = jnp.sum(dy * (exact - mean), axes) * inverse
  slope = -gain * inverse * dscale / count
  dx = dy * gain + exact * slope - (gain * dbias / count + mean * slope)
  return dx.astype(x.dtype), dscale, dbias


normalize.defvjp(_normalize_forward, _normalize_backward)


def normalize_groups(
  x: Array, scale: Array, bias: Array, epsilon: float, relu: bool, group: int
) -> tuple[Array, Array, Array]:
  """`normalize` of each `group` consecutive images by themselves; 0: of all.

  Of the moments it returns the means over the groups.
  """
  if not 0 < group < len(x):
    return normalize(x, scale, bias, epsilon, relu)
  alone = jax.vmap(lambda x: normalize(x, scale, bias, epsilon, relu))
  y, mean, variance = alone(x.reshape(-1, group, *x.shape[1:]))
  return y.reshape(x.shape), jnp.mean(mean, 0), jnp.mean(variance, 0)


class BatchNorm(nn.Module):
  """Batch normalisation as PyTorch computes it, optionally with ReLU.

  Unlike Flax's, the running variance is the unbiased one. The input may be a
  tuple of arrays that together hold the channels; the result is then one, too.
  """

  train: bool
  relu: bool = False
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  biased: bool = False  # the running variance: the authors', and MXNet's
  # Consecutive images that share statistics, as those of a GPU; 0: all.
  group: int = 0

  @nn.compact
  def __call__(
    self, x: Array | Sequence[Array], size: Size = None
  ) -> Array | tuple[Array, ...]:
    # The splits of a split attention stay apart: joining them would be a copy.
    parts = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    ends = np.cumsum([part.shape[-1] for part in parts])
    features, stored = int(ends[-1]), at_least_float32(self.dtype)
    start = nn.initializers.constant(norm_scale(self.path))
    scale = self.param('scale', start, (features,), stored)
    bias = self.param('bias', nn.initializers.zeros, (features,), stored)
    mean = self.variable('batch_stats', 'mean', jnp.zeros, features, stored)
    var = self.variable('batch_stats', 'var', jnp.ones, features, stored)

    values = [scale, bias]
    if not self.train:
      values += [mean.value, var.value]
    values = [jnp.split(value, ends[:-1]) for value in values]
    each = list(zip(parts, *values, strict=True))
    if self.train:
      outputs = self._normalize(each, mean, var)
    else:
      outputs = [self._apply_given(*given) for given in each]
    outputs = tuple(zero_outside(y.astype(self.dtype), size) for y in outputs)
    return outputs if isinstance(x, (tuple, list)) else outputs[0]

  def _normalize(self, each, mean, var):
    shape = each[0][0].shape
    shape = (min(self.group or shape[0], shape[0]), *shape[1:])
    count = math.prod(shape[:-1])
    if count < 2:
      raise ValueError(
        f'{"/".join(self.path)}: batch normalisation in training needs more '
        f'than one value per channel, but the input is {shape}; use a batch of '
        'at least 2 images.'
      )
    options = self.epsilon, self.relu, self.group
    results = [normalize_groups(*given, *options) for given in each]
    outputs, means, variances = zip(*results, strict=True)
    # `init` returns the initial statistics, not those of its images.
    if not self.is_initializing():
      variance = jnp.concatenate(variances)
      if not self.biased:
        variance = variance * (count / (count - 1))
      mean.value = running(mean.value, jnp.concatenate(means))
      var.value = running(var.value, variance)
    return outputs

  def _apply_given(self, part, scale, bias, mean, var):
    gain = scale * lax.rsqrt(var + self.epsilon)
    y = part.astype(gain.dtype) * gain + (bias - mean * gain)
    y = y.astype(self.dtype)
    return jnp.maximum(y, 0) if self.relu else y


class ConvBN(nn.Module):
  """Convolution, batch norm and ReLU: mmsegmentation's ConvModule."""

  features: int | None  # None: a depthwise convolution
  kernel_size: int = 1
  dilation: int = 1
  train: bool = False
  dtype: Any = jnp.float32
  biased: bool = False

  @nn.compact
  def __call__(self, x: Array | Inputs, size: Size = None) -> Array:
    """Takes an array, or what a `MergeConv` takes, undilated."""
    kernel, options = self.kernel_size, {'dtype': self.dtype, 'name': 'conv'}
    if isinstance(x, (list, tuple)):
      conv = MergeConv(self.features, kernel, **options)
    elif self.features is None:
      conv = DepthwiseConv(kernel, self.dilation, self.train, **options)
    else:
      conv = Conv(self.features, kernel, dilation=self.dilation, **options)
    options = {'dtype': self.dtype, 'biased': self.biased, 'name': 'bn'}
    return BatchNorm(self.train, relu=True, **options)(conv(x), size)


class SeparableConvBN(nn.Module):
  """3x3 depthwise, then 1x1 convolution, each with batch norm and ReLU."""

  features: int
  dilation: int = 1
  train: bool = False
  dtype: Any = jnp.float32
  biased: bool = False

  @nn.compact
  def __call__(self, x: Array, size: Size = None) -> Array:
    common = {x: getattr(self, x) for x in ('train', 'dtype', 'biased')}
    x = ConvBN(None, 3, self.dilation, name='depthwise', **common)(x, size)
    return ConvBN(self.features, name='pointwise', **common)(x, size)
