"""The part of eval.py that is of classifiers alone: scores and report."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from resnest_jax.evaluation import results
from resnest_jax.evaluation.classification import (
  ClassEvaluation,
  wilson_interval,
)
from resnest_jax.evaluation.evaluate import Evaluator
from resnest_jax.evaluation.report import images, page

SHOWN = 3  # Most probable classes of a mistake.


def evaluate_classes(
  config: ConfigDict,
  split: Any,
  make: Callable[..., Evaluator],
  variables: Any,
) -> tuple[dict[str, Any], Callable[..., None], Any]:
  """As `evaluate_pixels`, of a classifier."""
  evaluator = make()
  evaluation = evaluator(variables)
  worst = evaluation.mistakes()[: config.eval.report_images].tolist()
  counted = evaluation, worst, evaluator.batch_size
  summary = summarize(config, split.labels.classes, *counted)
  draw_into = functools.partial(draw, split, evaluation, worst)
  return summary, draw_into, evaluation.measured


def summarize(
  config: ConfigDict,
  classes: Sequence[str],
  evaluation: ClassEvaluation,
  worst: Sequence[int],
  batch_size: int,
) -> dict[str, Any]:
  """The part of metrics.json that is known only after the evaluation."""
  scores, total = evaluation.scores, evaluation.num_images
  entries = [
    {'class': name, **results.numbers({'top1': top1}), 'images': int(count)}
    for name, top1, count in zip(
      classes, scores.per_class, scores.images, strict=True
    )
  ]
  return {
    'images': total,
    **scores.summary(),
    'top1_interval': wilson_interval(round(scores.top1 * total), total),
    **results.numbers({'loss': evaluation.loss}),
    'classes_absent': [x['class'] for x in entries if not x['images']],
    **results.circumstances(config, evaluation.seconds, batch_size),
    'per_class': entries,
    'report': page.NAME,
    'report_images': {
      'worst': [_described(evaluation, i, classes) for i in worst]
    },
  }


def _described(
  evaluation: ClassEvaluation, index: int, classes: Sequence[str]
) -> dict[str, Any]:
  found = evaluation.best[index], evaluation.probabilities[index]
  pairs = list(zip(*found, strict=True))[:SHOWN]
  return {
    'name': evaluation.names[index],
    'class': classes[evaluation.labels[index]],
    'best': [[classes[k], float(p)] for k, p in pairs],
  }


def draw(
  split: Any,
  evaluation: ClassEvaluation,
  worst: Sequence[int],
  out: Path,
  result: Mapping[str, Any],
  before: Sequence[str],
  missing: list[str],
) -> None:
  """Writes the report; appends to `missing` why something is."""
  del before  # It has no overlays.
  mistakes = []
  for index, facts in zip(worst, result['report_images']['worst'], strict=True):
    with results.noting(missing):
      mistakes.append(images.mistake(split[index]['image'], facts))
  said = '<p class="muted">The surest first, with the three most probable '
  said += 'classes of each; the network sees the middle of a picture.</p>'
  none = '<p class="note">None was found, or asked for.</p>'
  with results.noting(missing):
    pictures = said + ''.join(mistakes) if mistakes else none
    page.write(out / page.NAME, result, evaluation.confusion, pictures)
