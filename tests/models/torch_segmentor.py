"""The networks once more, in PyTorch's own operators, for one image.

Naive: no padding, no masks, no matrices. Of radix 2, cardinality 1 and the
dilation rule `mmseg`, with a block a stage.
"""

import functools

import numpy as np
import torch
from torch.nn import functional as F

# Output stride -> stride and dilation of the last two stages. A dilated stage's
# first block, the only one here, has the dilation of the stage before.
STAGES = {8: [(1, 1), (1, 2)], 16: [(2, 1), (1, 1)], 32: [(2, 1), (2, 1)]}


class TorchSegmentor:
  """`network(image)`: a head's logits, of mmsegmentation's NumPy weights."""

  def __init__(self, state_dict, head, output_stride):
    self.weights = {k: torch.tensor(v) for k, v in state_dict.items()}
    self.stages = [(1, 1), (2, 1), *STAGES[output_stride]]
    self.head = getattr(self, head)

  @torch.inference_mode()
  def __call__(self, image: np.ndarray) -> torch.Tensor:
    """(h, w, 3), normalised, to (1, classes, h / stride, w / stride)."""
    x = torch.tensor(image).permute(2, 0, 1)[None]
    return self.conv('decode_head.conv_seg', self.head(*self.backbone(x)))

  def conv(self, name, x, stride=1, dilation=1):
    weight, bias = (self.weights.get(f'{name}.{x}') for x in ('weight', 'bias'))
    padding = dilation * (weight.shape[2] // 2)
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

  def norm(self, conv, norm, x, **options):
    x = self.conv(conv, x, **options)
    keys = ('running_mean', 'running_var', 'weight', 'bias')
    return F.batch_norm(x, *(self.weights[f'{norm}.{key}'] for key in keys))

  def step(self, conv, norm, x, **options):
    return self.norm(conv, norm, x, **options).relu()

  def unit(self, name, x, dilation=1):
    """Convolution, normalisation, ReLU; or depthwise, then 1x1."""
    parts = ['', '.depthwise_conv', '.pointwise_conv']
    for path in [f'decode_head.{name}{part}' for part in parts]:
      if f'{path}.conv.weight' in self.weights:
        x = self.step(f'{path}.conv', f'{path}.bn', x, dilation=dilation)
        dilation = 1
    return x

  def backbone(self, x):
    """Features of the first and of the last stage."""
    for i, stride in enumerate((2, 1, 1)):
      names = f'backbone.stem.{3 * i}', f'backbone.stem.{3 * i + 1}'
      x = self.step(*names, x, stride=stride)
    x, features = F.max_pool2d(x, 3, 2, 1), []
    for stage, (stride, dilation) in enumerate(self.stages, 1):
      x = self.block(f'backbone.layer{stage}.0', x, stride, dilation)
      features.append(x)
    return features[0], x

  def block(self, name, x, stride, dilation):
    shortcut = F.avg_pool2d(x, stride, stride, 0, True, False)
    names = f'{name}.downsample.1', f'{name}.downsample.2'
    shortcut = self.norm(*names, shortcut)
    x = self.step(f'{name}.conv1', f'{name}.bn1', x)
    x = self.split_attention(f'{name}.conv2', x, dilation)
    if stride > 1:
      x = F.avg_pool2d(x, 3, stride, 1)
    return (self.norm(f'{name}.conv3', f'{name}.bn3', x) + shortcut).relu()

  def split_attention(self, name, x, dilation):
    x = self.step(f'{name}.conv', f'{name}.bn0', x, dilation=dilation)
    splits = torch.stack(x.chunk(2, 1))
    mean = splits.sum(0).mean((2, 3), keepdim=True)
    hidden = self.step(f'{name}.fc1', f'{name}.bn1', mean)
    scores = torch.stack(self.conv(f'{name}.fc2', hidden).chunk(2, 1))
    return (scores.softmax(0) * splits).sum(0)

  def fcn(self, _, x):
    y = self.unit('convs.1', self.unit('convs.0', x))
    return self.unit('conv_cat', torch.cat([x, y], 1))

  def pspnet(self, _, x):
    levels = [x]
    for index, bins in enumerate((1, 2, 3, 6)):
      y = self.unit(f'psp_modules.{index}.1', F.adaptive_avg_pool2d(x, bins))
      levels.append(upsampled(y, x.shape[2:]))
    return self.unit('bottleneck', torch.cat(levels, 1))

  def deeplabv3(self, _, x):
    y = self.unit('image_pool.1', x.mean((2, 3), keepdim=True))
    branches = [y.expand(-1, -1, *x.shape[2:])]
    for index, dilation in enumerate((1, 12, 24, 36)):
      branches.append(self.unit(f'aspp_modules.{index}', x, dilation))
    return self.unit('bottleneck', torch.cat(branches, 1))

  def deeplabv3plus(self, low, x):
    low = self.unit('c1_bottleneck', low)
    y = upsampled(self.deeplabv3(None, x), low.shape[2:])
    y = torch.cat([y, low], 1)
    return self.unit('sep_bottleneck.1', self.unit('sep_bottleneck.0', y))


# Bilinear with half-pixel centres, to a height and width.
upsampled = functools.partial(F.interpolate, mode='bilinear')
