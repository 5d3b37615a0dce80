"""Rematerialisation: what the backward pass recomputes instead of keeping."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax

from resnest_jax.errors import UserError

BLOCKS, STAGES = 'blocks', 'stages'
PARTS = ('stem', 'layer1', 'layer2', 'layer3', 'layer4', 'heads')

# Batch norm's moments are kept: recomputing them takes a pass over the features
# and, on several devices, messages.
STATISTICS = 'statistics'
remat = partial(
  nn.remat, policy=jax.checkpoint_policies.save_only_these_names(STATISTICS)
)


def parse(text: str) -> tuple[str, ...]:
  """Parses `config.train.remat` for `ResNeSt.remat` and `Segmentor.remat`."""
  if text == 'none':
    return ()
  if text == BLOCKS:
    return (BLOCKS, *PARTS)
  # Recomputing a group of blocks keeps their inputs: each is computed thrice.
  if text == STAGES:
    return (BLOCKS, STAGES, *PARTS)
  names = tuple(name.strip() for name in text.split(','))
  unknown = [name for name in names if name not in PARTS]
  if unknown:
    raise UserError(
      f"config.train.remat is {text!r}; accepted are 'none', 'blocks', "
      f"'stages', or some of {', '.join(PARTS)} with commas between them."
    )
  return (BLOCKS, *names)


def recomputed(function: Callable, when: bool) -> Callable:
  """`function`, of (module, ...), in `remat` if `when`."""
  return remat(function) if when else function


def in_groups(names: Sequence[str]) -> list[list[str]]:
  """Cuts a stage's blocks into about as many groups as a group has blocks."""
  length = math.isqrt(max(len(names) - 1, 0)) + 1
  return [list(names[i : i + length]) for i in range(0, len(names), length)]
