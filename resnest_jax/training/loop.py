"""The training of a run: from a configuration and a workdir to checkpoints."""

import collections
import contextlib
import functools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich
from ml_collections import ConfigDict

from resnest_jax import host_watch, hosts, runtime
from resnest_jax.config import config_to_json, fit_num_classes
from resnest_jax.data.batches import BatchIterator
from resnest_jax.data.datasets import open_data
from resnest_jax.data.doctor import check_before_training
from resnest_jax.data.pipeline import make_eval_iterator, make_train_iterator
from resnest_jax.data.sampling import open_sampler
from resnest_jax.errors import UserError, writing
from resnest_jax.evaluation import visualize
from resnest_jax.evaluation.inference import (
  ImageResult,
  divisible_batch_size,
  evaluate,
  make_eval_step,
)
from resnest_jax.evaluation.progress import evaluation_progress
from resnest_jax.models.layers import at_least_float32
from resnest_jax.training import checkpoints, resuming, sharding
from resnest_jax.training.logs import Pace, RunLog, duration
from resnest_jax.training.optimizer import create_schedule, group_table
from resnest_jax.training.plans import describe
from resnest_jax.training.starting import (
  check_pretrained,
  describe_forms,
  start_from_weights,
)
from resnest_jax.training.step import (
  abstract_state,
  compile_step,
  create_state,
  create_training,
)
from resnest_jax.training.stopping import Stopper
from resnest_jax.training.watching import (
  Compilations,
  Profile,
  WeightsAndBiases,
)
from resnest_jax.training.workdir import CLASS_COUNTS, claim_workdir

CURVES = 'curves.png'


def draw_curves(workdir: Path, title: str) -> None:
  """Draws the log of a finished run; the picture is whole or not there."""
  path, temporary = workdir / CURVES, workdir / f'.{CURVES}'
  with writing(path):
    visualize.plot_curves(workdir / 'log.jsonl', temporary, title)
    temporary.replace(path)


def draw_predictions(
  parts: Sequence[Mapping[int, np.ndarray]], split: Any
) -> Iterator[tuple[str, np.ndarray]]:
  """Names of samples and their panels, in the order of the split.

  Args:
    parts: of each host, index in the split -> uint8 (H, W) classes.
    split: of `open_data`.
  """
  if not hosts.is_first():
    return
  for index, prediction in sorted(collections.ChainMap(*parts).items()):
    sample, labels = split[index], split.labels
    yield (
      sample['name'],
      visualize.panel(
        sample['image'],
        sample['label'],
        prediction,
        labels.classes,
        labels.palette,
        sample['name'],
      ),
    )


def train(
  config: ConfigDict,
  workdir: Path,
  stopper: Stopper | None = None,
  profile_steps: tuple[int, int] | None = None,
) -> None:
  """Runs the training that the configuration describes, or the rest of it.

  Args:
    config: what to train.
    workdir: of the run.
    stopper: tells when to stop before the end; None: nothing does.
    profile_steps: the first and the last step to trace; None: none.
  """
  # A host that fails leaves before the exits of the stack wait for the others.
  with contextlib.ExitStack() as at_exit, host_watch.leaving():
    _train(config, workdir, stopper or Stopper(), profile_steps, at_exit)


