"""What an evaluation leaves: a table, `metrics.json`, pictures."""

import dataclasses
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table
from ml_collections import ConfigDict

from resnest_jax import runtime
from resnest_jax.config import flatten
from resnest_jax.errors import UserError
from resnest_jax.evaluation import inference, metrics, visualize
from resnest_jax.evaluation.bootstrap import Interval
from resnest_jax.evaluation.boundary import BoundaryScores
from resnest_jax.evaluation.report import page
from resnest_jax.files import write_json as write_json
from resnest_jax.text import listed, percent


def previous_pictures(out: Path, result: Mapping[str, Any]) -> list[Path]:
  """The pictures of an earlier evaluation of the same, to be replaced.

  Its report has one name and is written over.

  Raises:
    UserError: `out` holds something else, or a report that is not its own.
  """
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return []
  try:
    old = json.loads((out / 'metrics.json').read_text('utf-8'))
    before = flatten({key: old[key] for key in result})
    foreign = old.get('report') != page.NAME and (out / page.NAME).exists()
  except (OSError, ValueError, KeyError, TypeError):
    raise UserError(
      f'{out} is there and is not the result of an evaluation; nothing was '
      'evaluated. Give another --out, or remove it.'
    ) from None
  # JSON has no tuples.
  now = flatten(json.loads(json.dumps(result)))
  if before != now:
    others = [
      f'{key}: {before[key]} there, {now[key]} now'
      for key in sorted(before.keys() & now.keys())
      if before[key] != now[key]
    ]
    others = others or sorted(before.keys() ^ now.keys())
    raise UserError(
      f'{out} holds the result of another evaluation ({listed(others, 3)}); '
      'nothing was evaluated. Give another --out, or remove it.'
    )
  if foreign:
    raise UserError(
      f'{out / page.NAME} is there and is not of the evaluation beside it; '
      'nothing was evaluated. Move it, or give another --out.'
    )
  return [out / name for name in old.get('overlays', [])]


def describe(
  config: ConfigDict,
  evaluation: inference.Evaluation,
  interval: Interval,
  outlines: BoundaryScores | None,
  batch_size: int,
  classes: Sequence[str],
) -> dict[str, Any]:
  """Scores, and all that is needed to know what they are of."""
  scores = evaluation.scores
  per_class = [
    {
      'class': name,
      **{key: number(getattr(scores, key)[i]) for key in metrics.PER_CLASS},
      **({'BoundaryIoU': number(outlines.IoU[i])} if outlines else {}),
      'pixels': int(evaluation.confusion[i].sum()),
    }
    for i, name in enumerate(classes)
  ]
  return {
    'images': evaluation.num_images,
    **{key: number(value) for key, value in scores.summary().items()},
    'mIoU_interval': {
      **dataclasses.asdict(interval),
      **{key: number(getattr(interval, key)) for key in ('low', 'high')},
    },
    'mean': {
      key: number(getattr(scores, f'm{key}')) for key in metrics.PER_CLASS
    },
    'fscore_beta': config.eval.fscore_beta,
    'boundary': outlines
    and {
      'mIoU': number(outlines.mIoU),
      'dilation_ratio': outlines.dilation_ratio,
    },
    'classes_averaged': scores.num_averaged,
    'classes_absent': list(scores.absent),
    'dtype': config.model.dtype,
    'batch_size': batch_size,
    'bucket': config.eval.bucket,
    'seconds': round(evaluation.seconds, 3),
    'devices': runtime.describe_devices(),
    'versions': runtime.versions(),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'per_class': per_class,
  }


def number(value: float) -> float | None:
  """JSON has no NaN: undefined scores are null."""
  return None if math.isnan(value) else float(value)


def print_table(
  console: rich.console.Console,
  evaluation: inference.Evaluation,
  interval: Interval,
  outlines: BoundaryScores | None,
  classes: Sequence[str],
) -> None:
  """The classes that take part in the mean, then the means."""
  scores = evaluation.scores
  columns = {
    key: (getattr(scores, key), getattr(scores, f'm{key}'))
    for key in ('IoU', 'Acc', 'Precision', 'Dice')
  }
  if outlines:
    columns['Boundary'] = (outlines.IoU, outlines.mIoU)
  table = rich.table.Table('class', title='scores in %')
  for column in (*columns, 'pixels'):
    table.add_column(column, justify='right')
  for i, name in enumerate(classes):
    if not math.isnan(scores.IoU[i]):
      table.add_row(
        name,
        *(percent(values[i]) for values, _ in columns.values()),
        f'{evaluation.confusion[i].sum():,}',
      )
  table.add_section()
  table.add_row(
    f'mean of {scores.num_averaged}',
    *(percent(mean) for _, mean in columns.values()),
    f'{evaluation.confusion.sum():,}',
    style='bold',
  )
  console.print(table)
  if scores.absent:
    console.print(
      f'{len(scores.absent)} classes have no labelled pixel: '
      f'{listed(scores.absent, 8)}',
      highlight=False,
    )
  summary = '  '.join(
    f'{key} {percent(value)}' for key, value in scores.summary().items()
  )
  speed = evaluation.num_images / evaluation.seconds
  console.print(f'[bold]{summary}[/bold]')
  console.print(
    f'mIoU of other images like these: {percent(interval.low)} to '
    f'{percent(interval.high)} ({interval.level:.0%} of '
    f'{interval.resamples} bootstrap samples)',
    highlight=False,
  )
  console.print(
    f'{evaluation.num_images} images, {speed:.3g} images/s (with compiling)'
  )


def draw(
  out: Path,
  split: Any,
  predictions: Mapping[int, np.ndarray],
  classes: Sequence[str],
  palette: np.ndarray,
) -> None:
  """Overlays one by one, and all samples with their errors on one sheet.

  Args:
    out: folder; gets overlays/NAME.png and contact_sheet.png.
    split: of `open_data`.
    predictions: index in the split -> uint8 (H, W) classes.
    classes: C names.
    palette: uint8 (C, 3) RGB.
  """
  panels = []
  for index, prediction in sorted(predictions.items()):
    sample = split[index]
    image, label, name = (sample[key] for key in ('image', 'label', 'name'))
    picture = visualize.overlay(image, prediction, palette)
    factor = max(400 // max(picture.shape), 1)  # Small ones are hard to see.
    picture = picture.repeat(factor, 0).repeat(factor, 1)
    path = out / 'overlays' / f'{name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    visualize.write_image(path, picture)
    panels.append(
      visualize.panel(image, label, prediction, classes, palette, name)
    )
  visualize.write_image(
    out / 'contact_sheet.png', visualize.contact_sheet(panels)
  )
