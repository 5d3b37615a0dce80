"""The body of eval.py: from a checkpoint to scores, a report and pictures."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
from ml_collections import ConfigDict

from resnest_jax import drawing, files
from resnest_jax.checkpoints.store import check_classes, checkpoint_dir, opened
from resnest_jax.config import fit_num_classes, flatten
from resnest_jax.config_keys import CLASSIFIER, classifies
from resnest_jax.data.datasets import check_task, describe, open_data
from resnest_jax.data.preprocess import Normalization
from resnest_jax.distributed import messages
from resnest_jax.errors import UserError
from resnest_jax.evaluation import calibration, metrics, results
from resnest_jax.evaluation.bootstrap import miou_interval
from resnest_jax.evaluation.boundary import (
  DILATION_RATIO,
  BoundaryIoU,
  BoundaryScores,
)
from resnest_jax.evaluation.evaluate import Evaluator
from resnest_jax.evaluation.evaluate_classes import evaluate_classes
from resnest_jax.evaluation.ranked_images import RankedImages
from resnest_jax.evaluation.report import images as report_images
from resnest_jax.evaluation.report import page
from resnest_jax.evaluation.segmentation import Evaluation
from resnest_jax.inference.protocols import CenterCrop, Protocol, make_protocol
from resnest_jax.progress import console as make_console
from resnest_jax.text import differing, listed, without_secrets
from resnest_jax.weights.infer import title_of
from resnest_jax.weights.pretrained import load_trained
from resnest_jax.weights.temperature import Place

OVERLAYS = Path('overlays')


def evaluate_split(
  config: ConfigDict,
  *,
  workdir: Path | None = None,
  checkpoint: str = 'latest',
  weights: str | None = None,
  split_name: str | None = None,
  out: Path | None = None,
  calibrate: bool = False,
) -> None:
  """Evaluates a network on every image of a split; prints and writes scores.

  Every process has to call it; the first one prints and writes. The network is
  a `checkpoint` of the run `workdir` ('latest', 'best' or a step), or `weights`
  of any source (docs/weights.md), then with `out`. `split_name` is by default
  `config.data.eval_split`, the folder `out` WORKDIR/eval/STEP-SPLIT, followed
  by the protocol's name unless it is `whole`. `calibrate` fits a temperature
  and keeps it with the weights.

  Raises `UserError` if data or weights cannot be used, or `out` holds something
  else.
  """
  console = make_console(quiet=not messages.is_first())
  check_task(config)
  protocol = make_protocol(config)
  split_name = split_name or config.data.eval_split
  split = open_data(config.data, split_name)
  messages.check_same_data(describe({'the split': split}))
  # Before arrays are compared, whose shapes would not say why they differ. Only
  # of a run: other weights may spell the classes in another way.
  if workdir or Path(weights, 'checkpoints').is_dir():
    with opened(Path(workdir or weights), checkpoint) as (_, _, about):
      check_classes(about, split.labels.classes)
  fit_num_classes(config, len(split.labels.classes))
  model, variables, found, normalization, place = load_network(
    config, workdir, weights, checkpoint, console
  )
  split.normalization = normalization
  protocol = dataclasses.replace(protocol, normalization=normalization)
  result = {
    'config': config.name,
    **found,
    'data': {'name': config.data.name, 'split': split_name},
    'protocol': protocol.describe(),
  }
  if out is None:
    usual = protocol.name in (Protocol.name, CenterCrop.name)
    named = '' if usual else f'-{protocol.name}'
    out = workdir / 'eval' / f'{found["step"]}-{split_name}{named}'

  def claim() -> list[str]:
    if calibrate:
      calibration.check(protocol, place)
    return claim_results(out, result, workdir)

  # Before hours of work; only the first process looks, all get its error.
  before = messages.gather(lambda: messages.is_first() and claim())[0]

  evaluate = evaluate_classes if classifies(config) else evaluate_pixels
  make = functools.partial(Evaluator, config, model, split, protocol=protocol)
  measure = calibration.slopes if calibrate else None
  first = functools.partial(make, measure=measure)
  summary, draw_into, sums = evaluate(config, split, first, variables)
  if calibrate:
    summary['calibration'] = calibration.calibrated(sums, make, variables)
  if messages.is_first():
    result |= summary
    results.publish(out, console, result, draw_into, before, place)


def evaluate_pixels(
  config: ConfigDict,
  split: Any,
  make: Callable[..., Evaluator],
  variables: Any,
) -> tuple[dict[str, Any], Callable[..., None], Any]:
  """Evaluates a segmentor by the evaluator that is made.

  Returns the rest of metrics.json, what draws (`draw` of `publish`), and what
  was measured.
  """
  ranked = RankedImages(config.eval.report_images)
  with contextlib.ExitStack() as at_exit:
    boundary = config.eval.boundary_iou and at_exit.enter_context(
      BoundaryIoU(len(split.labels.classes))
    )
    evaluator = make(
      keep=config.eval.overlays,
      # Without watchers and overlays label maps stay on the devices.
      watchers=[x for x in (boundary, ranked.number and ranked) if x],
    )
    evaluation = evaluator(variables)
    # Before the exit above cancels the threads that still count.
    outlines = boundary.scores() if boundary else None

  counted = evaluation, ranked, outlines, evaluator.batch_size
  summary = summarize(config, split, *counted)
  draw_into = functools.partial(draw, split, evaluation, ranked)
  return summary, draw_into, evaluation.measured


def load_network(
  config: ConfigDict,
  workdir: Path | None,
  weights: str | None,
  checkpoint: str,
  console: rich.console.Console,
) -> tuple[Any, Any, dict[str, Any], Normalization, Place]:
  """The network, its variables, their origin for metrics.json, and more."""
  # For a run, so that a flag that does not fit the checkpoint is an error.
  model, variables, loaded = load_trained(
    weights or workdir,
    checkpoint,
    config.model.dtype,
    model_config=None if weights else config.model.to_dict(),
    tasks=('classifier' if classifies(config) else 'segmentor',),
  )
  theirs, provenance = loaded.description.config, loaded.provenance
  if theirs['num_classes'] != config.model.num_classes:
    raise UserError(
      f'{weights} has {theirs["num_classes"]} classes, {config.name} has '
      f'{config.model.num_classes}; choose the --config of its data set.'
    )
  normalization = loaded.normalized()
  if normalization.bands != tuple(config.data.bands):
    raise UserError(
      f'{weights or workdir} is a network of other bands. Add '
      f'--config.data.bands={",".join(normalization.bands)}.'
    )
  step = provenance.get('step')
  if not weights:
    about, source = f'checkpoint {step} of {workdir}', checkpoint_dir(workdir)
    found = {'checkpoint': str(source.resolve() / str(step)), 'step': step}
  else:
    rule = f', dilation rule {theirs["dilation_rule"]}'
    about = (
      f'{theirs.get("head", CLASSIFIER)} on {title_of(theirs)}'
      f'{"" if classifies(config) else rule}, from {without_secrets(weights)}'
    )
    known = ('file', 'sha256', 'step')
    found = {'checkpoint': without_secrets(weights)}
    found |= {key: provenance[key] for key in known if key in provenance}
  for line in (about, *loaded.notes()):
    console.print(line, soft_wrap=True)
  found |= {'model': theirs}
  return model, variables, found, normalization, loaded.place


def claim_results(
  out: Path, result: Mapping[str, Any], workdir: Path | None = None
) -> list[str]:
  """The overlays that an earlier run of this evaluation lists in `out`.

  Raises `UserError` if it cannot be written to, or holds something else.
  """
  files.check_writable(out)
  files.inside(out, OVERLAYS / 'x')
  files.clean(out)
  try:
    if not out.exists() or not any(out.iterdir()):
      return []
    old = json.loads((out / results.METRICS).read_text('utf-8'))
    before = flatten({key: old[key] for key in result})
    # Early versions wrote no report: this one may be anybody's file.
    foreign = old.get('report') != page.NAME and (out / page.NAME).exists()
    overlays = list(old.get('overlays', []))
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    raise UserError(
      f'{out} is there and is not the result of an evaluation; nothing was '
      'evaluated. Give another --out, or remove it.'
    ) from None
  # Through JSON, which has no tuples, like `before`.
  now = flatten(json.loads(json.dumps(result)))
  # A run that was moved or copied has taken its results along.
  if workdir and workdir.resolve() in out.resolve().parents:
    before['checkpoint'] = now['checkpoint']
  if others := differing(before, now, 'there', 'now'):
    raise UserError(
      f'{out} holds the result of another evaluation ({listed(others, 3)}); '
      'nothing was evaluated. Give another --out, or remove it.'
    )
  if foreign:
    raise UserError(
      f'{out / page.NAME} is there and is not of the evaluation next to it; '
      'nothing was evaluated. Move it, or give another --out.'
    )
  return overlays


def summarize(
  config: ConfigDict,
  split: Any,
  evaluation: Evaluation,
  ranked: RankedImages,
  outlines: BoundaryScores | None,
  batch_size: int,
) -> dict[str, Any]:
  """The part of metrics.json that is known only after the evaluation."""
  scores, names = evaluation.scores, evaluation.names
  summary = scores.summary()
  # PyTorch-Encoding's mIoU next to ours.
  if config.eval.protocol == 'encoding':
    summary['mIoU_all_classes'] = scores.mIoU_all_classes
  interval = miou_interval(evaluation.image_counts)
  bounds = results.numbers({key: interval[key] for key in ('low', 'high')})
  columns = {key: getattr(scores, key) for key in metrics.PER_CLASS}
  means = {key: getattr(scores, f'm{key}') for key in metrics.PER_CLASS}
  boundary = None
  if outlines:
    columns['BoundaryIoU'] = outlines.IoU
    boundary = {'mIoU': outlines.mIoU, 'dilation_ratio': DILATION_RATIO}
    boundary = results.numbers(boundary)
  per_class = [
    {
      'class': name,
      **results.numbers({key: column[i] for key, column in columns.items()}),
      'pixels': int(evaluation.confusion[i].sum()),
    }
    for i, name in enumerate(split.labels.classes)
  ]
  return {
    'images': evaluation.num_images,
    **results.numbers(summary),
    'mIoU_interval': interval | bounds,
    'mean': results.numbers(means),
    'fscore_beta': config.eval.fscore_beta,
    'boundary': boundary,
    'classes_averaged': scores.num_averaged,
    'classes_absent': [x['class'] for x in per_class if not x['pixels']],
    **results.circumstances(config, evaluation.seconds, batch_size),
    'per_class': per_class,
    'overlays': [overlay_of(names[i]) for i in sorted(evaluation.predictions)],
    'report': page.NAME,
    'report_images': {
      kind: [{'name': names[x.index], 'mIoU': x.score} for x in shown]
      for kind, shown in ranked.both().items()
    },
  }


def overlay_of(name: str) -> str:
  return (OVERLAYS / f'{name}.png').as_posix()


def draw(
  split: Any,
  evaluation: Evaluation,
  ranked: RankedImages,
  out: Path,
  result: Mapping[str, Any],
  before: Sequence[str],
  missing: list[str],
) -> None:
  """Writes overlays and the report; removes old overlays that are not drawn.

  Appends to `missing` why some are. What an earlier metrics.json lists in
  `before` is removed only where it is an overlay of an image of the split.
  """
  labels = split.labels
  ours = set(map(overlay_of, evaluation.names)) - set(result['overlays'])
  for name in ours.intersection(x for x in before if isinstance(x, str)):
    with results.noting(missing):
      files.inside(out, name).unlink(missing_ok=True)
  sheet = []
  for index, prediction in sorted(evaluation.predictions.items()):
    with results.noting(missing):
      sheet.append(draw_overlay(out, split, index, prediction))
  if sheet:
    with results.noting(missing):
      drawing.write_image(
        out / 'contact_sheet.png', drawing.contact_sheet(sheet)
      )
  pictures = {kind: [] for kind in ranked.both()}
  for kind, images in ranked.both().items():
    for rank, image in enumerate(images, 1):
      with results.noting(missing):
        sample = drawing.shown_sample(split, image.index)
        shown = kind, rank, image, sample, labels
        pictures[kind].append(report_images.article(*shown))
  with results.noting(missing):
    page.write(
      out / page.NAME,
      result,
      evaluation.confusion,
      report_images.section(pictures, result['images']),
      evaluation.image_counts,
      labels.palette,
    )


def draw_overlay(
  out: Path, split: Any, index: int, prediction: np.ndarray
) -> np.ndarray:
  """Writes overlays/NAME.png; returns the panel for the contact sheet."""
  ((sample, _, panel),) = drawing.panels(split, {index: prediction})
  picture = drawing.overlay(sample['image'], prediction, split.labels.palette)
  # By whole factors, so that no colour blends.
  factor = max(400 // max(picture.shape), 1)
  picture = picture.repeat(factor, 0).repeat(factor, 1)
  drawing.write_image(files.inside(out, overlay_of(sample['name'])), picture)
  return panel
