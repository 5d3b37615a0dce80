"""How an evaluation or a prediction shows that it goes on."""

from collections.abc import Callable

import rich.console
import rich.progress

from resnest_jax import hosts


class RateColumn(rich.progress.ProgressColumn):
  """How many a second since the start, named by what is counted.

  A task may count something else and say so in its field `unit`.
  """

  def __init__(self, unit: str):
    super().__init__()
    self.unit = unit

  def render(self, task: rich.progress.Task) -> rich.progress.Text:
    done = task.completed and task.elapsed
    unit = task.fields.get('unit', self.unit)
    text = f'{task.completed / task.elapsed:.3g} {unit}/s' if done else ''
    return rich.progress.Text(text, style='progress.data.speed')


def evaluation_progress() -> rich.progress.Progress:
  """A display for `evaluate`: bar, count, images/s, time gone and left.

  Of several processes the first one shows its own share, the others nothing.
  """
  quiet = None if hosts.is_first() else rich.console.Console(quiet=True)
  return rich.progress.Progress(
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    RateColumn('images'),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn('left'),
    rich.progress.TimeRemainingColumn(),
    console=quiet,
  )


def compile_notice(
  progress: rich.progress.Progress,
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
