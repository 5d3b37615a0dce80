"""What a run tells: lines on the console, JSON lines, TensorBoard."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from resnest_jax.errors import writing
from resnest_jax.training.watching import WeightsAndBiases


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
  """Others cannot import this package meanwhile, unless somebody has."""
  if package in sys.modules:
    yield
    return
  sys.modules[package] = None
  try:
    yield
  finally:
    del sys.modules[package]


class RunLog:
  """Scalars of a run in `log.jsonl` and for TensorBoard.

  A run that continues from a checkpoint first drops what an earlier process
  logged beyond it, so that every step stands there once.
  """

  def __init__(
    self,
    workdir: Path,
    start_step: int,
    evaluate: bool = False,
    write: bool = True,
  ):
    """Opens the logs.

    Args:
      workdir: the run's folder.
      start_step: finished steps; later lines are dropped.
      evaluate: the state after `start_step` is evaluated again; the scores
        of it are dropped, too.
      write: False: all is thrown away, as on all hosts but the first.

    Raises:
      UserError: the system refuses to write.
    """
    self.path = workdir / 'log.jsonl'
    self._file = None
    self.wandb: WeightsAndBiases | None = None  # Gets the scalars, too.
    if not write:
      return
    # Would be imported for nothing, which takes seconds.
    with _hidden('torch'):
      from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    board = workdir / 'tensorboard'
    with writing(self.path):
      self._drop_after(start_step, evaluate)
      self._file = self.path.open('a', encoding='utf-8')
      board.mkdir(exist_ok=True)
      # What tensorboardX's SummaryWriter uses, whose thread dies at a full
      # disk, after which the run would wait for it for ever.
      self._board = EventsWriter(str(board / 'events'))
      # Makes TensorBoard drop what came later.
      start = SessionLog(status=SessionLog.START)
      self._board.write_event(Event(step=start_step + 1, session_log=start))

  def _drop_after(self, step: int, evaluate: bool) -> None:
    if not self.path.exists():
      return
    kept = []
    for line in self.path.read_text('utf-8').splitlines():
      try:
        scalars = json.loads(line)
        late = scalars['step'] > step
      except ValueError:  # The line that a kill cut off.
        continue
      again = evaluate and scalars['step'] == step and 'mIoU' in scalars
      if not late and not again:
        kept.append(f'{line}\n')
    temporary = self.path.with_suffix('.tmp')
    temporary.write_text(''.join(kept), 'utf-8')
    os.replace(temporary, self.path)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Adds scalars that hold after `step` steps.

    Raises:
      UserError: the system refuses to write.
    """
    if self._file is None:
      return
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    with writing(self.path):
      self._file.write(json.dumps({'step': step, **scalars}) + '\n')
      self._file.flush()
    now = time.time()
    with writing(self.path.parent / 'tensorboard'):
      for name, value in scalars.items():
        self._board.write_event(
          Event(wall_time=now, step=step, summary=scalar(name, value))
        )
      self._board.flush()
    if self.wandb:
      self.wandb.write(step, scalars)

  def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Adds a picture, uint8 (H, W, 3) RGB, for TensorBoard.

    Raises:
      UserError: the system refuses to write.
    """
    if self._file is None:
      return
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import image

    with writing(self.path.parent / 'tensorboard'):
      summary = image(name, picture, dataformats='HWC')
      self._board.write_event(
        Event(wall_time=time.time(), step=step, summary=summary)
      )
      self._board.flush()

  def close(self) -> None:
    """Closes the files; every line is in them already."""
    if self.wandb:
      self.wandb.close()
    if self._file is None:
      return
    with contextlib.suppress(OSError):  # Which `write` has told.
      self._file.close()
    with contextlib.suppress(OSError):
      self._board.close()


class Pace:
  """Speed since the last report, and the time that is left."""

  def __init__(self, batch_size: int):
    """Starts counting; `batch_size` in images, over all devices."""
    self._batch_size = batch_size
    self.restart()

  def restart(self) -> None:
    """Forgets what was counted, as after a pause that is not training."""
    self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

  def count(self, waited: float) -> None:
    """Counts a step that waited so many seconds for its data."""
    self._steps += 1
    self._waited += waited

  def report(self) -> dict[str, float]:
    """Scalars of the steps counted so far, and starts again.

    Returns:
      `images_per_second`, `step_seconds`, and `data_wait`, the share of the
      time in which the step waited for data, in [0, 1].
    """
    seconds = time.perf_counter() - self._start
    scalars = {
      'images_per_second': self._steps * self._batch_size / seconds,
      'step_seconds': seconds / self._steps,
      'data_wait': self._waited / seconds,
    }
    self.restart()
    return scalars


def duration(seconds: float) -> str:
  """Hours, minutes and seconds: '1:02:03', '2:03'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02}:{seconds:02}'
  return f'{minutes}:{seconds:02}'
