"""The networks once more, in PyTorch's own operators, for one image.

A naive twin of `resnest_jax.models`: no padding, no masks, no matrices. It
takes mmsegmentation's state dict of a network of radix 2 and cardinality 1,
under the dilation rule `mmseg`, and needs no compilation for a new size.
"""

import functools

import numpy as np
import torch
from torch.nn import functional as F

DILATIONS = {8: (1, 1, 2, 4), 16: (1, 1, 1, 2), 32: (1, 1, 1, 1)}
STRIDES = {8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}


class TorchSegmentor:
  """`network(image)`: the decode head's logits.

  Args:
    state_dict: name -> NumPy array, one block a stage.
    head: 'fcn', 'pspnet', 'deeplabv3' or 'deeplabv3plus'.
    output_stride: 8, 16 or 32.
  """

  def __init__(self, state_dict, head, output_stride):
    self.weights = {k: torch.tensor(v) for k, v in state_dict.items()}
    self.strides = STRIDES[output_stride]
    self.dilations = DILATIONS[output_stride]
    self.head = getattr(self, head)

  @torch.inference_mode()
  def __call__(self, image: np.ndarray) -> torch.Tensor:
    """(h, w, 3), normalised, to (1, classes, h / stride, w / stride)."""
    x = torch.tensor(image).permute(2, 0, 1)[None]
    features = self.backbone(x)
    return self.conv('decode_head.conv_seg', self.head(features))

  def conv(self, name, x, stride=1, dilation=1):
    weight = self.weights[f'{name}.weight']
    return F.conv2d(
      x,
      weight,
      self.weights.get(f'{name}.bias'),
      stride,
      dilation * (weight.shape[2] // 2),
      dilation,
      x.shape[1] // weight.shape[1],
    )

  def norm(self, name, x):
    keys = ('running_mean', 'running_var', 'weight', 'bias')
    return F.batch_norm(x, *(self.weights[f'{name}.{key}'] for key in keys))

  def unit(self, name, x, dilation=1):
    """Convolution, normalisation, ReLU; or depthwise, then 1x1."""
    name = f'decode_head.{name}'
    parts = ('.depthwise_conv', '.pointwise_conv')
    if f'{name}.conv.weight' in self.weights:
      parts = ('',)
    for part in parts:
      x = self.conv(f'{name}{part}.conv', x, dilation=dilation)
      x = self.norm(f'{name}{part}.bn', x).relu()
      dilation = 1
    return x

  def backbone(self, x):
    for index, stride in ((0, 2), (3, 1), (6, 1)):
      x = self.conv(f'backbone.stem.{index}', x, stride)
      x = self.norm(f'backbone.stem.{index + 1}', x).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    features = []
    previous = 1
    for stage, (stride, dilation) in enumerate(
      zip(self.strides, self.dilations, strict=True), 1
    ):
      # The first block of a dilated stage still has the dilation before.
      x = self.block(f'backbone.layer{stage}.0', x, stride, previous)
      previous = dilation
      features.append(x)
    return features

  def block(self, name, x, stride, dilation):
    shortcut = F.avg_pool2d(
      x, stride, stride, ceil_mode=True, count_include_pad=False
    )
    shortcut = self.conv(f'{name}.downsample.1', shortcut)
    shortcut = self.norm(f'{name}.downsample.2', shortcut)
    x = self.norm(f'{name}.bn1', self.conv(f'{name}.conv1', x)).relu()
    x = self.split_attention(f'{name}.conv2', x, dilation)
    if stride > 1:
      x = F.avg_pool2d(x, 3, stride, 1)
    x = self.norm(f'{name}.bn3', self.conv(f'{name}.conv3', x))
    return (x + shortcut).relu()

  def split_attention(self, name, x, dilation):
    x = self.conv(f'{name}.conv', x, dilation=dilation)
    first, second = self.norm(f'{name}.bn0', x).relu().chunk(2, 1)
    mean = (first + second).mean((2, 3), keepdim=True)
    hidden = self.norm(f'{name}.bn1', self.conv(f'{name}.fc1', mean)).relu()
    scores = self.conv(f'{name}.fc2', hidden).chunk(2, 1)
    weights = torch.stack(scores).softmax(0)
    return weights[0] * first + weights[1] * second

  def fcn(self, features):
    x = features[3]
    y = self.unit('convs.1', self.unit('convs.0', x))
    return self.unit('conv_cat', torch.cat([x, y], 1))

  def pspnet(self, features):
    x = features[3]
    levels = [x]
    for index, bins in enumerate((1, 2, 3, 6)):
      y = F.adaptive_avg_pool2d(x, bins)
      y = self.unit(f'psp_modules.{index}.1', y)
      levels.append(upsampled(y, x.shape[2:]))
    return self.unit('bottleneck', torch.cat(levels, 1))

  def deeplabv3(self, features):
    x = features[3]
    y = self.unit('image_pool.1', x.mean((2, 3), keepdim=True))
    branches = [y.expand(-1, -1, *x.shape[2:])]
    for index, dilation in enumerate((1, 12, 24, 36)):
      branches.append(self.unit(f'aspp_modules.{index}', x, dilation))
    return self.unit('bottleneck', torch.cat(branches, 1))

  def deeplabv3plus(self, features):
    low = self.unit('c1_bottleneck', features[0])
    y = upsampled(self.deeplabv3(features), low.shape[2:])
    y = torch.cat([y, low], 1)
    return self.unit('sep_bottleneck.1', self.unit('sep_bottleneck.0', y))


upsampled = functools.partial(F.interpolate, mode='bilinear')
"""Bilinear with half-pixel centres, to a height and width."""
