"""Traces some steps of a run with JAX's profiler."""

from pathlib import Path
from typing import Any

import jax

from resnest_jax.errors import UserError, writing


def parse_steps(text: str) -> tuple[int, int]:
  """The first and the last step of 'FIRST:LAST', counted from 1."""
  first, _, last = text.partition(':')
  if first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last):
    return int(first), int(last)
  raise UserError(
    f'--profile {text}: give the first and the last step, from 1 on, such as '
    '10:15.'
  )


class Profile:
  """Traces into `WORKDIR/profile`, for TensorBoard's xprof and Perfetto."""

  def __init__(self, workdir: Path, steps: tuple[int, int] | None):
    self.folder = workdir / 'profile'
    self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
    self._running = False

  def before(self, step: int) -> None:
    if step in self._steps and not self._running:
      with writing(self.folder):
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
      self._running = True

  def after(self, step: int, result: Any) -> None:
    """Stops tracing after the last step, once its `result` is there."""
    # Steps are dispatched ahead of the devices: wait, or the trace is empty.
    if self._running and step >= self._steps[-1]:
      first = self._steps[0]
      jax.block_until_ready(result)
      self.close()
      print(
        f'steps {first} to {step} are traced in {self.folder} '
        '(perfetto_trace.json.gz opens in ui.perfetto.dev)',
        flush=True,
      )

  def close(self) -> None:
    """Stops tracing, also after an error; what was traced is written."""
    if self._running:
      self._running, self._steps = False, range(0)
      with writing(self.folder):
        jax.profiler.stop_trace()
