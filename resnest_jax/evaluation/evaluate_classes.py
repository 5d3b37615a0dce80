"""The part of eval.py that is of classifiers alone: scores and report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.table
from ml_collections import ConfigDict

from resnest_jax import files
from resnest_jax.distributed import messages
from resnest_jax.evaluation.classification import (
  ClassEvaluation,
  wilson_interval,
)
from resnest_jax.evaluation.evaluate import Evaluator
from resnest_jax.evaluation.report import images, page
from resnest_jax.evaluation.results import (
  METRICS,
  circumstances,
  noting,
  number,
  publish,
  speed,
)
from resnest_jax.inference.protocols import CenterCrop
from resnest_jax.text import listed, percent

SHOWN = 3  # Most probable classes of a mistake.
MOST_ROWS = 50  # Of the printed table: those of the lowest scores.


def evaluate_classes(
  config: ConfigDict,
  network: tuple[Any, Any],
  split: Any,
  protocol: CenterCrop,
  result: dict[str, Any],
  out: Path,
  console: rich.console.Console,
) -> None:
  """As `evaluate_pixels`, of a classifier."""
  model, variables = network
  evaluator = Evaluator(config, model, split, protocol=protocol)
  evaluation = evaluator(variables)
  if not messages.is_first():
    return
  batch_size = evaluator.batch_size * jax.process_count()
  classes = split.labels.classes
  result |= summarize(config, evaluation, batch_size, classes)
  worst = evaluation.mistakes()[: config.eval.report_images].tolist()
  result['report'] = page.NAME
  result['report_images'] = {
    'worst': [_described(evaluation, i, classes) for i in worst]
  }
  publish(
    out,
    console,
    lambda: files.write_json(out / METRICS, result),
    lambda: print_table(console, result),
    lambda: draw(out, result, split, evaluation, worst),
  )


def summarize(
  config: ConfigDict,
  evaluation: ClassEvaluation,
  batch_size: int,
  classes: Sequence[str],
) -> dict[str, Any]:
  """The part of metrics.json that is known only after the evaluation."""
  scores, images = evaluation.scores, evaluation.num_images
  right = round(scores.top1 * images)
  per_class = zip(classes, scores.per_class, scores.images, strict=True)
  return {
    'images': images,
    **scores.summary(),
    'top1_interval': wilson_interval(right, images),
    'loss': number(evaluation.loss),
    'classes_absent': [
      name for name, n in zip(classes, scores.images, strict=True) if not n
    ],
    **circumstances(config, evaluation.seconds, batch_size),
    'per_class': [
      {'class': name, 'top1': number(top1), 'images': int(count)}
      for name, top1, count in per_class
    ],
  }


def _described(
  evaluation: ClassEvaluation, index: int, classes: Sequence[str]
) -> dict[str, Any]:
  pairs = zip(
    evaluation.best[index, :SHOWN],
    evaluation.probabilities[index, :SHOWN],
    strict=True,
  )
  return {
    'name': evaluation.names[index],
    'class': classes[evaluation.labels[index]],
    'best': [[classes[k], float(p)] for k, p in pairs],
  }


def print_table(
  console: rich.console.Console, result: Mapping[str, Any]
) -> None:
  """Prints the classes with the lowest scores, then the scores of all."""
  known = [x for x in result['per_class'] if x['top1'] is not None]
  shown = sorted(known, key=lambda x: x['top1'])[:MOST_ROWS]
  few = 'scores in %'
  if len(shown) < len(known):
    few += f', the lowest {len(shown)} of {len(known)} classes'
  table = rich.table.Table('class', title=few)
  for column in ('top1', 'images'):
    table.add_column(column, justify='right')
  # Of few classes in their own order.
  for entry in shown if len(shown) < len(known) else known:
    score, images = percent(entry['top1']), f'{entry["images"]:,}'
    table.add_row(entry['class'], score, images)
  console.print(table)
  if absent := result['classes_absent']:
    console.print(f'{len(absent)} classes have no image: {listed(absent, 8)}')
  top = (f'{key} {percent(result[key])}' for key in ('top1', 'top5'))
  console.print('  '.join(top), style='bold')
  interval = result['top1_interval']
  console.print(
    f'top1 of other images like these: {percent(interval["low"])} to '
    f"{percent(interval['high'])} (Wilson's interval of "
    f'{interval["level"]:.0%})'
  )
  console.print(speed(result['images'], result['seconds']))


def draw(
  out: Path,
  result: Mapping[str, Any],
  split: Any,
  evaluation: ClassEvaluation,
  worst: Sequence[int],
) -> list[str]:
  """Writes the report; returns why something is missing."""
  missing, mistakes = [], []
  described = result['report_images']['worst']
  for index, facts in zip(worst, described, strict=True):
    with noting(missing):
      mistakes.append(images.mistake(split[index]['image'], facts))
  with noting(missing):
    page.write_classes(out / page.NAME, result, evaluation, mistakes)
  return missing
