"""Segmentors: a backbone and heads, and the one place that builds them."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from resnest_jax.errors import UserError
from resnest_jax.models import resnest
from resnest_jax.models.heads import (
  DeepLabV3Head,
  DeepLabV3PlusHead,
  EncodingDeepLabV3Head,
  FCNHead,
  PSPHead,
)
from resnest_jax.models.layers import Array, Size
from resnest_jax.models.remat import parse, recomputed

# One 3x3 convolution before the classifier.
_short_fcn = partial(FCNHead, num_convs=1, concat_input=False)
# mmsegmentation's heads, and the authors' own, of PyTorch-Encoding.
HEADS = {
  'fcn': FCNHead,
  'pspnet': PSPHead,
  'deeplabv3': DeepLabV3Head,
  'deeplabv3plus': DeepLabV3PlusHead,
  'encoding_fcn': _short_fcn,
  'encoding_pspnet': PSPHead,
  'encoding_deeplabv3': EncodingDeepLabV3Head,
}
DTYPES = {x: getattr(jnp, x) for x in ('float32', 'bfloat16', 'float64')}
OUTPUT_STRIDES = (8, 16, 32)
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
    """Logits before upsampling, of normalised images, RGB (B, H, W, 3).

    Images are zero outside `size`, int (B, 2), true heights and widths; None:
    the whole canvas. `train` needs an rng 'dropout'. Logits (B, ceil(H / s),
    ceil(W / s), classes) are float32 or float64; s is the output stride, 4 for
    DeepLabV3+, at most 16 for the auxiliary head. Inside ceil(size / s) they
    equal those of the unpadded image.
    """
    images = images.astype(self.backbone.dtype)
    features, sizes = self.backbone(images, train=train, size=size)

    def run(head: nn.Module, features: list[Array]) -> Array:
      return head(features, train=train, sizes=sizes)

    run = recomputed(run, train and 'heads' in self.remat)
    logits = run(self.decode_head, features)
    if self.auxiliary_head is None:
      return SegmentorOutput(logits, None)
    return SegmentorOutput(logits, run(self.auxiliary_head, features))


def for_training(
  model: nn.Module, *, remat: str = 'none', freeze: int = 0, group: int = 0
) -> nn.Module:
  """Clones a network for training; its variables stay the same.

  `remat` is for `remat.parse`. The first `freeze` parts of the backbone, the
  stem and then the stages, use and keep their running statistics. `group` is
  as of `BatchNorm`.
  """
  names = parse(remat)
  # `frozen_bn` may have frozen all of the backbone already.
  frozen = max(model.backbone.frozen, freeze)
  changes = {'remat': names, 'frozen': frozen, 'group': group}
  heads = {'remat': names} if isinstance(model, Segmentor) else {}
  return model.clone(backbone=model.backbone.clone(**changes), **heads)


def scanned(model: nn.Module, loop: bool = True) -> nn.Module:
  """Clones a network with equal blocks as a loop (`stacking`), or without."""
  return model.clone(backbone=model.backbone.clone(scanned=loop))


def choice(config: Mapping[str, Any], key: str, accepted) -> Any:
  """The value of a key of `config.model`, or a `UserError`."""
  if config[key] not in accepted:
    names = ', '.join(map(str, accepted))
    raise UserError(f'model.{key} is {config[key]!r}; accepted are {names}.')
  return config[key]


def create_backbone(config: Mapping[str, Any]) -> resnest.ResNeSt:
  """Creates the ResNeSt that `config.model` names, varied by its other keys."""
  known = resnest.BACKBONES
  named = known[choice(config, 'backbone', known)]._asdict()
  fields = {
    key: value if config.get(key) is None else config[key]
    for key, value in named.items()
  }
  fields['stage_sizes'] = tuple(fields['stage_sizes'])
  _check_channels(resnest.Backbone(**fields))
  biased = config.get('biased_variance')
  return resnest.ResNeSt(
    **fields,
    output_stride=choice(config, 'output_stride', OUTPUT_STRIDES),
    dilation_rule=choice(config, 'dilation_rule', resnest.DILATION_RULES),
    dtype=DTYPES[choice(config, 'dtype', DTYPES)],
    biased=_is_encoding(config) if biased is None else biased,
    frozen=0 if _frozen_bn(config) == 'none' else 5,
    channels=config.get('in_channels') or 3,
  )


def _check_channels(backbone: resnest.Backbone) -> None:
  """Raises `UserError` unless groups and radix share the channels evenly."""
  groups, radix = backbone.groups, backbone.radix
  for stage in range(4):
    planes = backbone.width * 2**stage
    channels = resnest.inner_channels(planes, backbone.base_width, groups)
    hidden = resnest.attention_channels(channels, radix)
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


def _is_encoding(config: Mapping[str, Any]) -> bool:
  # A backbone alone has no head.
  return config.get('head', '').startswith('encoding_')


def _frozen_bn(config: Mapping[str, Any]) -> str:
  # Configurations of older checkpoints lack the key.
  return choice({'frozen_bn': 'none', **config}, 'frozen_bn', FROZEN_BN)


def check_num_classes(number: int) -> None:
  """Raises `UserError` unless there are two classes or more."""
  if number < 2:
    raise UserError(
      f'model.num_classes is {number}; it has to be 2 or more. train.py and '
      'eval.py replace 0 by the number of the data set; elsewhere set '
      '--config.model.num_classes=NUMBER.'
    )


def create_segmentor(config: Mapping[str, Any]) -> Segmentor:
  """Creates the unbound Linen module that `config.model` describes.

  There is no auxiliary head if `aux_channels` is None. Raises `UserError`.
  """
  check_num_classes(config['num_classes'])
  backbone = create_backbone(config)
  common = {
    'num_classes': config['num_classes'],
    'dropout': config['dropout'],
    'dtype': backbone.dtype,
    'frozen_bn': _frozen_bn(config) == 'all',
    'biased': backbone.biased,
    'elementwise_dropout': _is_encoding(config),
    'align_corners': _is_encoding(config),
  }
  head = HEADS[choice(config, 'head', HEADS)]
  auxiliary_head = None
  if config['aux_channels'] is not None:
    auxiliary_head = _short_fcn(
      channels=config['aux_channels'], stage=2, **common
    )
  decode_head = head(channels=config['head_channels'], **common)
  return Segmentor(backbone, decode_head, auxiliary_head)
