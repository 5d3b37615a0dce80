"""ImageNet classifiers: a backbone, the mean of its last stage, a layer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from resnest_jax.errors import UserError
from resnest_jax.models.layers import (
  Array,
  Size,
  at_least_float32,
  param_dtype,
  spatial_mean,
)
from resnest_jax.models.resnest import BACKBONES
from resnest_jax.models.segmentor import create_backbone

DEFAULTS = {
  **dict.fromkeys(BACKBONES['resnest50']._fields),
  'output_stride': 32,
  'dilation_rule': 'official',
  'dropout': 0.0,
  'dtype': 'float32',
}


class Classifier(nn.Module):
  """A backbone and one linear layer on the mean of its last stage.

  Attributes:
    backbone: a `ResNeSt`.
    num_classes: of the logits.
    dropout: rate, in training (the authors: 0.2 for ResNeSt-200 and 269).
  """

  backbone: nn.Module
  num_classes: int
  dropout: float = 0.0

  @nn.compact
  def __call__(self, images: Array, *, train: bool, size: Size = None) -> Array:
    """Logits (B, classes), float32 or float64.

    Args:
      images: (B, H, W, 3), normalised RGB, zero outside `size`.
      train: batch statistics and dropout (which needs an rng 'dropout').
      size: None, or int (B, 2): true heights and widths inside the canvas.
    """
    dtype: Any = self.backbone.dtype
    features, sizes = self.backbone(
      images.astype(dtype), train=train, size=size
    )
    x = jnp.squeeze(spatial_mean(features[3], sizes[3]), (1, 2))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    logits = nn.Dense(
      self.num_classes, dtype=dtype, param_dtype=param_dtype(dtype), name='fc'
    )(x)
    return logits.astype(at_least_float32(dtype))


def create_classifier(
  backbone: str, num_classes: int = 1000, **config: Any
) -> Classifier:
  """A classifier with one of the published backbones, or a variation.

  Args:
    backbone: 'resnest14', 'resnest50_fast_2s2x40d', ...
    num_classes: 1000 for the published weights.
    **config: keys of `config.model` that vary the backbone (stage_sizes,
      stem_width, width, radix, groups, base_width, avd_first, output_stride,
      dilation_rule), dropout and dtype.

  Returns:
    An unbound Linen module; `apply(variables, images, train=False)` gives
    logits (B, num_classes).

  Raises:
    UserError: an unknown keyword or name; the message lists the known ones.
  """
  unknown = sorted(config.keys() - DEFAULTS.keys())
  if unknown:
    raise UserError(
      f'create_classifier does not know {", ".join(unknown)}; accepted are '
      f'num_classes, {", ".join(DEFAULTS)}.'
    )
  config = {**DEFAULTS, **config, 'backbone': backbone}
  return Classifier(create_backbone(config), num_classes, config['dropout'])
