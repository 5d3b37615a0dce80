"""One optimisation step and its state."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from resnest_jax.data.device import preprocess
from resnest_jax.models.layers import Array
from resnest_jax.training.losses import segmentation_loss
from resnest_jax.training.sharding import batch_sharding, replicated


class TrainState(flax.struct.PyTreeNode):
  """All that changes in training; data only.

  `step` counts finished updates (int32 scalar).
  """

  step: Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState

  def variables(self) -> dict[str, Any]:
    """What `model.apply` takes."""
    return {'params': self.params, 'batch_stats': self.batch_stats}


def init_state(
  model: nn.Module, optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
  """A fresh state; trace it with `jit` or `eval_shape`."""
  images = jnp.zeros((1, 64, 64, 3))
  variables = model.init(key, images, train=False)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables['params'],
    batch_stats=variables['batch_stats'],
    opt_state=optimizer.init(variables['params']),
  )


def create_state(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  seed: int,
  mesh: Mesh,
) -> TrainState:
  """A fresh state on the mesh, a function of the seed alone."""
  init = jax.jit(
    partial(init_state, model, optimizer), out_shardings=replicated(mesh)
  )
  return init(jax.random.key(seed))


def abstract_state(
  model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """Shapes, types and placement of a state; nothing is computed."""
  shapes = jax.eval_shape(
    partial(init_state, model, optimizer), jax.random.key(0)
  )
  sharding = replicated(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
  )


def update(
  state: TrainState,
  images: Array,
  labels: Array,
  key: Array,
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  aux_weight: float,
  avg_non_ignore: bool,
) -> tuple[TrainState, dict[str, Array], Any]:
  """Forward, backward, and one step of the optimizer.

  Args:
    state: before the step.
    images: (B, H, W, 3) normalised.
    labels: int (B, H, W), 255 ignored.
    key: for the dropout.
    model: a `Segmentor`.
    optimizer: its state is `state.opt_state`.
    aux_weight: factor of the auxiliary head's loss.
    avg_non_ignore: see `segmentation_loss`.

  Returns:
    The new state, the step's scalars (`loss` = `decode_loss` + `aux_loss`,
    `accuracy` in [0, 1], `gradient_norm`), and the gradients.
  """

  def loss_fn(params):
    output, changed = model.apply(
      {'params': params, 'batch_stats': state.batch_stats},
      images,
      train=True,
      mutable=['batch_stats'],
      rngs={'dropout': key},
    )
    loss = partial(
      segmentation_loss, labels=labels, avg_non_ignore=avg_non_ignore
    )
    decode_loss, accuracy = loss(output.logits)
    aux_loss = aux_weight * loss(output.aux_logits)[0]
    scalars = {
      'loss': decode_loss + aux_loss,
      'decode_loss': decode_loss,
      'aux_loss': aux_loss,
      'accuracy': accuracy,
    }
    return scalars['loss'], (scalars, changed['batch_stats'])

  grads, (scalars, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new_state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )
  scalars['gradient_norm'] = optax.global_norm(grads)
  return new_state, scalars, grads


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  seed: int,
  aux_weight: float,
  avg_non_ignore: bool,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict]]:
  """The compiled step: (state, batch of uint8) -> (state, scalars).

  The state is donated. Batches are as the training pipeline makes them,
  sharded over the mesh; statistics and the loss are those of the global
  batch. Every draw is a function of the seed and of the step.
  """

  def train_step(state, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    images = preprocess(batch['image'], batch['size'], batch['photometric'])
    state, scalars, _ = update(
      state,
      images,
      batch['label'].astype(jnp.int32),
      key,
      model=model,
      optimizer=optimizer,
      aux_weight=aux_weight,
      avg_non_ignore=avg_non_ignore,
    )
    return state, scalars

  whole, split = replicated(mesh), batch_sharding(mesh)
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(whole, split),
    out_shardings=(whole, whole),
  )
