"""Exponential moving averages of parameters and statistics."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from resnest_jax.models.layers import Array


def start_average(variables: Mapping[str, Any]) -> dict[str, Any]:
  """The averages before the first step: the variables, in memory of their own.

  They have to be: both are donated to the step.
  """
  return jax.tree.map(jnp.copy, dict(variables))


def next_average(
  average: Any, variables: Any, step: Array, decay: float
) -> Any:
  """The averages after one more step.

  The decay rises from 0.1 to `decay` as (1 + step) / (10 + step), as in
  TensorFlow's `ExponentialMovingAverage`: the average forgets the beginning
  as fast as a short run needs it.

  Args:
    average: before the step.
    variables: after the step, of the same structure.
    step: int scalar, steps finished before this one.
    decay: of a long run, 0 to 1 (excluded).
  """
  warm = (1.0 + step) / (10.0 + step)
  change = 1 - jnp.minimum(decay, warm)
  return jax.tree.map(
    lambda old, new: old + change.astype(old.dtype) * (new - old),
    average,
    variables,
  )
