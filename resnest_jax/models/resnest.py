"""ResNeSt: Split-Attention Networks (Zhang et al., arXiv 2004.08955).

Numerically equal to the networks of mmsegmentation, of the authors and of timm,
whose parameters are the same. They differ in dilated stages (`DilationRule`).
"""

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from resnest_jax.models.convolution import Conv
from resnest_jax.models.dropout import DropBlock, drop_of
from resnest_jax.models.initial import LAST_NORM
from resnest_jax.models.layers import Array, Size, spatial_mean, strided
from resnest_jax.models.normalization import BatchNorm
from resnest_jax.models.pooling import (
  average_pool,
  max_pool,
  same_pool,
  shortcut_pool,
)
from resnest_jax.models.remat import (
  BLOCKS,
  STAGES,
  in_groups,
  recomputed,
  remat,
)
from resnest_jax.models.stacking import ENOUGH, REST

Fields = dict[str, Any]
Norm = Callable[..., BatchNorm]  # whose first argument is given
EXPANSION = 4  # output channels of a block, per plane
REDUCTION = 4  # of the split attention's hidden channels
DROPPED = (2, 3)  # Stages with DropBlock, from 0 on.
# Fields that all blocks have of the network.
SHARED = ('radix', 'groups', 'base_width', 'avd_first')
SHARED += ('dtype', 'biased', 'group')


class Backbone(NamedTuple):
  """Fields of `ResNeSt` that tell the published networks apart."""

  stage_sizes: tuple[int, int, int, int]
  stem_width: int = 32
  radix: int = 2
  groups: int = 1
  base_width: int = 64
  avd_first: bool = False
  width: int = 64


def inner_channels(planes: int, base_width: int, groups: int) -> int:
  """Channels of a block's split attention."""
  return planes * base_width // 64 * groups


def attention_channels(features: int, radix: int) -> int:
  """Hidden channels of the split attention's weights."""
  # Counted from the input's channels, and at least 32, as in the references.
  return max(features * radix // REDUCTION, 32)


# The authors' fast settings: radix (s), groups (x) and base width (d).
def _fast(radix: int, groups: int, base_width: int) -> Backbone:
  return Backbone((3, 4, 6, 3), 32, radix, groups, base_width, avd_first=True)


BACKBONES = {
  'resnest14': Backbone((1, 1, 1, 1)),
  'resnest26': Backbone((2, 2, 2, 2)),
  'resnest50': Backbone((3, 4, 6, 3)),
  'resnest101': Backbone((3, 4, 23, 3), stem_width=64),
  'resnest200': Backbone((3, 24, 36, 3), stem_width=64),
  'resnest269': Backbone((3, 30, 48, 8), stem_width=64),
  'resnest50_fast_1s1x64d': _fast(1, 1, 64),
  'resnest50_fast_2s1x64d': _fast(2, 1, 64),
  'resnest50_fast_4s1x64d': _fast(4, 1, 64),
  'resnest50_fast_1s2x40d': _fast(1, 2, 40),
  'resnest50_fast_2s2x40d': _fast(2, 2, 40),
  'resnest50_fast_4s2x40d': _fast(4, 2, 40),
  'resnest50_fast_1s4x24d': _fast(1, 4, 24),
}


class DilationRule(NamedTuple):
  """Pools in the first block of a dilated stage, whose stride became 1."""

  average_pool: bool  # 3x3, stride 1, after the split attention
  shortcut_pool: bool  # 2x2, stride 1, in the shortcut


DILATION_RULES = {
  'mmseg': DilationRule(average_pool=False, shortcut_pool=False),
  'official': DilationRule(average_pool=True, shortcut_pool=False),
  'timm': DilationRule(average_pool=False, shortcut_pool=True),
}


class SplitAttention(nn.Module):
  """Radix convolutions, weighted against each other for every channel."""

  features: int
  radix: int  # splits
  groups: int  # cardinality
  dilation: int
  norm: Norm
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, size: Size) -> Array:
    radix, groups = self.radix, self.groups
    channels = self.features * radix
    norm = partial(self.norm, relu=True)
    hidden = attention_channels(x.shape[-1], radix)
    options = {'dilation': self.dilation, 'dtype': self.dtype, 'name': 'conv'}
    conv = Conv(channels, 3, groups=groups * radix, parts=radix, **options)
    splits = conv(x) if radix > 1 else (conv(x),)
    splits = norm(name='bn0')(splits, size)
    x = spatial_mean(sum(splits[1:], splits[0]), size)
    dense = partial(Conv, groups=groups, use_bias=True, dtype=self.dtype)
    x = norm(name='bn1')(dense(hidden, name='fc1')(x))
    x = dense(channels, name='fc2')(x)
    # (B, 1, 1, features * radix) -> (B, radix, 1, 1, features)
    if radix == 1:
      weights = nn.sigmoid(x)[:, None]
    else:  # The channels are ordered (groups, radix, channels of a group).
      batch = x.shape[0]
      x = nn.softmax(x.reshape(batch, groups, radix, -1), axis=2)
      weights = x.swapaxes(1, 2).reshape(batch, radix, 1, 1, self.features)
    products = (weights[:, r] * split for r, split in enumerate(splits))
    return reduce(operator.add, products)


