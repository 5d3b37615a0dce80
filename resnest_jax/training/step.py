"""One optimiser step: forward, backward, update; compiled for a mesh."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from resnest_jax.checkpoints.state import TrainState
from resnest_jax.config_keys import classifies
from resnest_jax.data.preprocess import IMAGENET, Normalization, preprocess
from resnest_jax.errors import UserError
from resnest_jax.losses.images import image_loss
from resnest_jax.losses.objective import Loss, create_loss
from resnest_jax.models import implementations
from resnest_jax.models.classifier import create_network
from resnest_jax.models.layers import Array
from resnest_jax.models.remat import STAGES, parse
from resnest_jax.models.segmentor import SegmentorOutput, for_training, scanned
from resnest_jax.sharding import (
  batch_sharding,
  batch_shardings,
  replicated,
  shared_rows,
)
from resnest_jax.training.freezing import train_the_rest
from resnest_jax.training.gradients import WHOLE, Plan, create_plan, gradients
from resnest_jax.training.mixing import Mixing
from resnest_jax.training.optimizer import create_optimizer

# `global_norm` concatenates smaller leaves up to about this size.
LARGE = 2**20


def next_average(
  average: Any, variables: Any, step: Array, decay: float
) -> Any:
  """The moving averages after one more step."""
  # TensorFlow's `ExponentialMovingAverage`: the decay rises from 0.1, so that
  # the average of a short run does not remember its random start.
  warm = (1.0 + step) / (10.0 + step)
  change = 1 - jnp.minimum(decay, warm)

  def move(old: Array, new: Array) -> Array:
    return old + change.astype(old.dtype) * (new - old)

  return jax.tree.map(move, average, variables)


def global_norm(tree: Any) -> Array:
  """As `optax.tree.norm`."""
  # XLA compiles a few kernels for each sum, and a deep network has hundreds of
  # leaves: small ones are concatenated and summed together.
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
  """Forward, backward, and one update.

  Args:
    images: (B, H, W, 3) normalised.
    labels: int (B, H, W), 255 ignored; of a classifier the shares of the
      classes, (B, classes).
    model: from `for_training`.
    loss: of both heads, from `create_loss`, or `image_loss`.

  Returns:
    The new state; the step's scalars: `loss`, `accuracy` in [0, 1],
    `gradient_norm` before clipping, of a segmentor `decode_loss` and the
    weighted `aux_loss`, whose sum the loss is, and the loss's terms as
    `decode_NAME`; and the gradients.
  """

  def score(output: SegmentorOutput | Array, labels: Array) -> dict[str, Array]:
    segmentor = isinstance(output, SegmentorOutput)
    # The loss upsamples in row tiles: (B, H, W, classes) never exists.
    given = loss(output.logits if segmentor else output, labels)
    if not (isinstance(given, tuple) and len(given) == 3):
      raise UserError(
        'a loss has to return (loss, accuracy, terms): two scalars, and a dict '
        f'of named scalars, which may be empty; it returned {given!r}.'
      )
    decode_loss, accuracy, terms = given
    if not segmentor:
      return {'loss': decode_loss, 'accuracy': accuracy, **terms}
    aux_loss = aux_weight * loss(output.aux_logits, labels)[0]
    return {
      'loss': decode_loss + aux_loss,
      'decode_loss': decode_loss,
      'aux_loss': aux_loss,
      'accuracy': accuracy,
      **{f'decode_{name}': x for name, x in terms.items()},
    }

  given = images, labels, key, plan, plan.share(state.step)
  grads, scalars, batch_stats = gradients(
    model, score, state.variables(), *given
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  step, params = state.step + 1, optax.apply_updates(state.params, updates)
  new_state = TrainState(step, params, batch_stats, opt_state)
  if state.ema is not None:
    variables = new_state.variables()
    ema = next_average(state.ema, variables, state.step, plan.ema_decay)
    new_state = new_state.replace(ema=ema)
  # Of the raw gradients: the optimizer clips a copy.
  scalars['gradient_norm'] = global_norm(grads)
  return new_state, scalars, grads


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  seed: int,
  mixing: Mixing | None = None,
  normalization: Normalization = IMAGENET,
  **options: Any,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict]]:
  """The jitted step: (state, batch) -> (state, scalars); donates the state.

  Batches come from `training_batches`; `options` are the others of `update`,
  `mixing` is a classifier's. Statistics and loss are those of the global batch,
  on any number of devices.
  """

  @shared_rows(mesh)
  def train_step(state, batch):
    # A function of seed and step, never stored: a resumed run draws alike.
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    given = batch['image'], batch['size'], batch.get('photometric')
    how = {'normalization': normalization, 'shift': batch.get('shift')}
    images = preprocess(*given, **how)
    labels = batch['label'].astype(jnp.int32)
    if mixing:
      images, labels = mixing(images, labels, key)
    parts = {'model': model, 'optimizer': optimizer, **options}
    state, scalars, _ = update(state, images, labels, key, **parts)
    return state, scalars

  # The program is written for the global batch, and XLA inserts what devices
  # exchange: batch norm needs no axis name.
  # A classifier's images are never cut.
  whole = replicated(mesh)
  split = batch_sharding(mesh) if mixing else batch_shardings(mesh)
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(whole, split),
    out_shardings=(whole, whole),
  )


def compile_step(
  step: Callable, *arguments: Any
) -> tuple[jax.stages.Compiled, dict[str, float]]:
  """Compiles a function of `jax.jit` for these arguments, or their shapes.

  Also gives `trace_seconds` of Python, and `compile_seconds` of XLA or of
  reading the compile cache on disk.
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
  """The parts of a training on a mesh."""

  # As it is evaluated. It shares its variables with the step; blocks may be
  # stacked in them (`models.stacking`).
  model: nn.Module
  optimizer: optax.GradientTransformation  # Of what is not frozen.
  plan: Plan
  step: Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict]]


def create_training(
  config: Mapping[str, Any],
  mesh: Mesh,
  loss: Loss | None = None,
  normalization: Normalization = IMAGENET,
) -> Training:
  """Model, optimizer and step of a configuration with its number of classes.

  The mesh may be of descriptions of devices (`jax.experimental.topologies`).
  `loss` is that of both heads, or of a classifier's logits and targets, (B,
  classes) both; None: as `config.loss` describes it. `normalization` is that of
  the images.
  """
  train = config['train']
  model = create_network(config['model'])
  plan = create_plan(config, mesh.shape['data'])
  # Rematerialising whole stages needs their blocks one by one.
  alone = STAGES in parse(train['remat'])
  if implementations.chosen('blocks') == 'scanned' and not alone:
    model = scanned(model)
  optimizer = create_optimizer(config['optimizer'], train['total_steps'])
  optimizer = train_the_rest(optimizer, plan.freeze, plan.frozen_norms)
  classes, mixing = config['model']['num_classes'], None
  if classifies(config):
    mixing = Mixing(classes, config['loss']['mixup'], plan.group)
    smoothing = config['loss']['label_smoothing']
    loss = loss or partial(image_loss, label_smoothing=smoothing)
  else:
    aligned = model.decode_head.align_corners
    loss = loss or create_loss(config['loss'], classes, aligned)
  kept = {'remat': train['remat'], 'freeze': train['freeze']}
  step = make_train_step(
    for_training(model, group=plan.group, **kept),
    optimizer,
    mesh,
    seed=config['seed'],
    mixing=mixing,
    normalization=normalization,
    loss=loss,
    aux_weight=config['loss']['aux_weight'],
    plan=plan,
  )
  return Training(model, optimizer, plan, step)
