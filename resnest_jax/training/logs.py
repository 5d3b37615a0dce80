"""The reports of a run: console, `log.jsonl`, TensorBoard, W&B, profile."""

import contextlib
import json
import math
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from resnest_jax import drawing, runtime
from resnest_jax.checkpoints.state import Run, unlogged_scalars
from resnest_jax.config import config_to_json
from resnest_jax.config_keys import main_score_in
from resnest_jax.distributed import messages
from resnest_jax.errors import UserError, writing
from resnest_jax.evaluation.classification import ClassEvaluation
from resnest_jax.evaluation.segmentation import Evaluation
from resnest_jax.files import write_text
from resnest_jax.text import duration
from resnest_jax.training.optimizer import create_schedule
from resnest_jax.training.profiling import Profile


class Report(contextlib.AbstractContextManager):
  """Reports how a run proceeds; on hosts but the first it writes nothing."""

  def __init__(
    self,
    workdir: Path,
    config: ConfigDict,
    run: Run,
    split: Any,
    profile_steps: tuple[int, int] | None,
  ):
    """Raises `UserError` if it may not write, or W&B cannot be used.

    `split` is the one that is evaluated, `profile_steps` are as of `train`.
    """
    self._split, self._name = split, config.data.eval_split
    self._total_steps = config.train.total_steps
    self._schedule = create_schedule(config.optimizer, self._total_steps)
    self._log, first = None, messages.is_first()
    if first:
      wandb = config.train.wandb and start_wandb(workdir, config)
      self._log = RunLog(workdir, run.step, run.evaluating, wandb)
    self.profile = Profile(workdir, profile_steps if first else None)
    self.pace = Pace(config.train.batch_size)

  def compiled(self, run: Run, step: Any, seconds: Mapping[str, float]) -> None:
    memory = runtime.step_memory(step)
    print(
      f'traced in {seconds["trace_seconds"]:.1f} s, compiled in '
      f'{seconds["compile_seconds"]:.1f} s; {memory}',
      flush=True,
    )
    if self._log:
      self._log.write(run.step, dict(seconds))
    # The first step is counted from here: compiling is no training speed.
    self.pace.restart()
    self.pace.count(0.0)

  def steps(self, run: Run, skipped: str) -> None:
    """Logs means of the unlogged scalars; `UserError` if one is not finite."""
    # This waits for the devices, and so does not belong into every step.
    rows = unlogged_scalars(run)
    run.unlogged.clear()
    scalars = {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}
    # Schedules count from 0.
    scalars['learning_rate'] = float(self._schedule(run.step - 1))
    scalars |= self.pace.report()
    if self._log:
      self._log.write(run.step, scalars)
    if skipped:
      print(skipped, flush=True)
    eta = (self._total_steps - run.step) * scalars['step_seconds']
    print(
      f'step {run.step}/{self._total_steps}  loss {scalars["loss"]:.4f}  '
      f'accuracy {scalars["accuracy"]:.3f}  '
      f'lr {scalars["learning_rate"]:.2e}  '
      f'{scalars["images_per_second"]:.1f} images/s  '
      f'data wait {scalars["data_wait"]:.0%}  ETA {duration(eta)}',
      flush=True,
    )

  def evaluation(
    self, run: Run, evaluation: Evaluation | ClassEvaluation
  ) -> None:
    """Logs scores, and pictures of the predictions that were kept."""
    if not self._log:
      return
    summary, scores = evaluation.scores.summary(), {}
    kept = getattr(evaluation, 'predictions', {})  # None of a classifier.
    for sample, _, panel in drawing.panels(self._split, kept):
      name = f'{self._name}/{sample["name"]}'
      self._log.write_picture(run.step, name, panel)
    print(
      f'step {run.step}: {self._name} '
      + ''.join(f'{name} {score:.4f}, ' for name, score in summary.items())
      + f'loss {evaluation.loss:.4f} ({evaluation.num_images} images in '
      f'{duration(evaluation.seconds)})',
      flush=True,
    )
    if isinstance(evaluation, Evaluation):
      ious = evaluation.scores.IoU.tolist()
      named = zip(self._split.labels.classes, ious, strict=True)
      # Classes without a pixel have no score.
      scores = {f'IoU/{name}': x for name, x in named if not math.isnan(x)}
    self._log.write(run.step, summary | {'val_loss': evaluation.loss} | scores)

  def __exit__(self, *_: Any) -> None:
    self.profile.close()
    if self._log:
      self._log.close()


