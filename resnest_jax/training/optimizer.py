"""Optimizers, schedules, and groups of parameters with their own rates.

Both optimizers are PyTorch's: SGD adds the weight decay to the gradient before
the momentum, AdamW applies it separately, times the learning rate.
docs/training.md has the formulas.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.table

from resnest_jax.training.freezing import HEADS, part

Config = Mapping[str, Any]
# By `part`. The layer-wise decay of the learning rate counts backwards.
LAYERS = ('stem', 'stage 1', 'stage 2', 'stage 3', 'stage 4', 'heads')


@dataclasses.dataclass(frozen=True)
class ParamGroup:
  """Parameters with the same factor of the learning rate and weight decay."""

  name: str
  learning_rate: float
  weight_decay: float


def param_groups(params: Any, config: Config) -> Any:
  """A tree like `params` with the `ParamGroup` of each leaf, by its path."""

  def group(path: tuple, _: Any) -> ParamGroup:
    names = [entry.key for entry in path]
    place = part(names)
    # Heads have rate 1, stage 4 decay, stage 3 decay^2, ... (BEiT, 2106.08254).
    rate = config['layer_decay'] ** (HEADS - place)
    if place == HEADS:
      rate *= config['head_multiplier']
    if names[-1] == 'kernel' or config['decay_norm_bias']:
      return ParamGroup(LAYERS[place], rate, config['weight_decay'])
    return ParamGroup(f'{LAYERS[place]}, norms and biases', rate, 0.0)

  return jax.tree_util.tree_map_with_path(group, params)


def group_table(params: Any, config: Config, frozen: Any) -> rich.table.Table:
  """The groups with rates, decays and numbers of parameters, for the log.

  `frozen` is of `frozen_parameters`.
  """
  sizes = collections.Counter()
  trees = param_groups(params, config), params, frozen
  for group, leaf, stays in zip(*map(jax.tree.leaves, trees), strict=True):
    sizes[stays, group] += leaf.size
  table = rich.table.Table('parameters of', title=f'{config["name"]}')
  for column in ('number', 'learning rate', 'weight decay'):
    table.add_column(column, justify='right')

  def place(row: tuple[bool, ParamGroup]) -> tuple[int, str, bool]:
    stays, group = row
    return LAYERS.index(group.name.partition(',')[0]), group.name, stays

  for stays, group in sorted(sizes, key=place):
    rate = f'{group.learning_rate * config["learning_rate"]:.3g}'
    shown = ('frozen', '-') if stays else (rate, f'{group.weight_decay:g}')
    table.add_row(group.name, f'{sizes[stays, group]:,}', *shown)
  return table


def create_schedule(config: Config, total_steps: int) -> optax.Schedule:
  """The learning rate of each step, from 0 on; `total_steps` with the warm-up.

  A `first_count` of 1 gives each step the rate that the next one has with 0.

  With t of T steps done after the warm-up, poly is
  (lr - min) * (1 - t / T) ** power + min and cosine
  (lr - min) * (1 + cos(pi t / T)) / 2 + min. The warm-up rises linearly from
  warmup_ratio * lr to lr.
  """
  rate, least = config['learning_rate'], config['min_learning_rate']
  warmup_steps = config['warmup_steps']
  steps = total_steps - warmup_steps
  if config['schedule'] == 'poly':
    schedule = optax.polynomial_schedule(rate, least, config['power'], steps)
  else:
    schedule = optax.cosine_decay_schedule(rate, steps, least / rate)
  if warmup_steps:
    warmup = optax.linear_schedule(
      config['warmup_ratio'] * rate, rate, warmup_steps
    )
    schedule = optax.join_schedules([warmup, schedule], [warmup_steps])

  # From an int32 count optax computes in float32 even when float64 is enabled.
  # XLA multiplies by 1 / T: the base of the power is negative at the end, and a
  # loop beyond `total_steps` would get NaN.
  def at(count: Any) -> Any:
    count = count + config['first_count']
    given = schedule(jnp.asarray(count, float))
    return jnp.where(count < total_steps, given, least)

  return at


def create_optimizer(
  config: Config, total_steps: int
) -> optax.GradientTransformation:
  """The optimizer that `config.optimizer` describes."""
  # Order matters: clip raw gradients, as PyTorch's `clip_grad_norm_` before the
  # optimizer; decay before the momentum of SGD, after Adam's scaling; factors
  # of groups last, as they multiply the learning rate.
  schedule = create_schedule(config, total_steps)
  decay = _by_group(config, _add_decay)
  stages = []
  if config['clip_norm'] is not None:
    stages.append(optax.clip_by_global_norm(config['clip_norm']))
  if config['name'] == 'sgd':
    sgd = optax.sgd(schedule, config['momentum'], config['nesterov'])
    stages += [decay, sgd]
  else:
    stages += [
      optax.scale_by_adam(config['beta1'], config['beta2'], config['epsilon']),
      decay,
      optax.scale_by_learning_rate(schedule),
    ]
  if config['layer_decay'] != 1 or config['head_multiplier'] != 1:
    stages += [_by_group(config, lambda group, x, _: x * group.learning_rate)]
  return optax.chain(*stages)


def _by_group(config: Config, rule: Callable) -> optax.GradientTransformation:
  """Maps `rule(group, update, parameter)` over the leaves."""
  # Stateless, so that checkpoints do not depend on groups.

  def update(updates, params):
    groups = param_groups(params, config)
    return jax.tree.map(rule, groups, updates, params)

  return optax.stateless(update)


def _add_decay(group: ParamGroup, update: Any, param: Any) -> Any:
  return update + group.weight_decay * param if group.weight_decay else update
