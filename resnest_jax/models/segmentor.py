"""Segmentors: a backbone and heads, and the one place that builds them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from resnest_jax.errors import UserError
from resnest_jax.models.heads import (
  DeepLabV3Head,
  DeepLabV3PlusHead,
  FCNHead,
  PSPHead,
)
from resnest_jax.models.layers import Array, Size
from resnest_jax.models.remat import parse, recomputed
from resnest_jax.models.resnest import (
  BACKBONES,
  DILATION_RULES,
  Backbone,
  ResNeSt,
  attention_channels,
)

HEADS = {
  'fcn': FCNHead,
  'pspnet': PSPHead,
  'deeplabv3': DeepLabV3Head,
  'deeplabv3plus': DeepLabV3PlusHead,
}
DTYPES = {
  'float32': jnp.float32,
  'bfloat16': jnp.bfloat16,
  'float64': jnp.float64,
}
OUTPUT_STRIDES = (8, 16, 32)
# Batch norms that use and keep their running statistics in training.
FROZEN_BN = ('none', 'backbone', 'all')


class SegmentorOutput(NamedTuple):
  """Logits of both heads, (B, h, w, classes), at the heads' resolution."""

  logits: Array
  aux_logits: Array | None  # None without an auxiliary head


class Segmentor(nn.Module):
  """A backbone, a head, and an auxiliary head on the third stage.

  Training needs the auxiliary head; for prediction it may be None.
  """

  backbone: nn.Module
  decode_head: nn.Module
  auxiliary_head: nn.Module | None
  remat: tuple[str, ...] = ()  # as in the backbone

  def __call__(
    self, images: Array, *, train: bool, size: Size = None
  ) -> SegmentorOutput:
    """Computes logits before upsampling.

    Args:
      images: (B, H, W, 3), normalised RGB, zero outside `size`.
      train: batch statistics and dropout (which needs an rng 'dropout').
      size: int (B, 2), true heights and widths; None: the whole canvas. Logits
        inside ceil(size / s) equal those of the unpadded image.

    Returns:
      (B, ceil(H / s), ceil(W / s), classes), float32 or float64; s is the
      output stride, or 4 for DeepLabV3+. Auxiliary logits: at most stride 16.
    """
    images = images.astype(self.backbone.dtype)
    features, sizes = self.backbone(images, train=train, size=size)

    def run(head: nn.Module, features: list[Array]) -> Array:
      return head(features, train=train, sizes=sizes)

    run = recomputed(run, train and 'heads' in self.remat)
    logits = run(self.decode_head, features)
    aux_logits = None
    if self.auxiliary_head is not None:
      aux_logits = run(self.auxiliary_head, features)
    return SegmentorOutput(logits, aux_logits)


def for_training(
  model: Segmentor,
  *,
  remat: str = 'none',
  freeze: int = 0,
) -> Segmentor:
  """Clones a segmentor for training; its variables stay the same.

  `remat` is for `remat.parse`. The first `freeze` parts of the backbone, the
  stem and then the stages, use and keep their running statistics.
  """
  names = parse(remat)
  # model.frozen_bn may have frozen all of the backbone already.
  frozen = max(model.backbone.frozen, freeze)
  return model.clone(
    backbone=model.backbone.clone(remat=names, frozen=frozen), remat=names
  )


def scanned(model: Segmentor, loop: bool = True) -> Segmentor:
  """Clones a segmentor with equal blocks as a loop (`stacking`), or without."""
  return model.clone(backbone=model.backbone.clone(scanned=loop))


def _choice(config: Mapping[str, Any], key: str, accepted) -> Any:
  if config[key] not in accepted:
    names = ', '.join(map(str, accepted))
    raise UserError(f'model.{key} is {config[key]!r}; accepted are {names}.')
  return config[key]


def create_backbone(config: Mapping[str, Any]) -> ResNeSt:
  """Creates the ResNeSt that `config.model` names, varied by its other keys."""
  named = BACKBONES[_choice(config, 'backbone', BACKBONES)]._asdict()
  varied = {
    key: config[key]
    for key in named
    if key in config and config[key] is not None
  }
  if 'stage_sizes' in varied:
    varied['stage_sizes'] = tuple(varied['stage_sizes'])
  backbone = Backbone(**{**named, **varied})
  _check_channels(backbone)
  return ResNeSt(
    **backbone._asdict(),
    output_stride=_choice(config, 'output_stride', OUTPUT_STRIDES),
    dilation_rule=_choice(config, 'dilation_rule', DILATION_RULES),
    dtype=DTYPES[_choice(config, 'dtype', DTYPES)],
    # Here frozen_bn 'all' is 'backbone'; the heads have a field of their own.
    frozen=0 if _frozen_bn(config) == 'none' else 5,
  )


def _check_channels(backbone: Backbone) -> None:
  """Raises `UserError` unless groups and radix share the channels evenly."""
  groups, radix = backbone.groups, backbone.radix
  for stage in range(4):
    channels = backbone.channels(stage)
    hidden = attention_channels(channels, radix)
    for number, divisor, of in (
      (channels, groups * radix, 'model.groups times model.radix'),
      (hidden, groups, 'model.groups'),
    ):
      if number == 0 or number % divisor:
        raise UserError(
          f'a block of stage {stage + 1} has {number} channels, which {of} '
          f'({divisor}) must divide. Change model.width '
          f'({backbone.width}), model.base_width ({backbone.base_width}), '
          f'model.groups ({groups}) or model.radix ({radix}).'
        )


def _frozen_bn(config: Mapping[str, Any]) -> str:
  # Configurations of older checkpoints lack the key.
  if 'frozen_bn' not in config:
    return 'none'
  return _choice(config, 'frozen_bn', FROZEN_BN)


def create_segmentor(config: Mapping[str, Any]) -> Segmentor:
  """Creates the unbound Linen module that `config.model` describes.

  There is no auxiliary head if `aux_channels` is None.

  Raises:
    UserError: an unknown name; the message lists the known ones.
  """
  if config['num_classes'] < 2:
    raise UserError(
      f'model.num_classes is {config["num_classes"]}; it has to be 2 or more. '
      'train.py and eval.py replace 0 by the number of the data set; elsewhere '
      'set --config.model.num_classes=NUMBER.'
    )
  backbone = create_backbone(config)
  common = {
    'num_classes': config['num_classes'],
    'dropout': config['dropout'],
    'dtype': backbone.dtype,
    'frozen_bn': _frozen_bn(config) == 'all',
  }
  head = HEADS[_choice(config, 'head', HEADS)]
  auxiliary_head = None
  if config['aux_channels'] is not None:
    # mmsegmentation's: one convolution on the features of the third stage.
    auxiliary_head = FCNHead(
      channels=config['aux_channels'],
      num_convs=1,
      concat_input=False,
      stage=2,
      **common,
    )
  return Segmentor(
    backbone=backbone,
    decode_head=head(channels=config['head_channels'], **common),
    auxiliary_head=auxiliary_head,
  )
