"""ImageNet classifiers: a ResNeSt, global average pooling, a linear layer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from resnest_jax.errors import UserError
from resnest_jax.models.layers import (
  Array,
  Size,
  at_least_float32,
  spatial_mean,
)
from resnest_jax.models.resnest import BACKBONES
from resnest_jax.models.segmentor import create_backbone

# None: the backbone's name decides. The dilation rule is that of the authors,
# who published the weights.
DEFAULTS = {
  **dict.fromkeys(BACKBONES['resnest50']._fields),
  'output_stride': 32,
  'dilation_rule': 'official',
  'biased_variance': None,
  'dropout': 0.0,
  'dtype': 'float32',
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
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
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
