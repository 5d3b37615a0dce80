"""One optimisation step and its state."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from resnest_jax.checkpoints.state import TrainState
from resnest_jax.data.preprocess import preprocess
from resnest_jax.losses.objective import Loss, create_loss
from resnest_jax.models import implementations
from resnest_jax.models.layers import Array
from resnest_jax.models.remat import STAGES, parse
from resnest_jax.models.segmentor import (
  SegmentorOutput,
  create_segmentor,
  for_training,
  scanned,
)
from resnest_jax.sharding import batch_shardings, replicated, shared_rows
from resnest_jax.training.freezing import train_the_rest
from resnest_jax.training.gradients import WHOLE, Plan, create_plan
from resnest_jax.training.optimizer import create_optimizer

# Values of a gradient that has a sum of its own; smaller ones are copied next
# to each other, up to about as many.
LARGE = 2**20


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


def global_norm(tree: Any) -> Array:
  """The root of the sum of all squares, as `optax.tree.norm`.

  Small leaves are summed together: XLA compiles a few kernels for each sum, and
  a deep network has hundreds of leaves.
  """
  parts, together = [], []
  for leaf in jax.tree.leaves(tree):
    if leaf.size >= LARGE:
      parts.append(leaf)
      continue
    together.append(leaf.ravel())
    if sum(each.size for each in together) >= LARGE:
      parts.append(jnp.concatenate(together))
      together = []
  if together:
    parts.append(jnp.concatenate(together))
  return optax.tree.norm(parts)


def update(
  state: TrainState,
  images: Array,
  labels: Array,
  key: Array,
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  loss: Loss,
  aux_weight: float,
  plan: Plan = WHOLE,
) -> tuple[TrainState, dict[str, Array], Any]:
  """Forward, backward, and one step of the optimizer.

  Args:
    state: before the step.
    images: (B, H, W, 3) normalised.
    labels: int (B, H, W), 255 ignored.
    key: for the dropout.
    model: a `Segmentor`.
    optimizer: its state is `state.opt_state`.
    loss: from `create_loss`, of both heads.
    aux_weight: factor of the auxiliary head's loss.
    plan: micro-batches, what is frozen, averages.

  Returns:
    The new state, the step's scalars (`loss` = `decode_loss` + `aux_loss`,
    `accuracy` in [0, 1], `gradient_norm` before any clipping, and where the
    loss has several terms `decode_` and the name of each, before its weight),
    and the gradients.
  """

  def score(output: SegmentorOutput, labels: Array) -> dict[str, Array]:
    decode_loss, accuracy, terms = loss(output.logits, labels)
    aux_loss = aux_weight * loss(output.aux_logits, labels)[0]
    scalars = {
      'loss': decode_loss + aux_loss,
      'decode_loss': decode_loss,
      'aux_loss': aux_loss,
      'accuracy': accuracy,
    }
    if len(terms) > 1:
      scalars |= {f'decode_{name}': value for name, value in terms.items()}
    return scalars

  grads, scalars, batch_stats = plan.gradients()(
    model, score, state.variables(), images, labels, key, plan
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new_state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )
  if state.ema is not None:
    ema = next_average(
      state.ema, new_state.variables(), state.step, plan.ema_decay
    )
    new_state = new_state.replace(ema=ema)
  scalars['gradient_norm'] = global_norm(grads)
  return new_state, scalars, grads


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  seed: int,
  loss: Loss,
  aux_weight: float,
  plan: Plan = WHOLE,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict]]:
  """The compiled step: (state, batch of uint8) -> (state, scalars).

  The state is donated. Batches are as the training pipeline makes them,
  placed by `shard_batch`; statistics and the loss are those of the global
  batch. Every draw is a function of the seed and of the step.
  """

  @shared_rows(mesh)
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
      loss=loss,
      aux_weight=aux_weight,
      plan=plan,
    )
    return state, scalars

  whole, split = replicated(mesh), batch_shardings(mesh)
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(whole, split),
    out_shardings=(whole, whole),
  )


def compile_step(
  step: Callable, *arguments: Any
) -> tuple[jax.stages.Compiled, dict[str, float]]:
  """A compiled function, and how long that took.

  Args:
    step: of `make_train_step`, or another function of `jax.jit`.
    *arguments: of it; shapes are enough.

  Returns:
    The program; `trace_seconds`, of Python, and `compile_seconds`, of XLA or of
    reading the program from the cache on disk.
  """
  start = time.perf_counter()
  lowered = step.lower(*arguments)
  between = time.perf_counter()
  compiled = lowered.compile()
  return compiled, {
    'trace_seconds': between - start,
    'compile_seconds': time.perf_counter() - between,
  }


class Training(NamedTuple):
  """What a configuration makes of a mesh of devices.

  Attributes:
    model: the segmentor as it is evaluated; it has the step's variables, in
      which blocks may be stacked (`models.stacking`).
    optimizer: of what is trained.
    plan: how gradients are computed.
    step: of `make_train_step`.
  """

  model: nn.Module
  optimizer: optax.GradientTransformation
  plan: Plan
  step: Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict]]


def create_training(
  config: Mapping[str, Any], mesh: Mesh, loss: Loss | None = None
) -> Training:
  """Everything that a training step needs but for the state and the data.

  Args:
    config: the whole configuration, its number of classes known.
    mesh: devices, which may be described only (`jax.experimental.topologies`).
    loss: of both heads; None: the one that `config.loss` describes.

  Raises:
    UserError: the configuration asks for something that does not go.
  """
  train = config['train']
  model = create_segmentor(config['model'])
  plan = create_plan(config, mesh.shape['data'])
  alone = STAGES in parse(train['remat'])
  if implementations.chosen('blocks') == 'scanned' and not alone:
    model = scanned(model)
  optimizer = train_the_rest(
    create_optimizer(config['optimizer'], train['total_steps']),
    plan.freeze,
    plan.frozen_norms,
  )
  step = make_train_step(
    for_training(model, remat=train['remat'], freeze=train['freeze']),
    optimizer,
    mesh,
    seed=config['seed'],
    loss=loss or create_loss(config['loss'], config['model']['num_classes']),
    aux_weight=config['loss']['aux_weight'],
    plan=plan,
  )
  return Training(model, optimizer, plan, step)
