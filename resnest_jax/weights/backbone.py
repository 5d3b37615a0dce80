"""The backbone of any network as features of four strides: docs/backbone.md."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from resnest_jax.errors import UserError
from resnest_jax.models.features import FPN, Features
from resnest_jax.models.segmentor import create_backbone
from resnest_jax.weights.names import backbone_part
from resnest_jax.weights.pretrained import HEAD_KEYS, Variables, load_weights
from resnest_jax.weights.state_dict import import_state_dict


def load_backbone(
  source: str | Path,
  *,
  output_stride: int = 32,
  fpn: int | None = None,
  seed: int = 0,
  dtype: str | None = None,
  backbone: str | None = None,
  checkpoint: str | int = 'latest',
  part: str | None = None,
) -> tuple[Features, Variables, dict[str, Any]]:
  """Loads C2 to C5 of a classifier, a segmentor, a detector or a backbone.

  Args:
    source: of the weights, as of `load_pretrained`, whose `dtype`, `backbone`,
      `checkpoint` and `part` these are. What is no backbone is left out.
    output_stride: 32, 16 or 8; stages that would exceed it are dilated, by the
      rule of the source.
    fpn: channels of a pyramid on top, P2 to P6 (256, as a rule), or None.
    seed: of the pyramid's weights, which are random.

  Returns:
    The `Features`, whose `strides` and `channels` are known at once, its
    variables as NumPy arrays, and their description.

  Raises:
    UserError: not found, damaged, or not a ResNeSt.
  """
  if fpn is not None and (type(fpn) is not int or fpn < 1):
    raise UserError(
      f'fpn is {fpn!r}; it is the number of channels of the pyramid, such as '
      '256, or None for C2 to C5.'
    )
  weights = load_weights(
    source, backbone=backbone, checkpoint=checkpoint, part=part
  )
  trained = weights.description.config
  config = trained | {'output_stride': output_stride, 'frozen_bn': 'none'}
  config |= {'dtype': dtype} if dtype else {}
  network = create_backbone(config)
  config |= {'biased_variance': network.biased}
  about = weights.about() | {
    'task': 'backbone',
    'model': {k: v for k, v in config.items() if k not in HEAD_KEYS},
  }
  if trained['output_stride'] != output_stride:
    note = f'trained at output stride {trained["output_stride"]}'
    notes = [*weights.provenance.get('notes', ()), note]
    about['provenance'] = weights.provenance | {'notes': notes}
  kept, _ = backbone_part(weights.state_dict)
  found = import_state_dict(network, kept)
  variables = {key: {'backbone': tree} for key, tree in found.items()}
  model = Features(network)
  if fpn is not None:
    pyramid = FPN(fpn, dtype=network.dtype)
    model, widths = Features(network, pyramid), model.channels.values()
    levels = [jnp.zeros((1, 1, 1, each)) for each in widths]
    draw = jax.jit(lambda key: pyramid.init(key, levels, [None] * len(levels)))
    drawn = jax.device_get(draw(jax.random.key(seed)))
    variables['params']['fpn'] = drawn['params']
  return model, variables, about