class Bottleneck(nn.Module):
  """1x1 convolution, split attention, 1x1 convolution, and the shortcut."""

  planes: int  # a quarter of the output channels
  stride: int
  dilation: int
  radix: int
  groups: int
  base_width: int  # channels of a group, per 64 planes
  # A 3x3 average pool takes the stride (AVD), even if it is 1.
  average_pool: bool
  avd_first: bool  # That pool stands before the split attention.
  project: bool  # The shortcut is a pool, a 1x1 convolution and a batch norm.
  same_pool: bool  # The shortcut's pool is 2x2 with stride 1.
  train: bool
  dtype: Any
  biased: bool = False  # as of `BatchNorm`, like the next one
  group: int = 0

  @nn.compact
  def __call__(
    self, x: Array, size: Size, drop: DropBlock | None = None
  ) -> Array:
    dtype = self.dtype
    options = {'biased': self.biased, 'group': self.group}
    norm = partial(BatchNorm, self.train, dtype=dtype, **options)
    width = inner_channels(self.planes, self.base_width, self.groups)
    # First, while `size` is still the input's.
    shortcut = self._shortcut(x, size, norm) if self.project else x

    x = Conv(width, dtype=dtype, name='conv1')(x)
    x = norm(relu=True, name='bn1')(x, size)
    # The authors' stands before the ReLU, which is the same: it scales.
    x = x if drop is None else drop(x, 0)
    if self.average_pool and self.avd_first:
      x = average_pool(x, self.stride, size)
      size = strided(size, self.stride)
    x = SplitAttention(
      width, self.radix, self.groups, self.dilation, norm, dtype, name='conv2'
    )(x, size)
    x = x if drop is None else drop(x, 1)
    if self.average_pool and not self.avd_first:
      x = average_pool(x, self.stride, size)
      size = strided(size, self.stride)
    x = Conv(self.planes * EXPANSION, dtype=dtype, name='conv3')(x)
    x = norm(name=LAST_NORM)(x, size)
    return nn.relu((x if drop is None else drop(x, 2)) + shortcut)

  def _shortcut(self, x: Array, size: Size, norm: Norm) -> Array:
    if self.same_pool:
      x = same_pool(x, size)
    else:
      x = shortcut_pool(x, self.stride, size)
    features = self.planes * EXPANSION
    x = Conv(features, dtype=self.dtype, name='downsample_conv')(x)
    return norm(name='downsample_bn')(x, strided(size, self.stride))


# `nn.jit` lowers equal blocks once, which more than halves the time before XLA.
TracedOnce = nn.jit(Bottleneck)
RecomputedOnce = nn.jit(remat(Bottleneck))


