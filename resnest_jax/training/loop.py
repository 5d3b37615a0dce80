"""The training of a run: from a configuration and a workdir to checkpoints."""

import collections
import contextlib
import json
import math
import time
from pathlib import Path
from typing import IO

import flax.linen as nn
import jax
import numpy as np
import rich
from ml_collections import ConfigDict

import resnest_jax as rj
from resnest_jax import runtime
from resnest_jax.config import (
  config_to_json,
  differences,
  fit_num_classes,
)
from resnest_jax.data.datasets import open_data
from resnest_jax.data.doctor import check_before_training
from resnest_jax.data.pipeline import make_eval_iterator, make_train_iterator
from resnest_jax.data.sampling import open_sampler
from resnest_jax.errors import UserError
from resnest_jax.evaluation.inference import (
  divisible_batch_size,
  evaluate,
  make_eval_step,
)
from resnest_jax.evaluation.progress import evaluation_progress
from resnest_jax.evaluation.visualize import plot_curves
from resnest_jax.models.layers import at_least_float32
from resnest_jax.training import checkpoints, sharding
from resnest_jax.training.logs import Pace, RunLog, duration
from resnest_jax.training.optimizer import create_optimizer, create_schedule
from resnest_jax.training.step import (
  abstract_state,
  create_state,
  make_train_step,
)
from resnest_jax.weights.fetch import fetch
from resnest_jax.weights.start import start_from
from resnest_jax.weights.state_dict import variable_shapes

# Keys that change neither the result nor what is stored.
FREE_KEYS = (
  'data.data_dir',
  'data.doctor_samples',
  'data.num_workers',
  'data.num_threads',
  'data.prefetch',
  'data.skip_unreadable',
  'data.eval_split',
  'train.log_steps',
  'train.eval_steps',
  'train.checkpoint_steps',
  'train.keep_checkpoints',
  'eval',
)
# Pixels of each class in each sample, where the sampling asks for them.
CLASS_COUNTS = 'class_pixels.npy'


def claim_workdir(workdir: Path, config: ConfigDict) -> IO[str]:
  """Locks the workdir and writes the configuration into it.

  What was started there with another configuration and left no checkpoint has
  nothing to lose: its logs and counts are removed.

  Raises:
    UserError: another process trains there, or the folder has checkpoints of
      another configuration, or files of something else.
  """
  lock = runtime.lock_folder(workdir, 'trains in')
  saved = workdir / 'config.json'
  begun = checkpoints.has_checkpoint(workdir)
  if saved.exists():
    lines = differences(_read_saved(saved), config, FREE_KEYS)
    if lines and begun:
      raise UserError(
        f'{workdir} belongs to a run of another configuration '
        f'({"; ".join(lines)}). Choose another --workdir, or give the flags '
        'it was started with.'
      )
    if lines:
      more = f'; and {len(lines) - 3} more' if len(lines) > 3 else ''
      print(
        f'{workdir} holds a start without a checkpoint, of another '
        f'configuration; beginning anew with this one '
        f'({"; ".join(lines[:3])}{more})',
        flush=True,
      )
      _remove_start(workdir)
  elif begun:
    raise UserError(
      f'{workdir} holds checkpoints but no config.json; choose another '
      '--workdir.'
    )
  temporary = saved.with_suffix('.tmp')
  temporary.write_text(config_to_json(config), 'utf-8')
  temporary.replace(saved)
  return lock


def _read_saved(path: Path) -> str:
  """The configuration of an earlier start, as it was written."""
  text = path.read_text('utf-8')
  try:
    if json.loads(text).keys() >= {'model', 'data', 'train'}:
      return text
  except (ValueError, AttributeError):
    pass
  raise UserError(
    f'{path} is there and was not written by train.py, or is damaged; choose '
    'another --workdir.'
  )


