"""What is printed: names as they are; progress bars with the time left."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.progress as bars
from rich.console import Console
from rich.text import Text


def console(**options: Any) -> Console:
  """A console to which names of classes and files are no markup or emoji."""
  # Numbers are not coloured either: names have some.
  return Console(markup=False, emoji=False, highlight=False, **options)


@contextlib.contextmanager
def progress_bar(
  what: str, unit: str = 'images'
) -> Iterator[Callable[[int, int], None]]:
  """Shows a bar on stderr; yields a function of (done, total)."""
  with contextlib.ExitStack() as stack:
    shown = console(stderr=True)
    try:
      is_descriptor_2 = sys.stderr.fileno() == 2
    # A notebook's stderr has no descriptor; ValueError means that it is closed.
    except (AttributeError, OSError, ValueError):
      is_descriptor_2 = False
    # `doctor.decoder_warnings` redirects descriptor 2 while images are decoded.
    if is_descriptor_2:
      copy = os.fdopen(os.dup(2), 'w', errors='backslashreplace')
      shown = console(file=stack.enter_context(copy))
    bar = _bar(_text(f'{unit}, elapsed'), shown)
    task = bar.add_task(what, total=None)

    def report(done: int, total: int) -> None:
      # Started by the first report, so that earlier output stays above it.
      bar.start()
      bar.update(task, completed=done, total=total)

    try:
      yield report
    finally:
      bar.stop()


class RateColumn(bars.ProgressColumn):
  """Such as '12.3 images/s' since the start, or in the task's own `unit`."""

  def render(self, task: bars.Task) -> Text:
    done = task.completed and task.elapsed
    unit = task.fields.get('unit', 'images')
    text = f'{task.completed / task.elapsed:.3g} {unit}/s' if done else ''
    return Text(text, style='progress.data.speed')


def evaluation_progress(quiet: bool = False) -> bars.Progress:
  return _bar(RateColumn(), console(quiet=quiet))


def _text(template: str) -> bars.TextColumn:
  return bars.TextColumn(template, markup=False)


class _Progress(bars.Progress):
  """Bars that are printed once a minute where they cannot be redrawn."""

  SECONDS = 60

  def start(self) -> None:
    super().start()
    self.printed = time.monotonic()

  def advance(self, task_id: bars.TaskID, advance: float = 1) -> None:
    super().advance(task_id, advance)
    self._print_line()

  def update(self, task_id: bars.TaskID, **fields: Any) -> None:
    super().update(task_id, **fields)
    self._print_line()

  def _print_line(self) -> None:
    is_redrawn = self.console.is_terminal or self.console.is_jupyter
    if not is_redrawn and time.monotonic() - self.printed >= self.SECONDS:
      self.printed = time.monotonic()
      self.console.print(self.get_renderable())


def _bar(rate: bars.ProgressColumn, shown: Console) -> bars.Progress:
  return _Progress(
    _text('{task.description}'),
    bars.BarColumn(),
    bars.MofNCompleteColumn(),
    rate,
    bars.TimeElapsedColumn(),
    _text('left'),
    bars.TimeRemainingColumn(),
    console=shown,
  )


def compile_notice(progress: bars.Progress) -> Callable[[int, int], None]:
  """Makes an `on_compile` of `make_eval_step` that explains the pause once."""
  said = False

  def notice(height: int, width: int) -> None:
    nonlocal said
    if not said:
      progress.console.print(
        f'compiling for images of up to {width}x{height} pixels, and again '
        'for other shapes (a minute or more at full size, seconds next time)',
        soft_wrap=True,
      )
    said = True

  return notice
