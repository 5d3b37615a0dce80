"""What eval.py writes and prints of every task."""

import contextlib
import datetime
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rich.console
from ml_collections import ConfigDict

from resnest_jax import files, runtime
from resnest_jax.config_keys import classifies
from resnest_jax.errors import UserError
from resnest_jax.evaluation.report import page
from resnest_jax.text import plural

METRICS = 'metrics.json'


def publish(
  out: Path,
  console: rich.console.Console,
  write: Callable[[], None],
  show: Callable[[], None],
  draw: Callable[[], list[str]],
) -> None:
  """Writes the scores, prints them, and draws; `draw` says what is missing."""
  # On disk before anything is drawn, and on the screen if the disk refuses.
  try:
    with files.explain_refusal(out):
      write()
  finally:
    show()
  missing = draw()
  console.print(f'written to {out}', soft_wrap=True)
  if missing:
    reasons = ''.join(f'\n  {why}' for why in missing)
    raise UserError(
      f'the scores are in {out / METRICS}; {plural(len(missing), "file")} '
      'could not be made. Repair the cause and run the same command again:'
      f'{reasons}'
    )
  console.print(f'report: {out / page.NAME}', soft_wrap=True)


@contextlib.contextmanager
def noting(missing: list[str]) -> Iterator[None]:
  """Appends why a picture cannot be made, so that others are."""
  try:
    yield
  except (UserError, OSError) as error:
    missing.append(str(error))


def circumstances(
  config: ConfigDict, seconds: float, batch_size: int
) -> dict[str, Any]:
  """Keys of metrics.json about how and when a split was evaluated."""
  padded = {} if classifies(config) else {'bucket': config.eval.bucket}
  return {
    'dtype': config.model.dtype,
    'batch_size': batch_size,
    **padded,
    'seconds': round(seconds, 3),
    'devices': runtime.describe_devices(),
    'versions': runtime.versions(),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def number(value: float) -> float | None:
  # JSON has no NaN: undefined scores are null.
  return None if math.isnan(value) else float(value)


def speed(images: int, seconds: float) -> str:
  return (
    f'{plural(images, "image")}, {images / seconds:.3g} images/s '
    '(with compiling)'
  )
