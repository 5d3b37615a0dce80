"""Rematerialisation: what the backward pass recomputes instead of keeping.

It changes memory and time, and no value.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax

from resnest_jax.errors import UserError

# Modes, which `ResNeSt.remat` and `Segmentor.remat` hold next to the parts.
BLOCKS, STAGES = 'blocks', 'stages'
PARTS = ('stem', 'layer1', 'layer2', 'layer3', 'layer4', 'heads')

# Name of batch norm's moments for `jax.ad_checkpoint.checkpoint_name`. They are
# small, and are kept: recomputing them takes a pass over the features and, on
# several devices, messages.
STATISTICS = 'statistics'
remat = partial(
  nn.remat,
  policy=jax.checkpoint_policies.save_only_these_names(STATISTICS),
)


def parse(text: str) -> tuple[str, ...]:
  """Parses `config.train.remat` for `ResNeSt.remat` and `Segmentor.remat`.

  Accepts 'none', 'blocks', 'stages', or some of `PARTS` with commas between
  them; raises `UserError` for anything else.
  """
  if text == 'none':
    return ()
  # Keeps the inputs of each block, of the stem and of the heads.
  if text == BLOCKS:
    return (BLOCKS, *PARTS)
  # Keeps the inputs of groups of blocks; recomputing a group keeps the inputs
  # of its blocks, so each block is computed three times.
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
  """Wraps a function of (module, ...) in `remat` if `when`."""
  return remat(function) if when else function


def in_groups(names: Sequence[str]) -> list[list[str]]:
  """Cuts a stage's blocks into about as many groups as a group has blocks."""
  # In memory together are the inputs of all groups and of one group's blocks;
  # the root of the number of blocks makes them the fewest.
  length = math.isqrt(max(len(names) - 1, 0)) + 1
  return [
    list(names[begin : begin + length])
    for begin in range(0, len(names), length)
  ]
