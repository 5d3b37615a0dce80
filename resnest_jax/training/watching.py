"""What one can watch a run by besides its log: profile, recompilations, W&B."""

import contextlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from resnest_jax.errors import UserError, writing

PROFILE = 'profile'


def parse_steps(text: str) -> tuple[int, int]:
  """First and last of the steps in 'FIRST:LAST', counted from 1.

  Raises:
    UserError: the text does not say that.
  """
  first, colon, last = text.partition(':')
  if not (colon and first.isdigit() and last.isdigit()):
    raise UserError(f'--profile {text}: give two steps, such as 10:15.')
  if not 1 <= int(first) <= int(last):
    raise UserError(
      f'--profile {text}: the first step is 1, and the last one not before '
      'the first.'
    )
  return int(first), int(last)


class Profile:
  """Traces some steps of a run into `WORKDIR/profile`.

  TensorBoard (with its plugin xprof) opens the folder, Perfetto the file
  `perfetto_trace.json.gz` in it.
  """

  def __init__(self, workdir: Path, steps: tuple[int, int] | None):
    """Nothing is traced yet.

    Args:
      workdir: of the run.
      steps: the first and the last one; None: none.
    """
    self.folder = workdir / PROFILE
    self._steps, self._running = steps, False

  def before(self, step: int) -> None:
    """Starts if that step, which comes next, is the first one to trace."""
    if self._steps and not self._running:
      first, last = self._steps
      if first <= step <= last:
        with writing(self.folder):
          jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
        self._running = True

  def after(self, step: int, result: Any) -> None:
    """Ends once the last step's `result` is there."""
    if self._running and step >= self._steps[1]:
      first = self._steps[0]
      jax.block_until_ready(result)
      self.close()
      print(
        f'steps {first} to {step} are traced in {self.folder} '
        '(perfetto_trace.json.gz opens in ui.perfetto.dev)',
        flush=True,
      )

  def close(self) -> None:
    """Ends what is being traced, at the end of the run or on an error."""
    if self._running:
      self._running, self._steps = False, None
      with writing(self.folder):
        jax.profiler.stop_trace()


class Compilations:
  """Tells of programs that are compiled where none should be any more."""

  def __init__(self, names: list[str]):
    """Watches the list of `runtime.count_compilations`."""
    self._names, self._seen, self._settled = names, 0, False

  def skip(self) -> None:
    """What was compiled until now is not told of."""
    self._seen = len(self._names)

  def unsettle(self) -> None:
    """What comes until the next `warning` may compile, for the first time."""
    self._settled = False

  def warning(self, where: str) -> str | None:
    """What was compiled since the last call, unless that was to be expected.

    Args:
      where: of the call, such as 'until step 20'.
    """
    new = self._names[self._seen :]
    self._seen = len(self._names)
    expected, self._settled = not self._settled, True
    if expected or not new:
      return None
    return (
      f'warning: {len(new)} programs were compiled again {where} '
      f'({", ".join(sorted(set(new))[:5])}); that takes time and should '
      'happen at the start alone'
    )


class WeightsAndBiases:
  """Sends a run's scalars to Weights & Biases, which is an optional package.

  A run that goes on continues there as the same run. `WANDB_MODE=offline`
  keeps everything in `WORKDIR/wandb`, for `wandb sync`.
  """

  def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]):
    """Starts or continues the run of that workdir.

    Raises:
      UserError: the package is missing, or it cannot log in.
    """
    try:
      import wandb
    except ImportError as error:
      raise UserError(
        'config.train.wandb needs the package wandb: pip install wandb, or '
        'leave the key empty.'
      ) from error
    folder = workdir / 'wandb'
    with writing(folder):
      folder.mkdir(exist_ok=True)
      known = folder / 'run_id'
      if not known.exists():
        known.write_text(uuid.uuid4().hex[:12], 'utf-8')
      run_id = known.read_text('utf-8')
    try:
      self._run = wandb.init(
        project=project,
        id=run_id,
        name=workdir.name,
        dir=str(workdir),
        config=dict(config),
        resume='allow',
      )
    except wandb.errors.Error as error:
      raise UserError(
        f'Weights & Biases: {error} (config.train.wandb; WANDB_MODE=offline '
        'keeps the figures in the workdir).'
      ) from error

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Sends scalars that hold after `step` steps."""
    self._run.log(dict(scalars), step=step)

  def close(self) -> None:
    """Waits until everything is sent."""
    with contextlib.suppress(OSError):
      self._run.finish()