def _train(
  config: ConfigDict,
  workdir: Path,
  stopper: Stopper,
  profile_steps: tuple[int, int] | None,
  at_exit: contextlib.ExitStack,
) -> None:
  """`train`; what has to be closed is entered into the stack at once."""
  total_steps, batch_size = config.train.total_steps, config.train.batch_size

  # Devices, data, model, optimizer and the step, which is yet to compile.
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.spatial)
  host, num_hosts = sharding.host_share(mesh)
  eval_mesh = sharding.local_mesh()
  sharding.check_batch_size(batch_size, mesh)
  height = config.data.crop_size[0]
  sharding.check_rows(height, config.model.output_stride, mesh)
  train_split = open_data(config.data, config.data.train_split)
  eval_split = open_data(config.data, config.data.eval_split)
  labels = train_split.labels
  fit_num_classes(config, len(labels.classes))
  model, optimizer, plan, train_step = create_training(config, mesh)
  ema = config.train.ema_decay > 0
  if config.pretrained and not checkpoints.has_checkpoint(workdir):
    check_pretrained(model, config.pretrained)
  with hosts.first_goes_ahead('workdir'):
    at_exit.enter_context(claim_workdir(workdir, config))
  print(
    f'{config.name}: {len(train_split)} images, {len(eval_split)} to '
    f'evaluate, {total_steps} steps of {batch_size} on '
    f'{runtime.describe_devices()}, into {workdir}',
    flush=True,
  )

  for notice in (describe(plan, batch_size), describe_forms(model)):
    if notice:
      print(notice, flush=True)

  # State.
  schedule = create_schedule(config.optimizer, total_steps)
  manager = checkpoints.open_checkpoints(
    workdir, keep=config.train.keep_checkpoints
  )
  at_exit.callback(manager.close)
  about: dict[str, Any] = {
    'config': json.loads(config_to_json(config)),
    'classes': list(labels.classes),
    'palette': labels.palette.tolist(),
    'dilation_rule': config.model.dilation_rule,
    'best': None,
  }
  unread: collections.deque = collections.deque()  # Scalars not yet logged.
  evaluating = False
  restored = None
  if checkpoints.has_checkpoint(workdir):
    abstract = abstract_state(model, optimizer, mesh, ema=ema)
    restored = resuming.restore_newest(workdir, manager, abstract)
  if restored is None:
    if hosts.is_first():
      check_before_training(config, (train_split, eval_split), workdir)
    state = create_state(model, optimizer, config.seed, mesh, ema=ema)
    if config.pretrained:
      state, notes = start_from_weights(model, state, config.pretrained, mesh)
    else:
      notes = ['starting from random weights (config.pretrained is empty)']
    print('; '.join(notes), flush=True)
  else:
    state, saved_about = restored
    checkpoints.check_classes(saved_about, labels.classes)
    about['best'] = saved_about['best']
    # Of a run that was stopped between two checkpoints.
    unread.extend(saved_about.get('unread', ()))
    evaluating = saved_about.get('evaluating', False)
    print(f'going on after step {int(state.step)} of {total_steps}', flush=True)
  rich.print(group_table(state.params, config.optimizer))
  step = start_step = saved_step = int(state.step)
  if start_step >= total_steps and not evaluating:
    print(f'nothing to do: {total_steps} steps are done', flush=True)
    if hosts.is_first() and not (workdir / CURVES).exists():
      draw_curves(workdir, config.name)
    return

  eval_step = make_eval_step(
    model,
    len(labels.classes),
    mesh=eval_mesh,
    dtype=at_least_float32(config.model.dtype),
  )

  # The loop.
  with hosts.first_goes_ahead('sampler'):
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
    process_index=host,
    process_count=num_hosts,
  )
  at_exit.callback(batches.close)
  log = RunLog(workdir, start_step, evaluating, write=hosts.is_first())
  at_exit.callback(log.close)
  if config.train.wandb and hosts.is_first():
    log.wandb = WeightsAndBiases(workdir, config.train.wandb, about['config'])
  profile = Profile(workdir, profile_steps if hosts.is_first() else None)
  at_exit.callback(profile.close)
  compiled_names = at_exit.enter_context(runtime.count_compilations())
  compilations = Compilations(compiled_names)
  of_evaluations = Compilations(compiled_names)
  shown = visualize.spread(len(eval_split), config.train.pictures)
  pace = Pace(batch_size)
  compiled = None

  def read_rows() -> list[dict[str, float]]:
    """The scalars of the steps since the last log line.

    Raises:
      UserError: one of them is not finite.
    """
    rows = [
      {name: float(value) for name, value in row.items()}
      for row in jax.device_get(list(unread))
    ]
    for number, row in enumerate(rows, step - len(rows) + 1):
      bad = [name for name, value in row.items() if not math.isfinite(value)]
      if bad:
        raise UserError(
          f'{bad[0]} is {row[bad[0]]} at step {number}; the newest checkpoint '
          f'is from step {saved_step}. Lower optimizer.learning_rate, or look '
          'at the labels.'
        )
    return rows

  def write_log() -> None:
    rows = read_rows()
    unread.clear()
    scalars = {
      name: sum(row[name] for row in rows) / len(rows) for name in rows[0]
    }
    scalars['learning_rate'] = float(schedule(step - 1))
    scalars |= pace.report()
    log.write(step, scalars)
    if again := compilations.warning(f'until step {step}'):
      print(again, flush=True)
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

  def run_evaluation() -> dict[str, float]:
    eval_batches = make_eval_iterator(
      config.data,
      eval_split,
      batch_size=divisible_batch_size(config.eval.batch_size, eval_mesh),
      bucket=config.eval.bucket,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    predictions = {}
    of_evaluations.skip()

    def look(image: ImageResult) -> None:
      if image.index in shown:
        predictions[image.index] = image.prediction.copy()

    with (
      waiting_for(eval_batches),
      contextlib.closing(eval_batches),
      evaluation_progress() as progress,
    ):
      result = evaluate(
        eval_step,
        sharding.local_copy(state.best_variables(), eval_mesh),
        eval_batches,
        labels.classes,
        len(eval_split),
        progress=progress,
        on_image=look if shown else None,
      )
    if again := of_evaluations.warning(f'in the evaluation at step {step}'):
      print(again, flush=True)
    for name, picture in draw_predictions(
      hosts.gather(lambda: predictions), eval_split
    ):
      log.write_picture(step, f'{config.data.eval_split}/{name}', picture)
    if hosts.is_first():
      print(
        f'step {step}: {config.data.eval_split} mIoU '
        f'{result.scores.mIoU:.4f}, mAcc {result.scores.mAcc:.4f}, aAcc '
        f'{result.scores.aAcc:.4f} ({result.num_images} images in '
        f'{duration(result.seconds)})',
        flush=True,
      )
    return result.scores.summary()

  def save_now() -> str:
    """Saves what is newer than the last checkpoint; says what there is."""
    manager.finish()
    if step > saved_step:
      extra = {'unread': read_rows(), 'evaluating': evaluating}
      resuming.save_interrupted(workdir, state, about | position() | extra)
    if not step:
      return 'no step was finished'
    return f'step {step} of {total_steps} is saved'

  def waiting_for(data: BatchIterator):
    stuck = functools.partial(data.stuck, config.data.timeout)
    return stopper.waiting(save_now, stuck)

  def position() -> dict[str, int]:
    return {'step': step, 'position': step * batch_size}

  with stopper.busy():
    while evaluating or step < total_steps:
      if stopper.requested(step):
        stopper.stop(save_now)
      if not evaluating:  # As it does where an evaluation was cut off.
        waiting = time.perf_counter()
        with waiting_for(batches):
          batch = next(batches)
        batch = sharding.shard_batch(batch, mesh)
        pace.count(time.perf_counter() - waiting)
        if compiled is None:
          print('compiling (minutes at full size, seconds again)', flush=True)
          with stopper.waiting(save_now):
            compiled, seconds = compile_step(train_step, state, batch)
          print(
            f'traced in {seconds["trace_seconds"]:.1f} s, '
            f'compiled in {seconds["compile_seconds"]:.1f} s',
            flush=True,
          )
          log.write(step, seconds)
          pace.restart()
          pace.count(0.0)
        profile.before(step + 1)
        with jax.profiler.StepTraceAnnotation('train', step_num=step + 1):
          state, scalars = compiled(state, batch)
        step += 1
        profile.after(step, scalars)
        unread.append(scalars)
        if len(unread) > 2:  # Stay at most two steps ahead of the devices.
          jax.block_until_ready(unread[-3])
        last = step == total_steps
        evaluating = last or step % config.train.eval_steps == 0

      saving = evaluating or step % config.train.checkpoint_steps == 0
      if unread and (saving or step % config.train.log_steps == 0):
        write_log()
        manager.check()
      metrics = None
      if evaluating:
        metrics = run_evaluation()
        compilations.unsettle()
        log.write(step, metrics)
        if not about['best'] or metrics['mIoU'] > about['best']['mIoU']:
          about['best'] = {'step': step, 'mIoU': metrics['mIoU']}
      if saving:
        # Two, so that there is one before the newest, should that be damaged.
        resuming.drop_superseded(workdir, 2)
        checkpoints.save(manager, state, about | position(), metrics)
        saved_step, evaluating = step, False
        compilations.unsettle()
        pace.restart()
    manager.finish()
    resuming.drop_superseded(workdir)

  if hosts.is_first():
    draw_curves(workdir, config.name)
  best = about['best']
  print(
    f'done: best mIoU {best["mIoU"]:.4f} at step {best["step"]}; curves in '
    f'{workdir / CURVES}',
    flush=True,
  )
