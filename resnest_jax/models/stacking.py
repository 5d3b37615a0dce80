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

  def join(node: dict[str, Any], stage: str, count: int) -> None:
    blocks = [node.pop(f'{stage}_{i + 1}') for i in range(count)]
    joined = jax.tree.map(lambda *arrays: np.stack(arrays), *blocks)
    node[f'{stage}_{REST}'] = joined

  return _replace(tree, counts, '1', join)


def unstack(tree: Any, counts: Mapping[str, int]) -> Any:
  """Inverts `stack`, also of shapes; the blocks are views of NumPy arrays."""

  def split(node: dict[str, Any], stage: str, count: int) -> None:
    blocks = jax.device_get(node.pop(f'{stage}_{REST}'))
    for i in range(count):
      part = partial(_part, index=i)
      node[f'{stage}_{i + 1}'] = jax.tree.map(part, blocks)

  return _replace(tree, counts, REST, split)


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
  tree: Any, counts: Mapping[str, int], block: str, change: Callable
) -> Any:
  # An optimizer's state holds trees like the parameters at its own places.
  def there(node: Any) -> list[str]:
    named = isinstance(node, Mapping)
    return [x for x in counts if named and f'{x}_{block}' in node]

  def changed(node: Any) -> Any:
    stages = there(node)
    node = dict(node) if stages else node
    for stage in stages:
      change(node, stage, counts[stage])
    return node

  return jax.tree.map(changed, tree, is_leaf=lambda x: bool(there(x)))
