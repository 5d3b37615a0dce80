"""Freezes parts of the network: no gradient, no decay, no optimizer state."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax


def frozen_parameters(
  params: Mapping[str, Any], freeze: int, norms: str = 'none'
) -> Any:
  """A tree of bools like `params`: which parameters are frozen.

  Args:
    params: of a segmentor; shapes are enough.
    freeze: parts of the backbone from the input on: 0 none, 1 the stem, 2 and
      stage 1, ..., 5 all of it.
    norms: 'none', 'backbone' or 'all': scales and biases of these
      normalisations are frozen as well.
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
  # 'stem_conv1' -> 0, 'layer3_22' -> 3.
  return 0 if name.startswith('stem') else int(name[len('layer')])


def without_gradient(params: Any, frozen: Any) -> Any:
  """The parameters, the frozen ones as constants."""
  return jax.tree.map(
    lambda value, stays: lax.stop_gradient(value) if stays else value,
    params,
    frozen,
  )


def train_the_rest(
  optimizer: optax.GradientTransformation, freeze: int, norms: str = 'none'
) -> optax.GradientTransformation:
  """The optimizer, without state, decay and updates for frozen parameters."""
  # Outside its mask `optax.masked` passes gradients on as updates. Those of
  # frozen parameters are zero, by `without_gradient`.
  if not freeze and norms == 'none':
    return optimizer

  def trained(params: Any) -> Any:
    frozen = frozen_parameters(params, freeze, norms)
    return jax.tree.map(lambda stays: not stays, frozen)

  return optax.masked(optimizer, trained)
