"""ResNeSt-D8 with a PSP head and the auxiliary one, in PyTorch.

As mmsegmentation writes it: grouped convolutions, a concatenated pyramid, the
loss of upsampled logits. Parameters have mmsegmentation's names, so that our
weights load into it.
"""

import torch
from torch import nn
from torch.nn import functional as F

STRIDES, DILATIONS = (1, 2, 1, 1), (1, 1, 2, 4)


def norm_act(channels: int) -> list[nn.Module]:
  return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class ConvModule(nn.Module):
  """Convolution, batch normalisation, ReLU."""

  def __init__(self, inputs: int, outputs: int, kernel: int):
    super().__init__()
    self.conv = nn.Conv2d(
      inputs, outputs, kernel, padding=kernel // 2, bias=False
    )
    self.bn = nn.BatchNorm2d(outputs)

  def forward(self, x):
    return F.relu(self.bn(self.conv(x)), inplace=True)


class SplitAttention(nn.Module):
  """Of radix 2."""

  def __init__(self, channels: int, dilation: int):
    super().__init__()
    hidden = max(channels // 2, 32)
    self.conv = nn.Conv2d(
      *(channels, 2 * channels, 3),
      padding=dilation,
      dilation=dilation,
      groups=2,
      bias=False,
    )
    self.bn0 = nn.BatchNorm2d(2 * channels)
    self.fc1 = nn.Conv2d(channels, hidden, 1)
    self.bn1 = nn.BatchNorm2d(hidden)
    self.fc2 = nn.Conv2d(hidden, 2 * channels, 1)

  def forward(self, x):
    x = F.relu(self.bn0(self.conv(x)), inplace=True)
    batch, _, height, width = x.shape
    splits = x.view(batch, 2, -1, height, width)
    gap = F.adaptive_avg_pool2d(splits.sum(1), 1)
    gap = F.relu(self.bn1(self.fc1(gap)), inplace=True)
    weights = self.fc2(gap).view(batch, 2, -1, 1, 1).softmax(1)
    return (weights * splits).sum(1)


class Bottleneck(nn.Module):
  """A residual block; the first of a stage projects its shortcut."""

  def __init__(self, inputs, planes, stride, dilation, project):
    super().__init__()
    outputs = 4 * planes
    self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(planes)
    self.conv2 = SplitAttention(planes, dilation)
    self.pool = nn.AvgPool2d(3, stride, 1) if stride > 1 else nn.Identity()
    self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
    self.bn3 = nn.BatchNorm2d(outputs)
    self.downsample = nn.Identity()
    if project:
      self.downsample = nn.Sequential(
        nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
      )

  def forward(self, x):
    y = F.relu(self.bn1(self.conv1(x)), inplace=True)
    y = self.bn3(self.conv3(self.pool(self.conv2(y))))
    return F.relu(y + self.downsample(x), inplace=True)


class Backbone(nn.Module):
  def __init__(self, stage_sizes, stem_width, width):
    super().__init__()
    wide = 2 * stem_width
    layers = []
    for inputs, outputs, stride in (
      (3, stem_width, 2),
      (stem_width, stem_width, 1),
      (stem_width, wide, 1),
    ):
      layers.append(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
      )
      layers += norm_act(outputs)
    self.stem = nn.Sequential(*layers)
    inputs, previous = wide, 1
    for stage, blocks in enumerate(stage_sizes):
      planes, stage_blocks = width * 2**stage, []
      for index in range(blocks):
        first = index == 0
        stage_blocks.append(
          Bottleneck(
            inputs,
            planes,
            STRIDES[stage] if first else 1,
            previous if first else DILATIONS[stage],
            first,
          )
        )
        inputs = 4 * planes
      previous = DILATIONS[stage]
      self.add_module(f'layer{stage + 1}', nn.Sequential(*stage_blocks))

  def forward(self, x):
    x = F.max_pool2d(self.stem(x), 3, 2, 1)
    third = self.layer3(self.layer2(self.layer1(x)))
    return third, self.layer4(third)


class PSPHead(nn.Module):
  def __init__(self, inputs, channels, classes, dropout):
    super().__init__()
    bins = (1, 2, 3, 6)
    self.psp_modules = nn.ModuleList(
      nn.Sequential(nn.AdaptiveAvgPool2d(n), ConvModule(inputs, channels, 1))
      for n in bins
    )
    self.bottleneck = ConvModule(inputs + len(bins) * channels, channels, 3)
    self.dropout = nn.Dropout2d(dropout)
    self.conv_seg = nn.Conv2d(channels, classes, 1)

  def forward(self, x):
    size = x.shape[2:]
    levels = [
      F.interpolate(level(x), size, mode='bilinear', align_corners=False)
      for level in self.psp_modules
    ]
    return self.conv_seg(
      self.dropout(self.bottleneck(torch.cat([x, *levels], 1)))
    )


class AuxiliaryHead(nn.Module):
  def __init__(self, inputs, channels, classes, dropout):
    super().__init__()
    self.convs = nn.Sequential(ConvModule(inputs, channels, 3))
    self.dropout = nn.Dropout2d(dropout)
    self.conv_seg = nn.Conv2d(channels, classes, 1)

  def forward(self, x):
    return self.conv_seg(self.dropout(self.convs(x)))


class Segmentor(nn.Module):
  """The network of a `config.model`, as far as this module has it."""

  def __init__(self, config: dict):
    super().__init__()
    width = config['width']
    self.backbone = Backbone(config['stage_sizes'], config['stem_width'], width)
    ends = config['num_classes'], config['dropout']
    self.decode_head = PSPHead(32 * width, config['head_channels'], *ends)
    self.auxiliary_head = AuxiliaryHead(
      16 * width, config['aux_channels'], *ends
    )

  def forward(self, images):
    third, fourth = self.backbone(images)
    if not self.training:
      return self.decode_head(fourth)
    return self.decode_head(fourth), self.auxiliary_head(third)


def loss_of(outputs, labels):
  """mmsegmentation's: means over all pixels, 0.4 of the auxiliary one."""
  decode, aux = (
    F.cross_entropy(
      F.interpolate(
        logits.float(), labels.shape[1:], mode='bilinear', align_corners=False
      ),
      labels,
      ignore_index=255,
      reduction='none',
    ).mean()
    for logits in outputs
  )
  return decode + 0.4 * aux
