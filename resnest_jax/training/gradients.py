"""Gradients of a batch: at once, or summed over micro-batches.

A batch of B images is cut into M micro-batches as a pack of cards is dealt:
image b belongs to micro-batch b % M. So every device has its share of every
micro-batch, nothing is exchanged, and the cut does not depend on the number of
devices. An image's dropout depends on its place in the batch alone. Groups that
share statistics are dealt whole, so that their gradients stay the same.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnest_jax.errors import UserError
from resnest_jax.labels import IGNORE
from resnest_jax.models.dropout import place_variables
from resnest_jax.models.layers import Array
from resnest_jax.training.freezing import frozen_parameters


class Plan(NamedTuple):
  """How a step computes its gradients."""

  micro_batches: int = 1  # Equal parts of the batch, one after the other.
  freeze: int = 0  # See `frozen_parameters`.
  frozen_norms: str = 'none'
  ema_decay: float = 0.0  # If the state has moving averages.
  group: int = 0  # As of `BatchNorm`.
  dropblock: float = 0.0  # How much more is left out with each step.

  def share(self, step: Array) -> Array | None:
    """The share that DropBlock leaves out at a step, from 0 on."""
    # At the end of each epoch it is that of the authors, who raise it then.
    return self.dropblock * (step + 1.0) if self.dropblock else None


WHOLE = Plan()


def create_plan(config: Mapping[str, Any], devices: int) -> Plan:
  """The plan of a configuration, or a `UserError` if it cannot be meant."""
  train, frozen_bn = config['train'], config['model']['frozen_bn']
  micro = train['micro_batch_size'] or train['batch_size']
  if micro % devices:
    raise UserError(
      f'config.train.micro_batch_size is {micro} and cannot be divided over '
      f'{devices} devices; set it to a multiple of {devices}.'
    )
  if micro < train['batch_size'] and config['mesh']['spatial'] > 1:
    raise UserError(
      'config.train.micro_batch_size and config.mesh.spatial do not go '
      'together yet: set --config.mesh.spatial=1, or '
      '--config.train.micro_batch_size=0.'
    )
  if micro == 1 and frozen_bn != 'all':
    raise UserError(
      'config.train.micro_batch_size is 1, and batch normalisation has no '
      'statistics of one image: set it to 2 or more, to 0 with '
      '--config.train.remat=stages, or set --config.model.frozen_bn=all.'
    )
  if train['freeze_norms'] and frozen_bn == 'none':
    raise UserError(
      'config.train.freeze_norms keeps scales and biases where '
      "config.model.frozen_bn keeps the statistics, and that is 'none': set "
      '--config.model.frozen_bn=backbone (or all).'
    )
  if (train['freeze'] or frozen_bn != 'none') and not config['pretrained']:
    raise UserError(
      'config.train.freeze and config.model.frozen_bn keep weights or '
      'statistics as they are, but there are none to start from: set '
      '--config.pretrained to weights of this backbone (docs/weights.md), or '
      '--config.train.freeze=0 and --config.model.frozen_bn=none.'
    )
  return Plan(
    micro_batches=train['batch_size'] // micro,
    freeze=train['freeze'],
    frozen_norms=frozen_bn if train['freeze_norms'] else 'none',
    ema_decay=train['ema_decay'],
    # A batch that is smaller is a group by itself.
    group=train['norm_group'] if train['norm_group'] <= micro else 0,
    dropblock=config['model']['dropblock'] / train['total_steps'],
  )


def micro_batch_note(plan: Plan, batch_size: int) -> str:
  """A sentence on micro-batches for the log; '' without any."""
  if plan.micro_batches == 1:
    return ''
  micro = batch_size // plan.micro_batches
  return (
    f'each batch of {batch_size} in {plan.micro_batches} x {micro} images: '
    f'batch norm has the statistics of {plan.group or micro} images, and its '
    f'running statistics are updated {plan.micro_batches} times a step '
    '(--config.train.remat=stages and no micro-batches: those of all '
    f'{batch_size}; docs/memory.md)'
  )


Score = Callable[[Any, Array], dict[str, Array]]  # Of output and labels.
Gradients = tuple[Any, dict[str, Array], Any]


def gradients(
  model: nn.Module,
  score: Score,
  variables: Mapping[str, Any],
  images: Array,
  labels: Array,
  key: Array,
  plan: Plan,
  share: Array | None = None,
) -> Gradients:
  """Gradients (zero where frozen), scalars of `score`, running statistics.

  Gradients are the mean of those of the micro-batches; `share` is of
  `Plan.share`.
  """
  params = variables['params']
  frozen = frozen_parameters(params, plan.freeze, plan.frozen_norms)

  def of_part(
    batch_stats: Any, images: Array, labels: Array, places: Array
  ) -> Gradients:
    def loss_fn(params):
      # Without gradients XLA drops the backward pass of frozen parts.
      params = jax.tree.map(
        lambda x, stays: lax.stop_gradient(x) if stays else x, params, frozen
      )
      given = {'params': params, 'batch_stats': batch_stats}
      given |= place_variables(places, share)
      options = {'mutable': ['batch_stats'], 'rngs': {'dropout': key}}
      output, changed = model.apply(given, images, train=True, **options)
      scalars = score(output, labels)
      return scalars['loss'], (scalars, changed['batch_stats'])

    grads, (scalars, changed) = jax.grad(loss_fn, has_aux=True)(params)
    return grads, scalars, changed

  whole = images, labels, jnp.arange(len(images))
  count = plan.micro_batches
  if count == 1:
    return of_part(variables['batch_stats'], *whole)

  # Each micro-batch is normalised by its own statistics, and the running
  # statistics are updated once for each, as PyTorch's accumulation does.
  def one(carry, part):
    batch_stats, total = carry
    grads, scalars, batch_stats = of_part(batch_stats, *part)
    total = jax.tree.map(lambda a, b: a + b / count, total, grads)
    return (batch_stats, total), (scalars, jnp.sum(part[1] != IGNORE))

  # (B, ...) -> (M, B / M, ...); group g goes to micro-batch g % M.
  def deal(x: Array) -> Array:
    groups = x.reshape(-1, count, plan.group or 1, *x.shape[1:])
    return groups.swapaxes(0, 1).reshape(count, -1, *x.shape[1:])

  # A scan compiles the network once, whatever the number of micro-batches.
  begin = variables['batch_stats'], jax.tree.map(jnp.zeros_like, params)
  parts = [deal(x) for x in whole]
  (batch_stats, grads), (scalars, valid) = lax.scan(one, begin, parts)
  means = {name: jnp.mean(values) for name, values in scalars.items()}
  # Accuracy is a mean over valid pixels, and micro-batches differ in these.
  shares = valid / jnp.maximum(jnp.sum(valid), 1)
  means['accuracy'] = jnp.sum(scalars['accuracy'] * shares)
  return grads, means, batch_stats
