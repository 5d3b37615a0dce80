"""A progress bar with an estimate of the time that is left."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
  """Shows a bar on stderr; yields a function of (done, total).

  The bar appears with the first call, so that other output may come before.
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
  bar = Progress(*columns, console=Console(stderr=True))
  task = bar.add_task(what, total=None)

  def report(done: int, total: int) -> None:
    bar.start()
    bar.update(task, completed=done, total=total)

  try:
    yield report
  finally:
    bar.stop()
