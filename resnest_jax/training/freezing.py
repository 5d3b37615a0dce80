"""Parameters that training leaves as they are."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax


def frozen_parameters(
  params: Mapping[str, Any], freeze: int, norms: str = 'none'
) -> Any:
  """Which parameters do not change.

  Args:
    params: of a segmentor; shapes are enough.
    freeze: parts of the backbone from the input on: 1: the stem, 2: and stage
      1, ..., 5: all of it; 0: none.
    norms: 'backbone' or 'all': whose normalisations keep scale and bias, too;
      'none'.

  Returns:
    A tree of bools like `params`.
  """
  flat = flatten_dict(params)

  def frozen(path: tuple[str, ...]) -> bool:
    in_backbone = path[0] == 'backbone'
    if in_backbone and _part(path[1]) < freeze:
      return True
    is_norm = (*path[:-1], 'scale') in flat
    return is_norm and (norms == 'all' or (norms == 'backbone' and in_backbone))

  return unflatten_dict({path: frozen(path) for path in flat})


def _part(name: str) -> int:
  """0 for what belongs to the stem, 1 to 4 for blocks: 'layer3_22'."""
  return 0 if name.startswith('stem') else int(name[len('layer')])


def without_gradient(params: Any, frozen: Any) -> Any:
  """The parameters; the frozen ones are constants to differentiation."""
  return jax.tree.map(
    lambda value, stays: lax.stop_gradient(value) if stays else value,
    params,
    frozen,
  )


def train_the_rest(
  optimizer: optax.GradientTransformation, freeze: int, norms: str = 'none'
) -> optax.GradientTransformation:
  """The optimizer without state, decay and steps for what is frozen.

  Where nothing is frozen it is the optimizer itself. Updates of frozen
  parameters are their gradients, which have to be zero (`without_gradient`).

  Args:
    optimizer: of all parameters.
    freeze: see `frozen_parameters`.
    norms: likewise.
  """
  if not freeze and norms == 'none':
    return optimizer

  def trained(params: Any) -> Any:
    frozen = frozen_parameters(params, freeze, norms)
    return jax.tree.map(lambda stays: not stays, frozen)

  return optax.masked(optimizer, trained)