def _remove_start(workdir: Path) -> None:
  """Removes what would mix with a run of another configuration."""
  events = (workdir / 'tensorboard').glob('events.out.tfevents.*')
  for path in (workdir / 'log.jsonl', workdir / CLASS_COUNTS, *events):
    path.unlink(missing_ok=True)


def check_pretrained(model: nn.Module, source: str) -> None:
  """Raises now what `start_from` would raise once all else is made.

  Args:
    model: the segmentor.
    source: `config.pretrained`.
  """
  fetch(source)  # Whether it is there takes no model to see.
  blank = jax.tree.map(
    lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape),
    variable_shapes(model),
  )
  start_from(model, blank, source)


def train(config: ConfigDict, workdir: Path) -> None:
  """Runs the training that the configuration describes, or the rest of it."""
  total_steps, batch_size = config.train.total_steps, config.train.batch_size

  # Devices, data, model.
  mesh = sharding.make_mesh()
  sharding.check_batch_size(batch_size, mesh)
  train_split = open_data(config.data, config.data.train_split)
  eval_split = open_data(config.data, config.data.eval_split)
  labels = train_split.labels
  fit_num_classes(config, len(labels.classes))
  model = rj.create_segmentor(config.model)
  if config.pretrained and not checkpoints.has_checkpoint(workdir):
    check_pretrained(model, config.pretrained)
  lock = claim_workdir(workdir, config)
  print(
    f'{config.name}: {len(train_split)} images, {len(eval_split)} to '
    f'evaluate, {total_steps} steps of {batch_size} on '
    f'{runtime.describe_devices()}, into {workdir}',
    flush=True,
  )

  # Optimizer, state.
  optimizer = create_optimizer(config.optimizer, total_steps)
  schedule = create_schedule(config.optimizer, total_steps)
  manager = checkpoints.open_checkpoints(
    workdir, keep=config.train.keep_checkpoints
  )
  about = {
    'config': json.loads(config_to_json(config)),
    'classes': list(labels.classes),
    'palette': labels.palette.tolist(),
    'dilation_rule': config.model.dilation_rule,
    'best': None,
  }
  if manager.latest_step() is None:
    check_before_training(config, (train_split, eval_split), workdir)
    state = create_state(model, optimizer, config.seed, mesh)
    if config.pretrained:
      variables, notes = start_from(
        model, jax.device_get(state.variables()), config.pretrained
      )
      variables = jax.device_put(variables, sharding.replicated(mesh))
      state = state.replace(**variables)
    else:
      notes = ['starting from random weights (config.pretrained is empty)']
    print('; '.join(notes), flush=True)
  else:
    abstract = abstract_state(model, optimizer, mesh)
    state, saved_about = checkpoints.restore(manager, abstract)
    checkpoints.check_classes(saved_about, labels.classes)
    about['best'] = saved_about['best']
    print(f'going on after step {int(state.step)} of {total_steps}', flush=True)
  step = start_step = int(state.step)
  if start_step >= total_steps:
    print(f'nothing to do: {total_steps} steps are done', flush=True)
    manager.close()
    lock.close()
    return

  # The two compiled functions.
  train_step = make_train_step(
    model,
    optimizer,
    mesh,
    seed=config.seed,
    aux_weight=config.loss.aux_weight,
    avg_non_ignore=config.loss.avg_non_ignore,
  )
  eval_step = make_eval_step(
    model,
    len(labels.classes),
    mesh=mesh,
    dtype=at_least_float32(config.model.dtype),
  )

  def run_evaluation(state) -> dict[str, float]:
    batches = make_eval_iterator(
      config.data,
      eval_split,
      batch_size=divisible_batch_size(config.eval.batch_size, mesh),
      bucket=config.eval.bucket,
    )
    with contextlib.closing(batches), evaluation_progress() as progress:
      result = evaluate(
        eval_step,
        state.variables(),
        batches,
        labels.classes,
        len(eval_split),
        progress=progress,
      )
    print(
      f'step {step}: {config.data.eval_split} mIoU '
      f'{result.scores.mIoU:.4f}, mAcc {result.scores.mAcc:.4f}, aAcc '
      f'{result.scores.aAcc:.4f} ({result.num_images} images in '
      f'{duration(result.seconds)})',
      flush=True,
    )
    return result.scores.summary()

  # The loop.
  sampler, shares = open_sampler(
    config.data, train_split, config.seed, workdir / CLASS_COUNTS
  )
  if shares:
    rich.print(shares)
  batches = make_train_iterator(
    config.data,
    train_split,
    seed=config.seed,
    batch_size=batch_size,
    start_step=start_step,
    total_steps=total_steps,
    sampler=sampler,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  log = RunLog(workdir, start_step)
  pace = Pace(batch_size)
  compiled = None
  unread: collections.deque = collections.deque()

  def read_scalars() -> dict[str, float]:
    """Means since the last call; stops the run at a non-finite value."""
    first = step - len(unread) + 1
    rows = jax.device_get(list(unread))
    unread.clear()
    for number, row in enumerate(rows, first):
      bad = [name for name, value in row.items() if not math.isfinite(value)]
      if bad:
        raise UserError(
          f'{bad[0]} is {row[bad[0]]} at step {number}; the newest checkpoint '
          f'is from step {manager.latest_step() or 0}. Lower '
          'optimizer.learning_rate, or look at the labels.'
        )
    return {
      name: float(sum(row[name] for row in rows) / len(rows))
      for name in rows[0]
    }

  try:
    while step < total_steps:
      waiting = time.perf_counter()
      batch = sharding.shard_batch(next(batches), mesh)
      pace.count(time.perf_counter() - waiting)
      if compiled is None:
        print('compiling (minutes at full size, seconds again)', flush=True)
        compiling = time.perf_counter()
        compiled = train_step.lower(state, batch).compile()
        seconds = time.perf_counter() - compiling
        print(f'compiled in {seconds:.1f} s', flush=True)
        log.write(step, {'compile_seconds': seconds})
        pace.restart()
        pace.count(0.0)
      state, scalars = compiled(state, batch)
      step += 1
      unread.append(scalars)
      if len(unread) > 2:  # Stay at most two steps ahead of the devices.
        jax.block_until_ready(unread[-3])

      last = step == total_steps
      evaluating = last or step % config.train.eval_steps == 0
      saving = evaluating or step % config.train.checkpoint_steps == 0
      if saving or step % config.train.log_steps == 0:
        scalars = read_scalars()
        scalars['learning_rate'] = float(schedule(step - 1))
        scalars |= pace.report()
        log.write(step, scalars)
        if skipped := batches.report_skipped():
          print(skipped, flush=True)
        eta = (total_steps - step) * scalars['step_seconds']
        print(
          f'step {step}/{total_steps}  loss {scalars["loss"]:.4f}  '
          f'accuracy {scalars["accuracy"]:.3f}  '
          f'lr {scalars["learning_rate"]:.2e}  '
          f'{scalars["images_per_second"]:.1f} images/s  '
          f'data wait {scalars["data_wait"]:.0%}  ETA {duration(eta)}',
          flush=True,
        )
      metrics = None
      if evaluating:
        metrics = run_evaluation(state)
        log.write(step, metrics)
        if not about['best'] or metrics['mIoU'] > about['best']['mIoU']:
          about['best'] = {'step': step, 'mIoU': metrics['mIoU']}
      if saving:
        about |= {'step': step, 'position': step * batch_size}
        checkpoints.save(manager, state, about, metrics)
        pace.restart()
  finally:
    batches.close()
    log.close()
    manager.close()  # Waits for the checkpoint that is being written.
    lock.close()

  plot_curves(log.path, workdir / 'curves.png', config.name)
  best = about['best']
  print(
    f'done: best mIoU {best["mIoU"]:.4f} at step {best["step"]}; curves in '
    f'{workdir / "curves.png"}',
    flush=True,
  )
