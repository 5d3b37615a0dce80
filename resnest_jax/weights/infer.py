"""Recognises the model of a state dict from its names and shapes."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from resnest_jax.errors import UserError
from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.resnest import BACKBONES, EXPANSION, Backbone, ResNeSt
from resnest_jax.models.segmentor import create_backbone, create_segmentor
from resnest_jax.weights.names import DROP, blocks_of, head_modules, head_of

# Kinds of names -> the dilation rule of networks with others than theirs.
RULES = {'encoding': 'official', 'detectron2': 'mmseg'}


class Description(NamedTuple):
  """A model's task, and the keys of `config.model` that concern it."""

  task: str
  config: dict[str, Any]

  def create(self) -> nn.Module:
    """Builds the model."""
    if self.task == 'classifier':
      return create_classifier(**self.config)
    create = {'segmentor': create_segmentor, 'backbone': create_backbone}
    return create[self.task](self.config)


def describe(
  state_dict: Mapping[str, Any], kind: str, backbone: str | None = None
) -> Description:
  """Recognises the model of a state dict with the names of others.

  `kind` is 'mmseg', 'encoding', 'official', 'timm' or 'detectron2', `backbone`
  a name; None assumes `avd_first` False, which names and shapes do not show.
  Raises `UserError` if it is not a ResNeSt, or not the one that is named.
  """
  shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
  config = _backbone_config(shapes, backbone)
  # Only segmentors are dilated, see `_heads_config`.
  rule = RULES.get(kind, kind)
  config |= {'output_stride': 32, 'dilation_rule': rule, 'dtype': 'float32'}
  heads = head_modules(shapes)
  if any(name in ('decode_head', 'head') for name in heads):
    heads = _heads_config(shapes, heads, rule)
    return Description('segmentor', config | heads)
  layers = {'mmseg': 'head.fc.weight', 'detectron2': 'linear.weight'}
  if layer := shapes.get(layers.get(kind, 'fc.weight')):
    extra = {'num_classes': layer[0], 'dropout': 0.0}
    return Description('classifier', config | extra)
  return Description('backbone', config)


def _backbone_config(
  shapes: Mapping[str, tuple], backbone: str | None
) -> dict[str, Any]:
  prefixes = ('backbone.', 'backbone.bottom_up.', 'pretrained.', '')
  firsts = [f'{x}{y}' for x in prefixes for y in ('layer1', 'res2')]
  whole = (x for x in firsts if f'{x}.0.conv1.weight' in shapes)
  try:
    found = _measure(shapes, next(whole, 'layer1'))
  except (KeyError, ZeroDivisionError, ValueError) as error:
    raise UserError(
      f'this is no state dict of a ResNeSt, or not a whole one ({error}).'
    ) from error
  if backbone is not None:
    _check_fits(backbone, found)
    return {'backbone': backbone}
  if fitting := same_shapes(found):
    return {'backbone': fitting[0]}
  # The name is only the base. `avd_first` is no key of `config.model`.
  varied = found._asdict()
  del varied['avd_first']
  return {'backbone': 'resnest50', **varied}


def same_shapes(backbone: Backbone) -> list[str]:
  """Names of the backbones whose weights have the same names and shapes."""
  found = backbone._replace(avd_first=False)
  known = ((x, y._replace(avd_first=False)) for x, y in BACKBONES.items())
  return [name for name, each in known if each == found]


def backbone_of(config: Mapping[str, Any]) -> Backbone:
  """The backbone's fields in a description's `config`."""
  return fields_of(create_backbone(config))


def fields_of(backbone: ResNeSt) -> Backbone:
  return Backbone(*(getattr(backbone, key) for key in Backbone._fields))


def title_of(config: Mapping[str, Any]) -> str:
  """The backbone's published name, or its blocks if it differs from that."""
  found = backbone_of(config)
  if found == BACKBONES[config['backbone']]:
    return config['backbone']
  return f'a ResNeSt of {found.stage_sizes} blocks'


def _check_fits(name: str, found: Backbone) -> None:
  if name not in BACKBONES:
    raise UserError(f'backbone {name!r} is not one of {", ".join(BACKBONES)}.')
  fitting = same_shapes(found)
  if name not in fitting:
    what = ', '.join(fitting) or found._asdict()
    raise UserError(
      f'the state dict is not that of {name}; its shapes fit {what}.'
    )


