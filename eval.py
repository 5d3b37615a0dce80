"""Evaluates a checkpoint on a whole split, every image once.

    python eval.py --config configs/ade20k_pspnet.py --workdir runs/pspnet
    python eval.py --config configs/ade20k_pspnet.py --weights ade20k_pspnet \\
      --out results

The second evaluates published or converted weights (docs/weights.md).

Prints a table of the classes, and writes into --out: metrics.json (the scores
and all that is needed to know what they are of), overlays/NAME.png and
contact_sheet.png (image, ground truth, prediction, errors).
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

import resnest_jax as rj
from resnest_jax import runtime
from resnest_jax.config import fit_num_classes, flag_parser, parse_flags
from resnest_jax.data.checks.finding import listed
from resnest_jax.data.datasets import open_data
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.errors import UserError, run
from resnest_jax.evaluation import inference, metrics, visualize
from resnest_jax.evaluation.bootstrap import Interval, miou_interval
from resnest_jax.evaluation.boundary import BoundaryIoU, BoundaryScores
from resnest_jax.models.layers import at_least_float32
from resnest_jax.training import checkpoints, sharding
from resnest_jax.weights.pretrained import load_segmentor
from resnest_jax.weights.state_dict import variable_shapes

console = rich.console.Console()


def main() -> None:
  parser = flag_parser(
    'Evaluates a checkpoint on a whole split.', workdir_required=False
  )
  parser.add_argument(
    '--checkpoint', default='latest', help='latest (default), best, or a step'
  )
  parser.add_argument(
    '--weights',
    metavar='SOURCE',
    help='instead of --workdir: a published name, a path, an address',
  )
  parser.add_argument(
    '--split', help='of the data set; default: config.data.eval_split'
  )
  parser.add_argument(
    '--out', type=Path, help='default: WORKDIR/eval/STEP-SPLIT'
  )
  flags = parse_flags(parser)
  if bool(flags.workdir) == bool(flags.weights):
    raise UserError(
      'give either --workdir, the folder of a run, or --weights, a name, a '
      'path or an address.'
    )
  if flags.weights and not flags.out:
    raise UserError('--weights needs --out, a folder for the results.')
  config = flags.config
  runtime.set_up(config.model.dtype)

  # The data, the network, and the weights of the checkpoint.
  split_name = flags.split or config.data.eval_split
  split = open_data(config.data, split_name)
  classes, palette = split.labels.classes, split.labels.palette
  fit_num_classes(config, len(classes))
  mesh = sharding.make_mesh()
  if flags.weights:
    model, variables, found = from_weights(flags.weights, config)
  else:
    model, variables, found = from_run(flags, mesh, classes)
  result = {
    'config': config.name,
    **found,  # The model with its dilation rule, too.
    'data': {'name': config.data.name, 'split': split_name},
  }
  out = flags.out
  if out is None:
    out = flags.workdir / 'eval' / f'{found["step"]}-{split_name}'
  replaced = previous_pictures(out, result)

  # Every image once; the predictions of some are kept to be drawn.
  eval_step = inference.make_eval_step(
    model,
    len(classes),
    mesh=mesh,
    dtype=at_least_float32(config.model.dtype),
  )
  batch_size = inference.divisible_batch_size(config.eval.batch_size, mesh)
  batches = make_eval_iterator(
    config.data, split, batch_size=batch_size, bucket=config.eval.bucket
  )
  number = min(config.eval.overlays, len(split))
  drawn = set(np.linspace(0, len(split) - 1, number, dtype=int).tolist())
  predictions = {}
  boundary = BoundaryIoU(len(classes)) if config.eval.boundary_iou else None

  def look(image: inference.ImageResult) -> None:
    if image.index in drawn:
      predictions[image.index] = image.prediction.copy()
    if boundary:
      boundary.add(image.prediction, image.label)

  try:
    with (
      inference.evaluation_progress() as progress,
      boundary or contextlib.nullcontext(),
    ):
      evaluation = inference.evaluate(
        eval_step,
        variables,
        batches,
        classes,
        len(split),
        progress=progress,
        on_image=look if drawn or boundary else None,
        fscore_beta=config.eval.fscore_beta,
      )
      outlines = boundary and boundary.scores()
  finally:
    batches.close()

  # What came out, on the console and in files.
  interval = miou_interval(evaluation.image_counts)
  print_table(evaluation, interval, outlines, classes)
  result |= describe(
    config, evaluation, interval, outlines, batch_size, classes
  )
  names = {index: split[index]['name'] for index in sorted(predictions)}
  result['overlays'] = [f'overlays/{name}.png' for name in names.values()]
  write_json(out / 'metrics.json', result)
  for path in replaced:
    path.unlink(missing_ok=True)
  if predictions:
    draw(out, split, predictions, classes, palette)
  console.print(f'written to {out}', highlight=False, soft_wrap=True)


def from_run(flags, mesh, classes) -> tuple[Any, Any, dict]:
  """The network of the configuration with the weights of a checkpoint."""
  config = flags.config.model
  model = rj.create_segmentor(config)
  placed = jax.tree.map(
    lambda x: x.update(sharding=sharding.replicated(mesh)),
    variable_shapes(model),
  )
  variables, step, about = checkpoints.restore_variables(
    flags.workdir, flags.checkpoint, placed
  )
  console.print(f'checkpoint {step} of {flags.workdir}', highlight=False)
  checkpoints.check_classes(about, classes)
  if about['dilation_rule'] != config.dilation_rule:
    raise UserError(
      f'the checkpoint was trained with model.dilation_rule '
      f'{about["dilation_rule"]!r}, the configuration has '
      f'{config.dilation_rule!r}, with which its weights give wrong '
      f'results. Add --config.model.dilation_rule={about["dilation_rule"]}.'
    )
  path = str(checkpoints.checkpoint_dir(flags.workdir) / str(step))
  found = {'checkpoint': path, 'step': step, 'model': config.to_dict()}
  return model, variables, found


def from_weights(source: str, config) -> tuple[Any, Any, dict]:
  """The network that a weight file describes; the row gives data and dtype."""
  model, variables, weights = load_segmentor(source, config.model.dtype)
  theirs = weights.description.config
  if theirs['num_classes'] != config.model.num_classes:
    raise UserError(
      f'{source} has {theirs["num_classes"]} classes, {config.name} has '
      f'{config.model.num_classes}; choose the --config of its data set.'
    )
  console.print(
    f'{theirs["head"]} on {theirs["backbone"]}, dilation rule '
    f'{theirs["dilation_rule"]}, from {source}',
    highlight=False,
  )
  where = {key: weights.provenance[key] for key in ('file', 'sha256')}
  return model, variables, {'checkpoint': source, 'model': theirs, **where}


def previous_pictures(out: Path, result: dict) -> list[Path]:
  """The pictures of an earlier evaluation of the same, to be replaced.

  Raises:
    UserError: `out` holds something else.
  """
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return []
  try:
    old = json.loads((out / 'metrics.json').read_text('utf-8'))
    asked = json.loads(json.dumps(result))  # JSON has no tuples.
    same = all(old[key] == value for key, value in asked.items())
  except (OSError, ValueError, KeyError, TypeError):
    same = False
  if not same:
    raise UserError(
      f'{out} is there and is not an earlier result of checkpoint '
      f'{result["checkpoint"]} on {result["data"]["split"]}; nothing was '
      'evaluated. Give another --out, or remove it.'
    )
  return [out / name for name in old.get('overlays', [])]


def describe(
  config,
  evaluation: inference.Evaluation,
  interval: Interval,
  outlines: BoundaryScores | None,
  batch_size: int,
  classes,
) -> dict:
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
    'protocol': {
      'name': 'whole',
      'image_scale': list(config.data.image_scale),
      'bucket': config.eval.bucket,
    },
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
    'seconds': round(evaluation.seconds, 3),
    'devices': runtime.describe_devices(),
    'versions': runtime.versions(),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'per_class': per_class,
  }


def number(value: float) -> float | None:
  """JSON has no NaN: undefined scores are null."""
  return None if math.isnan(value) else float(value)


def write_json(path: Path, content: dict) -> None:
  """Writes the whole file or nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(content, indent=2) + '\n', 'utf-8')
  os.replace(temporary, path)


def print_table(
  evaluation: inference.Evaluation,
  interval: Interval,
  outlines: BoundaryScores | None,
  classes,
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
  console.print(f'{evaluation.num_images} images, {speed:.3g} images/s')


def percent(value: float) -> str:
  """Two decimals, as results tables have them."""
  return '-' if math.isnan(value) else f'{100 * value:.2f}'


def draw(out: Path, split, predictions, classes, palette) -> None:
  """Overlays one by one, and all samples with their errors on one sheet."""
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


if __name__ == '__main__':
  run(main)