class ResNeSt(nn.Module):
  """Features of four stages, at strides 4, 8, 16, 32 or as dilated."""

  stage_sizes: tuple[int, ...]  # blocks of each stage
  stem_width: int = 32
  radix: int = 2  # Of this and the next three see `Bottleneck`.
  groups: int = 1
  base_width: int = 64
  avd_first: bool = False
  width: int = 64  # planes of the first stage, doubled with each stage
  output_stride: int = 32  # 8, 16, 32; stages that would exceed it are dilated
  dilation_rule: str = 'mmseg'  # or 'official', 'timm'
  dtype: Any = jnp.float32
  biased: bool = False  # as of `BatchNorm`, like the next one
  group: int = 0
  # Parts, the stem and then the stages, that keep their running statistics.
  frozen: int = 0
  remat: tuple[str, ...] = ()  # from `remat.parse`
  # Equal blocks are a loop (`stacking`); 'stages' in `remat` needs single ones.
  scanned: bool = False
  channels: int = 3  # of the images

  @nn.compact
  def __call__(
    self, x: Array, *, train: bool, size: Size = None
  ) -> tuple[list[Array], list[Size]]:
    """Four arrays (B, ceil(H / s), ceil(W / s), 4 * planes), and four sizes."""

    def stem(_: nn.Module, x: Array) -> Array:
      common = {'dtype': self.dtype, 'biased': self.biased, 'group': self.group}
      norm = partial(BatchNorm, train and not self.frozen, relu=True, **common)
      # The width, once or twice, and the stride.
      for i, (times, stride) in enumerate([(1, 2), (1, 1), (2, 1)], 1):
        options = {'stride': stride, 'dtype': self.dtype}
        # With kernels of 0 for other bands the colours' result is that of RGB.
        options |= {'apart': 3} if i == 1 else {}
        x = Conv(times * self.stem_width, 3, name=f'stem_conv{i}', **options)(x)
        x = norm(name=f'stem_bn{i}')(x, half)
      return max_pool(x, half)

    drop, half = drop_of(self, x.shape[0], self.group, train), strided(size, 2)
    x = recomputed(stem, train and 'stem' in self.remat)(self, x)
    size = strided(half, 2)
    features, sizes = [], []
    for stage, blocks in enumerate(self.blocks(train)):
      name = f'layer{stage + 1}'
      # A stage's last blocks, if they are a loop.
      alike = self.stacked().get(name, 0)
      apart = dict(list(blocks.items())[: len(blocks) - alike])
      here = drop.at(stage) if drop and stage in DROPPED else None
      for group in self._groups(apart, train, name):
        x, size = group(self, x, size, here)
      if alike:  # Their stride is 1, so that `size` stays.
        x = self._scan(x, size, here, name, blocks[f'{name}_1'], train)
      features.append(x)
      sizes.append(size)
    return features, sizes

  def blocks(self, train: bool) -> list[dict[str, Fields]]:
    """Returns for each stage: name of a block -> fields of the `Bottleneck`."""
    rule = DILATION_RULES[self.dilation_rule]
    stages, shared = [], {name: getattr(self, name) for name in SHARED}
    reached, dilation = 4, 1  # Strides so far; the stem's is 4.
    for stage, count in enumerate(self.stage_sizes):
      stride = 1 if stage == 0 else 2
      # In all references the first block has the dilation of the stage before.
      first_dilation = dilation
      dilated = stride > 1 and reached * stride > self.output_stride
      if dilated:
        dilation, stride = dilation * stride, 1
      reached *= stride
      stages.append({})
      for index in range(count):
        first = index == 0
        stages[-1][f'layer{stage + 1}_{index}'] = shared | {
          'planes': self.width * 2**stage,
          'stride': stride if first else 1,
          'dilation': first_dilation if first else dilation,
          'average_pool': first
          and (stride > 1 or (dilated and rule.average_pool)),
          'project': first,
          'same_pool': first and dilated and rule.shortcut_pool,
          'train': train and stage + 1 >= self.frozen,  # The stem counts, too.
        }
    return stages

  def stacked(self) -> dict[str, int]:
    """Stage -> number of its blocks that are one, for stages that have any."""
    return {
      f'layer{stage + 1}': count - 1
      for stage, count in enumerate(self.stage_sizes)
      if self.scanned and count > ENOUGH
    }

  def _scan(
    self,
    x: Array,
    size: Size,
    drop: DropBlock | None,
    stage: str,
    fields: Fields,
    train: bool,
  ) -> Array:
    block = remat(Bottleneck) if self._again(stage, train) else Bottleneck
    length = self.stacked()[stage]
    scan = nn.scan(
      # `size` is closed over: it is the same for all blocks, and no carry.
      lambda module, x, index: (module(x, size, drop and drop.at(index)), None),
      variable_axes={'params': 0, 'batch_stats': 0},
      split_rngs={'params': True},
      length=length,
    )
    # Each draws as it does alone, the first of them after block 0.
    indices = None if drop is None else jnp.arange(1, length + 1)
    return scan(block(**fields, name=f'{stage}_{REST}'), x, indices)[0]

  def _again(self, stage: str, train: bool, mode: str = BLOCKS) -> bool:
    return train and stage in self.remat and mode in self.remat

  def _groups(
    self, blocks: dict[str, Fields], train: bool, stage: str
  ) -> list[Callable]:
    block = RecomputedOnce if self._again(stage, train) else TracedOnce

    def run(names: list[str]) -> Callable:
      def group(
        _: nn.Module, x: Array, size: Size, drop: DropBlock | None
      ) -> tuple[Array, Size]:
        for name in names:
          here = drop and drop.at(int(name.rpartition('_')[2]))
          x = block(**blocks[name], name=name)(x, size, here)
          size = strided(size, blocks[name]['stride'])
        return x, size

      return recomputed(group, self._again(stage, train, STAGES))

    return [run(names) for names in in_groups(list(blocks))]
