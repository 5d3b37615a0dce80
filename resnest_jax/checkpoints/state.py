"""State of a training: what a step changes, and where the run stands."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from resnest_jax.errors import UserError
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.layers import Array
from resnest_jax.models.stacking import stack
from resnest_jax.sharding import replicate, replicated

Optimizer = optax.GradientTransformation


class TrainState(flax.struct.PyTreeNode):
  """All that a step changes; data only."""

  step: Array  # int32 scalar, finished updates.
  params: Any
  batch_stats: Any
  opt_state: optax.OptState
  ema: Any = None  # Or moving averages of `variables()`.

  def variables(self) -> dict[str, Any]:
    """The trained variables, as `model.apply` takes them."""
    return {'params': self.params, 'batch_stats': self.batch_stats}

  def eval_variables(self) -> dict[str, Any]:
    """The variables to evaluate and export: the averages if there are any."""
    return self.variables() if self.ema is None else self.ema


@dataclasses.dataclass
class Run:
  """Where a run stands; changes only while `Stopper.busy()`."""

  state: TrainState
  step: int = 0  # Finished; to read `state.step` is to wait for the devices.
  saved_step: int = 0  # Of the newest checkpoint, also of an interrupted run.
  evaluating: bool = False  # An evaluation of `step` is due, or was cut off.
  # {'step', 'mIoU' or 'top1'} of the best evaluation.
  best: dict[str, Any] | None = None
  stale: int = 0  # Evaluations since the best.
  # The scalars of each step since the last log line: on the devices, or read.
  unlogged: list[Any] = dataclasses.field(default_factory=list)

  def is_over(self, train: Mapping[str, Any]) -> bool:
    """Whether nothing is left to do; `train` is `config.train`."""
    early = 0 < train['early_stop'] <= self.stale
    return (early or self.step >= train['total_steps']) and not self.evaluating


def unlogged_scalars(run: Run) -> list[dict[str, float]]:
  """Waits for the devices; raises `UserError` if a scalar is not finite."""
  rows = jax.tree.map(float, jax.device_get(run.unlogged))
  newest = f'the newest checkpoint is from step {run.saved_step}'
  newest = newest if run.saved_step else 'there is no checkpoint yet'
  for step, row in enumerate(rows, run.step - len(rows) + 1):
    bad = [name for name, value in row.items() if not math.isfinite(value)]
    if bad:
      raise UserError(
        f'{bad[0]} is {row[bad[0]]} at step {step}; {newest}. Lower '
        'optimizer.learning_rate, or look at the labels.'
      )
  return rows


def start_state(
  optimizer: Optimizer, variables: Mapping[str, Any], ema: bool = False
) -> TrainState:
  """The state before the first step, to be traced."""
  return TrainState(
    # Copies: parameters and averages are donated to the step, each once.
    ema=jax.tree.map(jnp.copy, dict(variables)) if ema else None,
    step=jnp.zeros((), jnp.int32),
    params=variables['params'],
    batch_stats=variables['batch_stats'],
    opt_state=optimizer.init(variables['params']),
  )


def create_state(
  model: nn.Module,
  optimizer: Optimizer,
  variables: Mapping[str, Any],
  mesh: Mesh,
  *,
  ema: bool = False,
) -> TrainState:
  """The state before the first step, whole on every device of the mesh.

  `model` and `optimizer` are of `create_training`, the variables, the same on
  all hosts, of `start_variables`; `ema` adds moving averages.
  """
  # Files and draws have each block by its name, however a platform runs them.
  variables = replicate(stack(variables, model.backbone.stacked()), mesh)
  # One program: run eagerly, each leaf of a deep network would compile its own.
  start = jax.jit(
    partial(start_state, optimizer, ema=ema),
    donate_argnums=0,
    out_shardings=replicated(mesh),
  )
  return start(variables)


def abstract_state(
  model: nn.Module, optimizer: Optimizer, mesh: Mesh, *, ema: bool = False
) -> TrainState:
  """Shapes, types and placement of a state; nothing is computed."""
  shapes = jax.eval_shape(
    partial(start_state, optimizer, ema=ema), variable_shapes(model)
  )
  sharding = replicated(mesh)
  return jax.tree.map(lambda x: x.update(sharding=sharding), shapes)
