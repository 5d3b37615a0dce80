"""Rematerialisation: what the backward pass computes again instead of keeping.

It changes memory and time, and no value.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax

from resnest_jax.errors import UserError

# How, in `ResNeSt.remat` and `Segmentor.remat`, beside the parts.
BLOCKS, STAGES = 'blocks', 'stages'
PARTS = ('stem', 'layer1', 'layer2', 'layer3', 'layer4', 'heads')

# What `jax.ad_checkpoint.checkpoint_name` calls means and variances. They are
# small and are not computed again, which would take a pass over the features
# and, on several devices, messages between them.
STATISTICS = 'statistics'
remat = partial(
  nn.remat,
  policy=jax.checkpoint_policies.save_only_these_names(STATISTICS),
)


def parse(text: str) -> tuple[str, ...]:
  """What `config.train.remat` asks for.

  Args:
    text: 'none'; 'blocks': of each block, of the stem and of the heads only
      the input is kept; 'stages': of each group of about the root of a
      stage's number of blocks only the input is kept, and while a group is
      computed again, those of its blocks; or parts of the network with commas
      between them, as 'stem,layer1', which are treated as by 'blocks'.

  Returns:
    Names for the attribute `remat` of a `ResNeSt` and of a `Segmentor`.

  Raises:
    UserError: something else.
  """
  if text == 'none':
    return ()
  if text == BLOCKS:
    return (BLOCKS, *PARTS)
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
  """A function of (module, ...) whose insides the backward pass does again."""
  return remat(function) if when else function


def in_groups(names: Sequence[str]) -> list[list[str]]:
  """Cuts a stage's blocks into about as many groups as a group has blocks.

  The inputs of all groups and those of the blocks of one group, which are in
  memory together, are then the fewest.
  """
  length = math.isqrt(max(len(names) - 1, 0)) + 1
  return [
    list(names[begin : begin + length])
    for begin in range(0, len(names), length)
  ]
