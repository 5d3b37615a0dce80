"""Blocks that are alike as one, with an axis before all others.

What trains may hold the blocks of a stage but the first, which are alike, as
one block: `layer3_rest` in place of `layer3_1` to `layer3_22`. The network then
runs it as a loop, and XLA compiles one block rather than 22. Files know nothing
of it: checkpoints, weights and exports have every block by its own name.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

REST = 'rest'
# Fewer blocks take as long to compile as a loop over them.
ENOUGH = 5


def stack(tree: Any, counts: Mapping[str, int]) -> Any:
  """Blocks by name, as one for each stage.

  Args:
    tree: of arrays that are on this host; variables, or what is like them, as
      the state of an optimizer.
    counts: stage -> blocks that become one, as {'layer3': 22}; of the blocks
      of a stage those from the second on.

  Returns:
    The tree, stacked blocks as NumPy arrays.
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
  """The inverse of `stack`.

  Args:
    tree: of arrays, each of which this process can read whole, or of
      `jax.ShapeDtypeStruct`s.
    counts: see `stack`.

  Returns:
    The tree, blocks that were stacked as views of NumPy arrays.
  """

  def split(node: dict[str, Any]) -> dict[str, Any]:
    left = dict(node)
    for stage, count in counts.items():
      if f'{stage}_{REST}' in left:
        blocks = jax.device_get(left.pop(f'{stage}_{REST}'))
        for i in range(count):
          left[f'{stage}_{i + 1}'] = jax.tree.map(
            lambda array, i=i: _part(array, i), blocks
          )
    return left

  return _replace(tree, split, [f'{stage}_{REST}' for stage in counts])


def _part(array: Any, index: int) -> Any:
  if isinstance(array, jax.ShapeDtypeStruct):
    return array.update(shape=array.shape[1:])
  return array[index]


def stacked(params: Mapping[str, Any]) -> dict[str, int]:
  """The `counts` of the parameters of a segmentor."""
  return {
    name.removesuffix(f'_{REST}'): jax.tree.leaves(block)[0].shape[0]
    for name, block in params.get('backbone', {}).items()
    if name.endswith(f'_{REST}')
  }


def _replace(
  tree: Any, change: Callable[[dict], dict], names: list[str]
) -> Any:
  """Changes all dicts that have one of the names."""

  def has_one(node: Any) -> bool:
    return isinstance(node, Mapping) and any(name in node for name in names)

  return jax.tree.map(
    lambda node: change(node) if has_one(node) else node,
    tree,
    is_leaf=has_one,
  )
