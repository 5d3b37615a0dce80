"""Progress bars with an estimate of the time left."""

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
  """Shows a bar on stderr; yields a function of (done, total)."""
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
    # A duplicate descriptor, because `doctor.decoder_warnings` redirects
    # descriptor 2 to a file while images are decoded.
    if _is_descriptor_2(sys.stderr):
      copy = stack.enter_context(os.fdopen(os.dup(2), 'w'))
      console = Console(file=copy)
    bar = Progress(*columns, console=console)
    task = bar.add_task(what, total=None)

    def report(done: int, total: int) -> None:
      # Started by the first report, so that earlier output stays above it.
      bar.start()
      bar.update(task, completed=done, total=total)

    try:
      yield report
    finally:
      bar.stop()


def _is_descriptor_2(stream: object) -> bool:
  try:
    return stream.fileno() == 2
  # Notebooks replace stderr by an object without descriptor; ValueError means
  # that it is closed.
  except (AttributeError, OSError, ValueError):
    return False


class RateColumn(ProgressColumn):
  """Items per second since the start, such as '12.3 images/s'."""

  def __init__(self, unit: str):
    super().__init__()
    self.unit = unit

  def render(self, task: Task) -> Text:
    done = task.completed and task.elapsed
    # Tasks of one display may count different things.
    unit = task.fields.get('unit', self.unit)
    text = f'{task.completed / task.elapsed:.3g} {unit}/s' if done else ''
    return Text(text, style='progress.data.speed')


def evaluation_progress(quiet: bool = False) -> Progress:
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
  """Makes an `on_compile` of `make_eval_step` that explains the pause once."""
  said = False

  def notice(height: int, width: int) -> None:
    nonlocal said
    # Every new padded shape compiles again, but one notice is enough.
    if not said:
      progress.console.print(
        f'compiling for images of up to {width}x{height} pixels, and again '
        'for other shapes (a minute or more at full size, seconds next time)',
        highlight=False,
        soft_wrap=True,
      )
    said = True

  return notice