def with_backbone(
  description: Description, name: str, known: bool
) -> Description:
  """Replaces the backbone's name by the one that the user gives.

  `known` tells whether the old name is more than a guess from shapes. A name
  that the shapes do not fit, or another than is known, raises `UserError`.
  """
  config = description.config
  found = backbone_of(config)
  _check_fits(name, found)
  if known and BACKBONES[name] != found:
    raise UserError(
      f'the weights are known to be of {config["backbone"]}, not of {name}, '
      'which has the same shapes and gives other results. Leave --backbone '
      'out; if it was named wrongly, convert again from the original.'
    )
  # The name stands for every width, and for `avd_first`.
  kept = {k: v for k, v in config.items() if k not in Backbone._fields}
  return description._replace(config=kept | {'backbone': name})


def _measure(shapes: Mapping[str, tuple], first: str) -> Backbone:
  # `first` is the first stage's name, 'backbone.layer1', say.
  prefix = re.sub(r'(layer|res)\d$', '', first)
  pattern = re.compile(re.escape(first[:-1]) + r'\d\.\d+\.conv1\.weight')
  blocks = blocks_of(filter(pattern.fullmatch, shapes))
  if list(blocks) != [1, 2, 3, 4]:
    raise ValueError(f'its stages are {list(blocks)}')
  # The first block shows all widths but `avd_first`. PyTorch's kernels are
  # (out, in / groups, k, k), so in `Bottleneck`'s terms:
  #   conv1       width = planes * base_width / 64 * groups outputs
  #   conv2.conv  width * radix outputs in groups * radix groups
  stems = (f'{prefix}{x}.weight' for x in ('stem.0', 'stem.conv1_1', 'conv1.0'))
  stem = next((x for x in stems if x in shapes), 'the stem')
  block = f'{first}.0'
  channels = shapes[f'{block}.conv1.weight'][0]
  splits, inputs = shapes[f'{block}.conv2.conv.weight'][:2]
  planes = shapes[f'{block}.conv3.weight'][0] // EXPANSION
  radix = splits // channels
  groups = channels // (inputs * radix)
  return Backbone(
    tuple(blocks.values()),
    stem_width=shapes[stem][0],
    radix=radix,
    groups=groups,
    base_width=channels * 64 // (planes * groups),
    width=planes,
  )


def _heads_config(
  shapes: Mapping[str, tuple], modules: list[str], rule: str
) -> dict[str, Any]:
  head, auxiliary_head = head_of(shapes), 'auxiliary_head'
  last = {'fcn': 'conv5.4', 'pspnet': 'conv5.5', 'deeplabv3': 'block.4'}
  layers = [f'{modules[0]}.conv_seg', f'{auxiliary_head}.conv_seg']
  if head and head.startswith('encoding_'):
    auxiliary_head = 'auxlayer'
    name = last[head.removeprefix('encoding_')]
    layers = [f'{modules[0]}.{name}', f'{auxiliary_head}.{last["fcn"]}']
  layer, auxiliary = (shapes.get(f'{x}.weight') for x in layers)
  if head is None or layer is None:
    raise UserError(
      'the heads of this state dict are not known: accepted is a decode_head '
      "of FCN, PSPNet, DeepLabV3 or DeepLabV3+, or PyTorch-Encoding's head of "
      'the first three. To keep the backbone alone: '
      f'{DROP} {" ".join(modules)} (in Python the argument drop).'
    )
  if auxiliary is None and auxiliary_head in modules:
    raise UserError(
      f'the {auxiliary_head} of this state dict is not known: accepted is one '
      'of FCN with its last layer. Prediction does not need it: '
      f'{DROP} {auxiliary_head} (in Python the argument drop).'
    )
  # No state dict has the last three; all of these libraries' are of these.
  return {
    'head': head,
    'head_channels': layer[1],
    'aux_channels': auxiliary[1] if auxiliary else None,
    'num_classes': layer[0],
    'dropout': 0.1,
    'output_stride': 8,
    'dilation_rule': rule,
  }
