"""Segmentation heads: from the stages' features to logits."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from resnest_jax.models.layers import (
  Array,
  Conv,
  ConvBN,
  Size,
  adaptive_average_pool,
  at_least_float32,
  resize,
)

classifier_init = nn.initializers.normal(0.01)


class Classifier(nn.Module):
  """Dropout of whole channels, then a 1x1 convolution to the classes."""

  num_classes: int
  dropout: float
  train: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = nn.Dropout(
      self.dropout, broadcast_dims=(1, 2), deterministic=not self.train
    )(x)
    logits = Conv(
      self.num_classes,
      use_bias=True,
      dtype=self.dtype,
      kernel_init=classifier_init,
      name='conv_seg',
    )(x)
    return logits.astype(at_least_float32(self.dtype))


class FCNHead(nn.Module):
  """Fully convolutional head (Long et al., arXiv 1411.4038).

  Attributes:
    num_classes: channels of the logits.
    channels: of the 3x3 convolutions.
    num_convs: how many of them.
    concat_input: the input joins their result before one more of them.
    dropout: rate, of whole channels.
    dtype: of the activations.
  """

  num_classes: int
  channels: int
  num_convs: int = 2
  concat_input: bool = True
  dropout: float = 0.1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, size: Size = None) -> Array:
    conv = {'kernel_size': 3, 'train': train, 'dtype': self.dtype}
    y = x
    for index in range(self.num_convs):
      y = ConvBN(self.channels, name=f'convs_{index}', **conv)(y, size)
    if self.concat_input:
      y = jnp.concatenate([x, y], -1)
      y = ConvBN(self.channels, name='conv_cat', **conv)(y, size)
    return Classifier(
      self.num_classes, self.dropout, train, self.dtype, name='classifier'
    )(y)


class PSPHead(nn.Module):
  """Pyramid pooling head (Zhao et al., arXiv 1612.01105).

  Attributes:
    num_classes: channels of the logits.
    channels: of each pyramid level and of the bottleneck.
    bins: rows and columns of each pyramid level.
    dropout: rate, of whole channels.
    dtype: of the activations.
  """

  num_classes: int
  channels: int
  bins: tuple[int, ...] = (1, 2, 3, 6)
  dropout: float = 0.1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool, size: Size = None) -> Array:
    canvas = x.shape[1:3]
    levels = [x]
    for index, bins in enumerate(self.bins):
      pooled = adaptive_average_pool(x, bins, size)
      pooled = ConvBN(
        self.channels, train=train, dtype=self.dtype, name=f'pyramid_{index}'
      )(pooled)
      if size is None:
        levels.append(resize(pooled, canvas))
      else:
        whole = jnp.full_like(size, bins)
        levels.append(resize(pooled, canvas, whole, size))
    y = jnp.concatenate(levels, -1)
    y = ConvBN(
      self.channels, 3, train=train, dtype=self.dtype, name='bottleneck'
    )(y, size)
    return Classifier(
      self.num_classes, self.dropout, train, self.dtype, name='classifier'
    )(y)
