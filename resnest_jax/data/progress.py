"""A progress bar with an estimate of the time that is left."""

import contextlib
import os
import sys
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
  It has a descriptor of its own, so that it is drawn where file descriptor 2 is
  redirected for a while (`checks.decoder_warnings`).
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
