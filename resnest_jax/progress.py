"""Progress bars with an estimate of the time left."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import rich.progress as bars
from rich.console import Console
from rich.text import Text


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
  """Shows a bar on stderr; yields a function of (done, total)."""
  with contextlib.ExitStack() as stack:
    console = Console(stderr=True)
    try:
      is_descriptor_2 = sys.stderr.fileno() == 2
    # A notebook's stderr has no descriptor; ValueError means that it is closed.
    except (AttributeError, OSError, ValueError):
      is_descriptor_2 = False
    # `doctor.decoder_warnings` redirects descriptor 2 while images are decoded.
    if is_descriptor_2:
      copy = stack.enter_context(os.fdopen(os.dup(2), 'w'))
      console = Console(file=copy)
    bar = _bar(bars.TextColumn('images, elapsed'), console)
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
  return _bar(RateColumn(), Console(quiet=True) if quiet else None)


def _bar(rate: bars.ProgressColumn, console: Console | None) -> bars.Progress:
  return bars.Progress(
    bars.TextColumn('{task.description}'),
    bars.BarColumn(),
    bars.MofNCompleteColumn(),
    rate,
    bars.TimeElapsedColumn(),
    bars.TextColumn('left'),
    bars.TimeRemainingColumn(),
    console=console,
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
        highlight=False,
        soft_wrap=True,
      )
    said = True

  return notice
