"""Gradients of a batch: at once, or summed over micro-batches.

A batch of B images is cut into M micro-batches as a pack of cards is dealt:
image b belongs to micro-batch b % M. On a batch that lies on several devices
every device then has its share of every micro-batch, nothing is exchanged, and
the cut does not depend on the number of devices. The dropout of an image
depends on its place in the batch alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnest_jax.data.labels import IGNORE
from resnest_jax.models.heads import place_variables
from resnest_jax.models.layers import Array
from resnest_jax.training.freezing import without_gradient

# (output, labels) -> scalars, one of which is 'loss'.
Score = Callable[[Any, Array], dict[str, Array]]
Gradients = tuple[Any, dict[str, Array], Any]


def deal(x: Array, micro_batches: int) -> Array:
  """(B, ...) -> (M, B / M, ...)."""
  rows = x.shape[0] // micro_batches
  return x.reshape(rows, micro_batches, *x.shape[1:]).swapaxes(0, 1)


def whole_gradients(
  model: nn.Module,
  score: Score,
  variables: Mapping[str, Any],
  images: Array,
  labels: Array,
  key: Array,
  plan: Any,
) -> Gradients:
  """Gradients of the loss of a batch.

  Args:
    model: a `Segmentor`.
    score: gives the loss and other scalars.
    variables: 'params' and 'batch_stats'.
    images: (B, H, W, 3) normalised.
    labels: int (B, H, W), 255 ignored.
    key: for the dropout.
    plan: a `Plan`.

  Returns:
    The gradients of all parameters (zero where they are frozen), the scalars
    of `score`, and the running statistics after the batch.
  """
  return _gradients(
    model, score, variables, images, labels, key, plan, jnp.arange(len(images))
  )


def _gradients(model, score, variables, images, labels, key, plan, places):
  frozen = plan.frozen(variables['params'])

  def loss_fn(params):
    if frozen is not None:
      params = without_gradient(params, frozen)
    output, changed = model.apply(
      {'params': params, 'batch_stats': variables['batch_stats']}
      | place_variables(places),
      images,
      train=True,
      mutable=['batch_stats'],
      rngs={'dropout': key},
    )
    scalars = score(output, labels)
    return scalars['loss'], (scalars, changed['batch_stats'])

  grads, (scalars, batch_stats) = jax.grad(loss_fn, has_aux=True)(
    variables['params']
  )
  return grads, scalars, batch_stats


def mean_gradients(
  model: nn.Module,
  score: Score,
  variables: Mapping[str, Any],
  images: Array,
  labels: Array,
  key: Array,
  plan: Any,
) -> Gradients:
  """The mean of the gradients of the micro-batches, one after the other.

  Each is normalised by its own statistics, and the running statistics are
  updated once for each. The loss is the mean of theirs.
  """
  count = plan.micro_batches
  places = jnp.arange(len(images))
  parts = [deal(x, count) for x in (images, labels, places)]

  def one(carry, part):
    batch_stats, total = carry
    images, labels, places = part
    grads, scalars, batch_stats = _gradients(
      model,
      score,
      variables | {'batch_stats': batch_stats},
      images,
      labels,
      key,
      plan,
      places,
    )
    total = jax.tree.map(lambda a, b: a + b / count, total, grads)
    return (batch_stats, total), (scalars, jnp.sum(labels != IGNORE))

  zeros = jax.tree.map(jnp.zeros_like, variables['params'])
  (batch_stats, grads), (scalars, valid) = lax.scan(
    one, (variables['batch_stats'], zeros), parts
  )
  means = {name: jnp.mean(values) for name, values in scalars.items()}
  shares = valid / jnp.maximum(jnp.sum(valid), 1)
  means['accuracy'] = jnp.sum(scalars['accuracy'] * shares)
  return grads, means, batch_stats
