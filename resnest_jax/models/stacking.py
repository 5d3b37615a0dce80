"""Stacks equal blocks into one, with an axis before all others.

A training may hold `layer3_rest` in place of `layer3_1` to `layer3_22`, which
the network runs as a loop. Checkpoints, weights and exports name every block.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

REST = 'rest'
# A loop over fewer blocks compiles no faster: its kernels are larger.
ENOUGH = 5


def stack(tree: Any, counts: Mapping[str, int]) -> Any:
  """Stacks named blocks of variables, or of a tree like them, in NumPy.

  `counts` is stage -> number of blocks, from the second on: {'layer3': 22}.
  """

  def join(node: dict[str, Any]) -> dict[str, Any]:
    left = dict(node)
    for stage, count in counts.items():
      if f'{stage}_1' in left:
        blocks = [left.pop(f'{stage}_{i + 1}') for i in range(count)]
        left[f'{stage}_{REST}'] = jax.tree.map(
          lambda *arrays: np.stack(arrays), *blocks
        )
    return left

  return _replace(tree, join, [f'{stage}_1' for stage in counts])


def unstack(tree: Any, counts: Mapping[str, int]) -> Any:
  """Inverts `stack`, also of shapes; the blocks are views of NumPy arrays."""

  def split(node: dict[str, Any]) -> dict[str, Any]:
    left = dict(node)
    for stage, count in counts.items():
      if f'{stage}_{REST}' in left:
        blocks = jax.device_get(left.pop(f'{stage}_{REST}'))
        for i in range(count):
          part = partial(_part, index=i)
          left[f'{stage}_{i + 1}'] = jax.tree.map(part, blocks)
    return left

  return _replace(tree, split, [f'{stage}_{REST}' for stage in counts])


def _part(array: Any, index: int) -> Any:
  if isinstance(array, jax.ShapeDtypeStruct):
    return array.update(shape=array.shape[1:])
  return array[index]


def stacked(params: Mapping[str, Any]) -> dict[str, int]:
  """Finds the `counts` of `stack` in a network's parameters."""
  return {
    name.removesuffix(f'_{REST}'): jax.tree.leaves(block)[0].shape[0]
    for name, block in params.get('backbone', {}).items()
    if name.endswith(f'_{REST}')
  }


def _replace(
  tree: Any, change: Callable[[dict], dict], names: list[str]
) -> Any:
  # An optimizer's state holds trees like the parameters at its own places.
  def has_one(node: Any) -> bool:
    return isinstance(node, Mapping) and any(name in node for name in names)

  def changed(node: Any) -> Any:
    return change(node) if has_one(node) else node

  return jax.tree.map(changed, tree, is_leaf=has_one)
