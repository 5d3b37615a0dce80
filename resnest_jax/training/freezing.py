"""Freezes parts of the network: no gradient, no decay, no optimizer state."""

from collections.abc import Mapping, Sequence
from functools import partial
from operator import not_
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

HEADS = 5


def part(path: Sequence[str]) -> int:
  """Where a parameter is: 0 in the stem, 1 to 4 in a stage, `HEADS`."""
  if path[0] != 'backbone':
    return HEADS
  block = path[1]  # 'stem_conv1', 'layer3_22'
  return 0 if block.startswith('stem') else int(block[len('layer')])


def frozen_parameters(
  params: Mapping[str, Any], freeze: int, norms: str = 'none'
) -> Any:
  """A tree of bools like a network's `params`, of which shapes are enough.

  `freeze` counts parts of the backbone: 1 the stem, 2 and stage 1, ..., 5 all
  of it. Scales and biases of the normalisations `norms`, 'none', 'backbone' or
  'all', are frozen as well.
  """
  flat = flatten_dict(params)
  # Of the normalisations in the backbone, or of all.
  below = {'none': 0, 'backbone': HEADS, 'all': HEADS + 1}[norms]

  def frozen(path: tuple[str, ...]) -> bool:
    is_norm = (*path[:-1], 'scale') in flat
    return part(path) < (max(freeze, below) if is_norm else freeze)

  return unflatten_dict({path: frozen(path) for path in flat})


def train_the_rest(
  optimizer: optax.GradientTransformation, freeze: int, norms: str = 'none'
) -> optax.GradientTransformation:
  """The optimizer, without state, decay and updates for frozen parameters."""
  # Outside its mask `optax.masked` passes gradients on as updates. Those of
  # frozen parameters are zero, by `gradients`.
  if not freeze and norms == 'none':
    return optimizer
  frozen = partial(frozen_parameters, freeze=freeze, norms=norms)
  return optax.masked(optimizer, lambda x: jax.tree.map(not_, frozen(x)))
