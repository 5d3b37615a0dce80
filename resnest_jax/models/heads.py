"""Heads: from four stages and true sizes to logits (B, h, w, classes)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from resnest_jax.models.convolution import Conv
from resnest_jax.models.dropout import Dropout
from resnest_jax.models.initial import LOGITS
from resnest_jax.models.layers import (
  Array,
  Size,
  adaptive_average_pool,
  at_least_float32,
  resize,
  spatial_mean,
)
from resnest_jax.models.normalization import ConvBN, SeparableConvBN
from resnest_jax.models.pyramid import upsampled


class ClassLogits(nn.Module):
  """Dropout, then a 1x1 convolution to the classes."""

  num_classes: int
  dropout: float
  train: bool
  dtype: Any
  elementwise: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = Dropout(self.dropout, self.train, self.elementwise, name='channels')(x)
    logits = Conv(
      self.num_classes, use_bias=True, dtype=self.dtype, name=LOGITS
    )(x)
    return logits.astype(at_least_float32(self.dtype))


class Head(nn.Module):
  """What all heads share. `decode` gives the features (B, h, w, C) to classify.

  Its arguments are features, true sizes, fields of layers with norms, and
  whether dropout is active, which it is with frozen norms too.
  """

  num_classes: int
  channels: int  # of the layers, each branch and level
  dropout: float = 0.1
  dtype: Any = jnp.float32
  frozen_bn: bool = False  # running statistics also in training
  biased: bool = False  # as of `BatchNorm`
  elementwise_dropout: bool = False  # not of whole channels
  # How maps are resized, here and where the logits become those of pixels.
  align_corners: bool = False

  @nn.compact
  def __call__(
    self, features: Sequence[Array], *, train: bool, sizes: Sequence[Size]
  ) -> Array:
    common = {'train': train and not self.frozen_bn, 'dtype': self.dtype}
    common['biased'] = self.biased
    y = self.decode(features, sizes, common, train)
    options = self.dropout, train, self.dtype, self.elementwise_dropout
    return ClassLogits(self.num_classes, *options, name='classifier')(y)


class FCNHead(Head):
  """Fully convolutional head (Long et al., arXiv 1411.4038)."""

  num_convs: int = 2
  concat_input: bool = True  # One more convolution sees input and result.
  stage: int = 3  # of the features, 0 to 3

  def decode(self, features, sizes, common, train):
    x, size = features[self.stage], sizes[self.stage]
    conv = partial(ConvBN, self.channels, 3, **common)
    y = x
    for index in range(self.num_convs):
      y = conv(name=f'convs_{index}')(y, size)
    if self.concat_input:
      y = conv(name='conv_cat')(jnp.concatenate([x, y], -1), size)
    return y


class PSPHead(Head):
  """Pyramid pooling head (Zhao et al., arXiv 1612.01105)."""

  bins: tuple[int, ...] = (1, 2, 3, 6)  # rows and columns of each level

  def decode(self, features, sizes, common, train):
    x, size = features[3], sizes[3]
    # The features first: mmsegmentation's order, which its kernels presume.
    levels = [x]
    for index, bins in enumerate(self.bins):
      pooled = adaptive_average_pool(x, bins, size)
      # (B, bins, bins, channels), of which every bin is true: no size.
      pooled = ConvBN(self.channels, name=f'pyramid_{index}', **common)(pooled)
      shape = x.shape[1:3]
      levels.append(upsampled(pooled, shape, size, self.align_corners))
    return ConvBN(self.channels, 3, name='bottleneck', **common)(levels, size)


class ASPP(nn.Module):
  """Atrous spatial pyramid pooling, and the convolution that merges it."""

  channels: int  # of each branch and of the result
  dilations: tuple[int, ...] = (1, 12, 24, 36)  # 1 is a 1x1 convolution.
  separable: bool = False  # 3x3 convolutions are depthwise, then 1x1.
  train: bool = False
  dtype: Any = jnp.float32
  biased: bool = False
  # As in PyTorch-Encoding: the pooled branch comes last, and 1x1 merges.
  encoding: bool = False

  @nn.compact
  def __call__(self, x: Array, size: Size) -> Array:
    common = {x: getattr(self, x) for x in ('train', 'dtype', 'biased')}
    pooled = spatial_mean(x, size)
    pooled = ConvBN(self.channels, name='image_pool', **common)(pooled)
    pooled = upsampled(pooled, x.shape[1:3], size)
    branches = []
    for index, dilation in enumerate(self.dilations):
      named = common | {'name': f'aspp_{index}'}
      if dilation == 1:
        branch = ConvBN(self.channels, **named)
      elif self.separable:
        branch = SeparableConvBN(self.channels, dilation, **named)
      else:
        branch = ConvBN(self.channels, 3, dilation, **named)
      branches.append(branch(x, size))
    inputs = [pooled, jnp.concatenate(branches, -1)]
    inputs, kernel = (inputs[::-1], 1) if self.encoding else (inputs, 3)
    merge = ConvBN(self.channels, kernel, name='bottleneck', **common)
    return merge(inputs, size)


class DeepLabV3Head(Head):
  """DeepLabV3 (Chen et al., arXiv 1706.05587)."""

  def decode(self, features, sizes, common, train):
    aspp = ASPP(self.channels, name='pyramid', **common)
    return aspp(features[3], sizes[3])


class EncodingDeepLabV3Head(Head):
  """DeepLabV3 of PyTorch-Encoding: a 3x3 convolution follows the pyramid."""

  def decode(self, features, sizes, common, train):
    aspp = ASPP(self.channels, encoding=True, name='pyramid', **common)
    y = aspp(features[3], sizes[3])
    # Of whole channels, at their rate.
    rate = 0.5 if self.dropout else 0.0
    y = Dropout(rate, train, name='project_dropout')(y)
    return ConvBN(self.channels, 3, name='refine', **common)(y, sizes[3])


class DeepLabV3PlusHead(Head):
  """DeepLabV3+ (Chen et al., arXiv 1802.02611); its logits have stride 4."""

  low_level_channels: int = 48  # to which stage 1 is reduced

  def decode(self, features, sizes, common, train):
    aspp = ASPP(self.channels, separable=True, name='pyramid', **common)
    y = aspp(features[3], sizes[3])
    reduce = ConvBN(self.low_level_channels, name='low_level', **common)
    low_level = reduce(features[0], sizes[0])
    y = resize(y, low_level.shape[1:3], sizes[3], sizes[0])
    y = jnp.concatenate([y, low_level], -1)
    for index in range(2):
      refine = SeparableConvBN(self.channels, name=f'refine_{index}', **common)
      y = refine(y, sizes[0])
    return y
