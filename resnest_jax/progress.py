"""Progress bars with an estimate of the time that is left."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  ProgressColumn,
  Task,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from rich.text import Text


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
  """Shows a bar on stderr; yields a function of (done, total).

  The bar appears with the first call, so that other output may come before.
  It has a descriptor of its own, so that it is drawn where file descriptor 2 is
  redirected for a while (`doctor.decoder_warnings`).
  """
  columns = (
    TextColumn('{task.description}'),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn('images, elapsed'),
    TimeElapsedColumn(),
    TextColumn('left'),
    TimeRemainingColumn(),
  )
  with contextlib.ExitStack() as stack:
    console = Console(stderr=True)
    if _is_descriptor_2(sys.stderr):
      copy = stack.enter_context(os.fdopen(os.dup(2), 'w'))
      console = Console(file=copy)
    bar = Progress(*columns, console=console)
    task = bar.add_task(what, total=None)

    def report(done: int, total: int) -> None:
      bar.start()
      bar.update(task, completed=done, total=total)

    try:
      yield report
    finally:
      bar.stop()


def _is_descriptor_2(stream: object) -> bool:
  try:
    return stream.fileno() == 2
  except (AttributeError, OSError, ValueError):  # It is no file, or closed.
    return False


class RateColumn(ProgressColumn):
  """How many a second since the start, named by what is counted.

  A task may count something else and say so in its field `unit`.
  """

  def __init__(self, unit: str):
    super().__init__()
    self.unit = unit

  def render(self, task: Task) -> Text:
    done = task.completed and task.elapsed
    unit = task.fields.get('unit', self.unit)
    text = f'{task.completed / task.elapsed:.3g} {unit}/s' if done else ''
    return Text(text, style='progress.data.speed')


def evaluation_progress(quiet: bool = False) -> Progress:
  """A display for `evaluate`: bar, count, images/s, time gone and left."""
  return Progress(
    TextColumn('{task.description}'),
    BarColumn(),
    MofNCompleteColumn(),
    RateColumn('images'),
    TimeElapsedColumn(),
    TextColumn('left'),
    TimeRemainingColumn(),
    console=Console(quiet=True) if quiet else None,
  )


def compile_notice(
  progress: Progress,
) -> Callable[[int, int], None]:
  """An `on_compile` of `make_eval_step` that says once why nothing moves.

  Args:
    progress: a running display; the line stands above it.
  """
  said = False

  def notice(height: int, width: int) -> None:
    nonlocal said
    if not said:
      progress.console.print(
        f'compiling for images of up to {width}x{height} pixels, and again '
        'for other shapes (a minute or more at full size, seconds next time)',
        highlight=False,
        soft_wrap=True,
      )
    said = True

  return notice
