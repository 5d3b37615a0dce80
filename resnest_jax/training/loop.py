"""The training of a run: from a configuration and a workdir to checkpoints."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from resnest_jax import drawing, runtime, sharding
from resnest_jax.checkpoints.state import Run, abstract_state, create_state
from resnest_jax.checkpoints.store import Store, data_of, has_checkpoint
from resnest_jax.config_keys import main_score
from resnest_jax.data.batches import Batch, BatchIterator
from resnest_jax.data.datasets import Splits, open_splits
from resnest_jax.data.doctor.examine import check_before_training
from resnest_jax.data.more_augmentation import MoreAugmentation
from resnest_jax.data.pipeline import training_batches
from resnest_jax.data.preprocess import IMAGENET, Normalization
from resnest_jax.data.rasters import measure
from resnest_jax.data.sampling import weigh_classes
from resnest_jax.distributed import failures, messages
from resnest_jax.errors import UserError, enough_memory, writing
from resnest_jax.evaluation.evaluate import Evaluator
from resnest_jax.files import whole_file
from resnest_jax.inference.protocols import Protocol
from resnest_jax.progress import console
from resnest_jax.text import plural
from resnest_jax.training.freezing import frozen_parameters
from resnest_jax.training.gradients import Plan, micro_batch_note
from resnest_jax.training.logs import Report
from resnest_jax.training.optimizer import group_table
from resnest_jax.training.step import compile_step, create_training
from resnest_jax.training.stopping import Stopper
from resnest_jax.training.workdir import CLASS_COUNTS, claim_workdir, longer
from resnest_jax.weights.start import start_variables

CURVES = 'curves.png'
SMALLER = (
  'Set train.remat=blocks or stages (the same result), train.micro_batch_size '
  'to a part of the batch, model.dtype to bfloat16, or give a row the argument '
  ':16gb, as in configs/ade20k_pspnet.py:16gb. Smaller are data.crop_size and '
  'train.batch_size; docs/memory.md.'
)
# The host may run this many steps ahead of the devices: enough to hide its own
# work, and few enough that a stop or a NaN is noticed soon.
STEPS_AHEAD = 2


def train(
  config: ConfigDict,
  workdir: Path,
  stopper: Stopper | None = None,
  profile_steps: tuple[int, int] | None = None,
) -> None:
  """Runs a training, or resumes it from the newest checkpoint.

  Changes the configuration as `open_splits` does. `profile_steps` are the first
  and the last step to trace. Raises `UserError` if something given cannot be
  used, or the loss is not finite.
  """
  stopper = stopper or Stopper()
  # A host that fails leaves before the exits of the stack wait for the others.
  with ExitStack() as at_exit, failures.leaving(), enough_memory(SMALLER):
    enter = at_exit.enter_context
    # What is trained, and on what. Nothing is written yet: mistakes are cheap.
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.spatial)
    sharding.check_batch_size(config.train.batch_size, mesh)
    rows, stride = config.data.crop_size[0], config.model.output_stride
    sharding.check_rows(rows, stride, mesh)
    MoreAugmentation(config.data)  # A file of the user's may be wrong.
    splits = open_splits(config)
    messages.check_same_data(facts := splits.facts())
    normalization = of_bands(config, splits, workdir)
    if config.data.bands:
      facts['normalization'] = normalization.described()
    create = partial(create_training, mesh=mesh, normalization=normalization)
    model, optimizer, plan, train_step = create(weighted(config))
    ema, fresh = config.train.ema_decay > 0, not has_checkpoint(workdir)
    variables, notes = start_variables(model, config) if fresh else (None, [])

    with messages.first_goes_ahead('workdir'):
      enter(claim_workdir(workdir, config))
    announce(config, workdir, splits, plan)
    store = enter(Store(workdir, config, splits.train.labels, facts))
    if fresh:
      if messages.is_first():
        check_before_training(config, splits, workdir)
      run = Run(create_state(model, optimizer, variables, mesh, ema=ema))
      del variables  # They are on the devices now.
    else:
      run = store.resume(abstract_state(model, optimizer, mesh, ema=ema))
      notes = [f'resuming after step {run.step} of {config.train.total_steps}']
      notes += other_data(store.changes, workdir)
    print('; '.join(notes), flush=True)
    frozen = frozen_parameters(run.state.params, plan.freeze, plan.frozen_norms)
    console().print(group_table(run.state.params, config.optimizer, frozen))
    if run.is_over(config.train):
      print(
        f'nothing to do: {ending(config, run)}.{longer(workdir)}', flush=True
      )
      draw_curves(workdir, config.name, again=False)
      return
    begin = mesh, run.step, workdir / CLASS_COUNTS
    if isinstance(config.loss.class_weights, str):
      weights = weigh_classes(config, splits.train, begin[-1])
      train_step = create(weighted(config, weights)).step
    batches = enter(training_batches(config, splits.train, *begin))
    report = enter(Report(workdir, config, run, splits.eval, profile_steps))
    how = {'protocol': Protocol(normalization=normalization), 'with_loss': True}
    how['keep'] = config.train.pictures
    evaluate = Evaluator(config, model, splits.eval, **how)
    # `run` changes from here on. Only this thread may stop the process, except
    # while it waits and `run` is at rest.
    enter(stopper.busy())
    parts = store, report, stopper, train_step, batches, evaluate
    train_to_end(config, run, *parts)
    draw_curves(workdir, config.name)
    stopper.rest = ending(config, run)
    print(f'{stopper.rest}; curves in {workdir / CURVES}', flush=True)


def train_to_end(
  config: ConfigDict,
  run: Run,
  store: Store,
  report: Report,
  stopper: Stopper,
  train_step: Any,
  batches: BatchIterator,
  evaluate: Evaluator,
) -> None:
  """Trains, evaluates and saves until all steps are done."""
  keys, main, compiled = config.train, main_score(config), None

  def save() -> str:
    store.save_interrupted(run)
    saved = f'step {run.step} of {keys.total_steps} is saved'
    return saved if run.step else 'no step was finished'

  def waiting(data: BatchIterator) -> AbstractContextManager:
    return stopper.waiting(save, lambda: data.stuck(config.data.timeout))

  while not run.is_over(keys):
    if stopper.requested(run.step):
      stopper.stop(save)
    # An evaluation that was cut off comes before the next step.
    if not run.evaluating:
      start = time.perf_counter()
      with waiting(batches):
        batch = next(batches)
      report.pace.count(time.perf_counter() - start)
      if compiled is None:
        # Ahead of time, so that its duration and memory are known. Every
        # batch has the first one's shapes: nothing is compiled again.
        print('compiling (minutes at full size, seconds next time)', flush=True)
        with stopper.waiting(save):
          compiled, seconds = compile_step(train_step, run.state, batch)
          report.compiled(run, compiled, seconds)
      take_step(compiled, run, batch, report)
      last = run.step == keys.total_steps
      run.evaluating = last or run.step % keys.eval_steps == 0

    saving = run.evaluating or run.step % keys.checkpoint_steps == 0
    # Reported before anything is saved: a loss that is not finite ends the
    # run here, and the newest checkpoint is still a good one.
    if run.unlogged and (saving or run.step % keys.log_steps == 0):
      report.steps(run, batches.report_skipped())
      store.check()
    metrics = None
    if run.evaluating:
      try:
        evaluation = evaluate(run.state.eval_variables(), waiting)
      except UserError:  # Say of a damaged image: repaired, the run resumes.
        if jax.process_count() == 1:  # Others would have to save as well.
          save()
        raise
      report.evaluation(run, evaluation)
      metrics = evaluation.scores.summary()
      run.stale += 1
      if not run.best or metrics[main] > run.best[main]:
        run.best, run.stale = {'step': run.step, main: metrics[main]}, 0
    if saving:
      store.save(run, metrics)
      run.saved_step, run.evaluating = run.step, False
      report.pace.restart()
  store.finish()


def of_bands(
  config: ConfigDict, splits: Splits, workdir: Path
) -> Normalization:
  """How images are normalised: bands as measured before the first step."""
  if not config.data.bands:
    return IMAGENET
  options = splits.train, config.data.num_threads
  # A run that resumes keeps its numbers.
  if about := data_of(workdir).get('normalization'):
    normalization = Normalization.of(about)
  else:
    found = messages.gather(lambda: messages.is_first() and measure(*options))
    normalization = found[0]
  for split in splits:
    split.normalization = normalization
  numbers = zip(normalization.bands, *normalization[:2], strict=True)
  said = ', '.join(f'{x} {mean:.4g} +- {std:.4g}' for x, mean, std in numbers)
  print(f'bands ({normalization.dtype}): {said}', flush=True)
  return normalization


def announce(
  config: ConfigDict, workdir: Path, splits: Splits, plan: Plan
) -> None:
  images = plural(len(splits.train), 'image')
  steps = plural(config.train.total_steps, 'step')
  print(
    f'{config.name}: {images}, {len(splits.eval)} to evaluate, '
    f'{steps} of {config.train.batch_size} on {runtime.describe_devices()}, '
    f'into {workdir}',
    flush=True,
  )
  if note := micro_batch_note(plan, config.train.batch_size):
    print(note, flush=True)


def other_data(changes: list[str], workdir: Path) -> list[str]:
  """Notes for a run that resumes with other data than it began with."""
  if not changes:
    return []
  meaning = 'scores are of other images than before'
  if any('training' in line for line in changes):
    meaning = 'this is no longer the run that was begun'
    if messages.is_first():  # Before the other hosts read it.
      (workdir / CLASS_COUNTS).unlink(missing_ok=True)
  said = '; '.join(changes)
  return [f'the data has changed since the checkpoint ({said}): {meaning}']


def weighted(
  config: ConfigDict, weights: Sequence[float] | None = None
) -> Mapping[str, Any]:
  """The configuration with these class weights where it has a name of some."""
  if not isinstance(config.loss.class_weights, str):
    return config
  return {**config, 'loss': {**config.loss, 'class_weights': weights}}


def ending(config: ConfigDict, run: Run) -> str:
  """Why a run is over, and its best score."""
  main, steps = main_score(config), config.train.total_steps
  best = f'best {main} {run.best[main]:.4f} at step {run.best["step"]}'
  if run.step >= steps:
    return f'{plural(steps, "step", "are")} done: {best}'
  return (
    f'stopped at step {run.step}, after {plural(run.stale, "evaluation")} '
    f'without a better score (--config.train.early_stop=0 resumes): {best}'
  )


def take_step(compiled: Any, run: Run, batch: Batch, report: Report) -> None:
  """Starts a step on the devices; waits for none but the one before last."""
  number = run.step + 1
  report.profile.before(number)
  with jax.profiler.StepTraceAnnotation('train', step_num=number):
    run.state, scalars = compiled(run.state, batch)
  run.step = number
  report.profile.after(number, scalars)
  run.unlogged.append(scalars)
  if len(run.unlogged) > STEPS_AHEAD:
    jax.block_until_ready(run.unlogged[-1 - STEPS_AHEAD])


def draw_curves(workdir: Path, title: str, again: bool = True) -> None:
  path = workdir / CURVES
  if not messages.is_first() or (path.exists() and not again):
    return
  with writing(path), whole_file(path) as temporary:
    drawing.plot_curves(workdir / 'log.jsonl', temporary, title)
