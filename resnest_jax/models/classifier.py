"""ImageNet classifiers: a ResNeSt, global average pooling, a linear layer."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from resnest_jax.config_keys import CLASSIFIER
from resnest_jax.errors import UserError
from resnest_jax.models.dropout import Dropout
from resnest_jax.models.layers import (
  Array,
  Size,
  at_least_float32,
  spatial_mean,
)
from resnest_jax.models.resnest import BACKBONES
from resnest_jax.models.segmentor import (
  HEADS,
  check_num_classes,
  choice,
  create_backbone,
  create_segmentor,
)

# None: the backbone's name decides. The dilation rule is that of the authors,
# who published the weights.
DEFAULTS = {
  **dict.fromkeys(BACKBONES['resnest50']._fields),
  'output_stride': 32,
  'dilation_rule': 'official',
  'biased_variance': None,
  'frozen_bn': 'none',
  'dropout': 0.0,
  'dtype': 'float32',
  'in_channels': 3,
}


class Classifier(nn.Module):
  """A linear layer on the spatial mean of a `ResNeSt`'s last stage."""

  backbone: nn.Module
  num_classes: int
  dropout: float = 0.0  # The authors: 0.2 for ResNeSt-200 and 269.

  @nn.compact
  def __call__(self, images: Array, *, train: bool, size: Size = None) -> Array:
    """Logits (B, classes), at least float32; arguments as of `Segmentor`."""
    dtype: Any = self.backbone.dtype
    wide = at_least_float32(dtype)
    images = images.astype(dtype)
    features, sizes = self.backbone(images, train=train, size=size)
    x = jnp.squeeze(spatial_mean(features[3], sizes[3]), (1, 2))
    x = Dropout(self.dropout, train, elementwise=True, name='dropout')(x)
    x = nn.Dense(self.num_classes, dtype=dtype, param_dtype=wide, name='fc')(x)
    return x.astype(wide)


def create_classifier(
  backbone: str, num_classes: int = 1000, **config: Any
) -> Classifier:
  """Creates a classifier with a published backbone, or a variation of one.

  `config` is dropout, dtype and keys of `config.model` that vary the backbone;
  an unknown one raises `UserError`. `apply(variables, images, train=False)`
  gives logits (B, num_classes).
  """
  unknown = sorted(config.keys() - DEFAULTS.keys())
  if unknown:
    raise UserError(
      f'create_classifier does not know {", ".join(unknown)}; accepted are '
      f'num_classes, {", ".join(DEFAULTS)}.'
    )
  config = {**DEFAULTS, **config, 'backbone': backbone}
  return Classifier(create_backbone(config), num_classes, config['dropout'])


def described(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
  """Task of the network of a `config.model`, and the keys that concern it."""
  if config.get('head') != CLASSIFIER:
    return 'segmentor', dict(config)
  known = DEFAULTS.keys() | {'backbone', 'num_classes'}
  return 'classifier', {k: v for k, v in config.items() if k in known}


def create_network(config: Mapping[str, Any]) -> nn.Module:
  """Creates the `Segmentor` or `Classifier` that `config.model` describes."""
  choice(config, 'head', (*HEADS, CLASSIFIER))
  task, fields = described(config)
  if task == 'segmentor':
    return create_segmentor(config)
  check_num_classes(config['num_classes'])
  return create_classifier(**fields)
