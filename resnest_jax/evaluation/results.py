"""What eval.py writes and prints of every task."""

import contextlib
import datetime
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.table
from ml_collections import ConfigDict

from resnest_jax import files, runtime
from resnest_jax.config_keys import classifies
from resnest_jax.errors import UserError
from resnest_jax.evaluation.report import page
from resnest_jax.evaluation.report.tables import described, plan
from resnest_jax.text import listed, percent, plural
from resnest_jax.weights.temperature import Place

METRICS = 'metrics.json'
MOST_ROWS = 50  # Of images' classes: those of the lowest scores.


def publish(
  out: Path,
  console: rich.console.Console,
  result: Mapping[str, Any],
  draw: Callable[..., None],
  before: Sequence[str],
  place: Place,
) -> None:
  """Writes the scores and a temperature in `place`, prints them, and draws.

  `draw` gets the first and the third argument, the overlays that an earlier run
  lists, and a list to which it appends why pictures are missing.
  """
  # On disk before anything is drawn, and on the screen if the disk refuses.
  try:
    with files.explain_refusal(out):
      files.write_json(out / METRICS, result)
  finally:
    print_table(console, result)
  missing: list[str] = []
  if found := result.get('calibration'):
    with noting(missing):
      place.write(found['temperature'], result['data'])
      console.print(f'temperature kept in {place.file}', soft_wrap=True)
  draw(out, result, before, missing)
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
  """Keys of metrics.json about how and when a split was evaluated.

  `batch_size` is this process' one.
  """
  padded = {} if classifies(config) else {'bucket': config.eval.bucket}
  return {
    'dtype': config.model.dtype,
    'batch_size': batch_size * jax.process_count(),
    **padded,
    'seconds': round(seconds, 3),
    'devices': runtime.describe_devices(),
    'versions': runtime.versions(),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def numbers(values: Mapping[str, float]) -> dict[str, float | None]:
  # JSON has no NaN: undefined scores are null.
  return {k: None if math.isnan(x) else float(x) for k, x in values.items()}


def print_table(
  console: rich.console.Console, result: Mapping[str, Any]
) -> None:
  """Prints the scores of metrics.json by class, then those of all."""
  of = plan(result)
  # Of up to 150 rows those without a score would bury the others.
  shown = known = [x for x in result['per_class'] if x[of.main] is not None]
  title = 'scores in %'
  if of.unit == 'image' and len(known) > MOST_ROWS:
    shown = sorted(known, key=lambda x: x[of.main])[:MOST_ROWS]
    title += f', the lowest {MOST_ROWS} of {len(known)} classes'
  table = rich.table.Table('class', title=title)
  for column in (*of.columns.values(), f'{of.unit}s'):
    table.add_column(column, justify='right')
  total = sum(x[f'{of.unit}s'] for x in result['per_class'])
  rows = *shown, {'class': of.foot, f'{of.unit}s': total, **of.means}
  for row in rows:
    if row is rows[-1]:
      table.add_section()
    table.add_row(
      row['class'],
      *(percent(row[key]) for key in of.columns),
      f'{row[f"{of.unit}s"]:,}',
      style='bold' if row is rows[-1] else None,
    )
  console.print(table)
  if absent := result['classes_absent']:
    what = {'pixel': 'labelled pixel', 'image': 'image'}[of.unit]
    console.print(
      f'{plural(len(absent), "class", "have")} no {what}: {listed(absent, 8)}'
    )
  keys = 'mIoU', 'mAcc', 'aAcc', 'mIoU_all_classes', 'top1', 'top5'
  summary = (f'{key} {percent(result[key])}' for key in keys if key in result)
  console.print('  '.join(summary), style='bold')
  if found := result.get('calibration'):
    old, new = found['before'], found['after']
    console.print(
      f'temperature {found["temperature"]:.4g}: ECE {percent(old["ECE"])} to '
      f'{percent(new["ECE"])}, NLL {old["NLL"]:.4f} to {new["NLL"]:.4f}'
    )
  interval, main = result[f'{of.total}_interval'], of.total
  console.print(
    f'{main} of other images like these: {percent(interval["low"])} to '
    f'{percent(interval["high"])} ({described(interval)})'
  )
  images, seconds = result['images'], max(result['seconds'], 1e-3)
  told = f'{plural(images, "image")}, {images / seconds:.3g} images/s'
  console.print(f'{told} (with compiling)')
