"""SGD with momentum, coupled weight decay and the poly schedule."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax


def create_schedule(
  config: Mapping[str, Any], total_steps: int
) -> optax.Schedule:
  """Poly: (lr - min) * (1 - step / total_steps) ** power + min.

  Args:
    config: the `optimizer` part of a configuration.
    total_steps: steps after which the rate stays at its minimum.
  """
  poly = optax.polynomial_schedule(
    config['learning_rate'],
    config['min_learning_rate'],
    config['power'],
    total_steps,
  )
  # Of an int32 count optax computes in float32 even where float64 is enabled.
  return lambda count: poly(jnp.asarray(count, float))


def create_optimizer(
  config: Mapping[str, Any], total_steps: int
) -> optax.GradientTransformation:
  """PyTorch's SGD: the decay joins the gradient before the momentum.

  It applies to every parameter, those of the normalisations and the biases
  included, as in mmsegmentation's configurations.

  Args:
    config: the `optimizer` part of a configuration.
    total_steps: length of the schedule.
  """
  return optax.chain(
    optax.add_decayed_weights(config['weight_decay']),
    optax.sgd(create_schedule(config, total_steps), config['momentum']),
  )
