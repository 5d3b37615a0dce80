"""What a run tells: lines on the console, JSON lines, TensorBoard."""

import json
import os
import time
from pathlib import Path


class RunLog:
  """Scalars of a run in `log.jsonl` and for TensorBoard.

  A run that continues from a checkpoint first drops what an earlier process
  logged beyond it, so that every step stands there once.
  """

  def __init__(self, workdir: Path, start_step: int):
    """Opens the logs.

    Args:
      workdir: the run's folder.
      start_step: finished steps; later lines are dropped.
    """
    self.path = workdir / 'log.jsonl'
    self._drop_after(start_step)
    self._file = self.path.open('a', encoding='utf-8')
    # Takes seconds where torch is installed, which it imports.
    from tensorboardX import SummaryWriter

    self._board = SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=start_step + 1
    )

  def _drop_after(self, step: int) -> None:
    if not self.path.exists():
      return
    kept = []
    for line in self.path.read_text('utf-8').splitlines():
      try:
        if json.loads(line)['step'] <= step:
          kept.append(f'{line}\n')
      except ValueError:  # The line that a kill cut off.
        continue
    temporary = self.path.with_suffix('.tmp')
    temporary.write_text(''.join(kept), 'utf-8')
    os.replace(temporary, self.path)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Adds scalars that hold after `step` steps."""
    self._file.write(json.dumps({'step': step, **scalars}) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes the files."""
    self._file.close()
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