def start_wandb(workdir: Path, config: ConfigDict) -> Any:
  """Starts or resumes the run of a workdir at Weights & Biases."""
  # Not by `sync_tensorboard`: that needs a SummaryWriter; see `RunLog`.
  try:
    import wandb
  except ImportError as error:
    raise UserError(
      'config.train.wandb needs the package wandb: pip install wandb, or '
      'leave the key empty.'
    ) from error
  known = workdir / 'wandb' / 'run_id'
  with writing(known.parent):
    known.parent.mkdir(exist_ok=True)
    if not known.exists():
      write_text(known, uuid.uuid4().hex[:12])
  try:
    return wandb.init(
      project=config.train.wandb,
      id=known.read_text('utf-8'),
      name=workdir.name,
      dir=str(workdir),
      config=json.loads(config_to_json(config)),
      resume='allow',
    )
  except wandb.errors.Error as error:
    raise UserError(
      f'Weights & Biases: {str(error).rstrip(". ")} (config.train.wandb; '
      'WANDB_MODE=offline keeps the figures in the workdir).'
    ) from error


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
  """Makes a package look absent to others, unless it is imported already."""
  sys.modules.setdefault(package, None)
  try:
    yield
  finally:
    if sys.modules[package] is None:
      del sys.modules[package]


class RunLog:
  """Scalars of a run in `log.jsonl` and for TensorBoard, each step once."""

  def __init__(
    self, workdir: Path, step: int, evaluate: bool = False, wandb: Any = None
  ):
    """Opens the logs and drops lines after `step` finished steps.

    With `evaluate` an evaluation follows: scores of an earlier one are dropped
    as well. `wandb` is of `start_wandb` and gets the scalars, too.
    """
    self.path, self._wandb = workdir / 'log.jsonl', wandb
    # tensorboardX imports torch if it can, for nothing, which takes seconds.
    with _hidden('torch'):
      from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._summary, self._event = summary, event_pb2.Event
    board = workdir / 'tensorboard'
    with writing(self.path):
      self._drop_after(step, evaluate)
      self._file = self.path.open('a', encoding='utf-8')
      board.mkdir(exist_ok=True)
      # SummaryWriter writes from a thread. At a full disk that thread dies, and
      # the run would wait for it for ever.
      self._board = event_file_writer.EventsWriter(str(board / 'events'))
      # Makes TensorBoard drop events of later steps.
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._board.write_event(self._event(step=step + 1, session_log=start))

  def _drop_after(self, step: int, evaluate: bool) -> None:
    exists, kept = self.path.exists(), []
    text = self.path.read_text('utf-8', 'replace') if exists else ''
    for line in text.splitlines():
      # A kill has truncated a line, or it is not one of ours.
      with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        scalars = json.loads(line)
        evaluated = main_score_in(scalars) is not None
        last = step - 1 if evaluate and evaluated else step
        if scalars['step'] <= last:
          kept.append(f'{line}\n')
    # In place of a link, too, which would else be written through.
    write_text(self.path, ''.join(kept))

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Adds scalars after `step` steps; a refused write is a `UserError`."""
    with writing(self.path):
      self._file.write(json.dumps({'step': step, **scalars}) + '\n')
      self._file.flush()
    self._show(step, [self._summary.scalar(*x) for x in scalars.items()])
    if self._wandb:
      self._wandb.log(dict(scalars), step=step)

  def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Adds a picture, uint8 (H, W, 3) RGB."""
    image = self._summary.image(name, picture, dataformats='HWC')
    self._show(step, [image])

  def _show(self, step: int, summaries: list[Any]) -> None:
    now = time.time()
    with writing(self.path.parent / 'tensorboard'):
      for summary in summaries:
        event = self._event(wall_time=now, step=step, summary=summary)
        self._board.write_event(event)
      self._board.flush()

  def close(self) -> None:
    closing = [self._wandb.finish] if self._wandb else []
    for close in (*closing, self._file.close, self._board.close):
      with contextlib.suppress(OSError):  # Which `write` has told.
        close()


class Pace:
  """The speed of training since the last report."""

  def __init__(self, batch_size: int):
    self._batch_size = batch_size
    self.restart()

  def restart(self) -> None:
    self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

  def count(self, waited: float) -> None:
    """Counts a step that waited this many seconds for its batch."""
    self._steps += 1
    self._waited += waited

  def report(self) -> dict[str, float]:
    """Speed and `data_wait`, a share in [0, 1]; starts counting again."""
    seconds = time.perf_counter() - self._start
    scalars = {
      'images_per_second': self._steps * self._batch_size / seconds,
      'step_seconds': seconds / self._steps,
      'data_wait': self._waited / seconds,
    }
    self.restart()
    return scalars
