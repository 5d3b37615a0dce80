"""The evaluation of a split: from a checkpoint to scores and pictures."""

import collections
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console
from jax.sharding import Mesh
from ml_collections import ConfigDict

import resnest_jax as rj
from resnest_jax import hosts
from resnest_jax.config import fit_num_classes
from resnest_jax.data.datasets import open_data
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.errors import UserError
from resnest_jax.evaluation import inference, metrics, results, visualize
from resnest_jax.evaluation.bootstrap import miou_interval
from resnest_jax.evaluation.boundary import BoundaryIoU
from resnest_jax.evaluation.extremes import Extremes
from resnest_jax.evaluation.progress import compile_notice, evaluation_progress
from resnest_jax.evaluation.protocols import make_protocol
from resnest_jax.evaluation.report import images as report_images
from resnest_jax.evaluation.report import page
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.layers import at_least_float32
from resnest_jax.training import checkpoints, sharding
from resnest_jax.weights.infer import title_of
from resnest_jax.weights.pretrained import load_segmentor


def evaluate_split(
  config: ConfigDict,
  *,
  workdir: Path | None = None,
  checkpoint: str = 'latest',
  weights: str | None = None,
  split_name: str | None = None,
  out: Path | None = None,
) -> None:
  """Evaluates a network on every image of a split; prints and writes scores.

  Where `jax.distributed` has connected several processes, all have to call it:
  each evaluates its share of the images, and the first one prints and writes.

  Args:
    config: says which data, and the network of `workdir`.
    workdir: of a run, one of whose checkpoints is evaluated; or
    weights: any source of weights (docs/weights.md), with `out`.
    checkpoint: of a workdir: 'latest', 'best' or a step.
    split_name: of the data set; None: `config.data.eval_split`.
    out: folder for the results; None: WORKDIR/eval/STEP-SPLIT, and the
      protocol's name if it is not `whole`.

  Raises:
    UserError: data or weights cannot be used, or `out` holds something else.
  """
  # The data, the network, and the weights of the checkpoint.
  console = rich.console.Console(quiet=not hosts.is_first())
  split_name = split_name or config.data.eval_split
  split = open_data(config.data, split_name)
  classes, palette = split.labels.classes, split.labels.palette
  fit_num_classes(config, len(classes))
  protocol = make_protocol(config)
  mesh = sharding.local_mesh()
  if weights:
    model, variables, found = from_weights(weights, checkpoint, config, classes)
    theirs = found['model']
    about = (
      f'{theirs["head"]} on {title_of(theirs)}, dilation rule '
      f'{theirs["dilation_rule"]}, from {weights}'
    )
  else:
    model, variables, found = from_run(
      workdir, checkpoint, config, mesh, classes
    )
    about = f'checkpoint {found["step"]} of {workdir}'
  console.print(about, highlight=False)
  result = {
    'config': config.name,
    **found,  # The model with its dilation rule, too.
    'data': {'name': config.data.name, 'split': split_name},
    'protocol': protocol.describe(),
  }
  if out is None:
    named = '' if protocol.name == 'whole' else f'-{protocol.name}'
    out = workdir / 'eval' / f'{found["step"]}-{split_name}{named}'
  replaced = hosts.gather(
    lambda: hosts.is_first() and results.previous_pictures(out, result)
  )[0]

  # Every image once; the predictions of some are kept to be drawn.
  batch_size = inference.divisible_batch_size(config.eval.batch_size, mesh)
  batches = make_eval_iterator(
    config.data,
    split,
    batch_size=batch_size,
    bucket=config.eval.bucket,
    keep_size=protocol.keep_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  drawn = visualize.spread(len(split), config.eval.overlays)
  predictions = {}
  extremes = Extremes(config.eval.report_images)
  boundary = BoundaryIoU(len(classes)) if config.eval.boundary_iou else None

  def look(image: inference.ImageResult) -> None:
    if image.index in drawn:
      predictions[image.index] = image.prediction.copy()
    if extremes.number:
      counts = metrics.intersection_and_union(image.confusion)
      extremes.add(image.index, page.own_score(counts), image.prediction)
    if boundary:
      boundary.add(image.prediction, image.label)

  with (
    contextlib.closing(batches),
    evaluation_progress() as progress,
    boundary or contextlib.nullcontext(),
  ):
    eval_step = inference.make_eval_step(
      model,
      len(classes),
      protocol=protocol,
      mesh=mesh,
      dtype=at_least_float32(config.model.dtype),
      on_compile=compile_notice(progress),
    )
    evaluation = inference.evaluate(
      eval_step,
      variables,
      batches,
      classes,
      len(split),
      progress=progress,
      on_image=look if drawn or boundary or extremes.number else None,
      fscore_beta=config.eval.fscore_beta,
    )
    if boundary:
      boundary.counts = sum(hosts.gather(boundary.total))
    outlines = boundary and boundary.scores()
  predictions = dict(collections.ChainMap(*hosts.gather(lambda: predictions)))
  extremes = Extremes.joined(hosts.gather(lambda: extremes))

  # What came out, on the console and in files.
  if not hosts.is_first():
    return
  interval = miou_interval(evaluation.image_counts)
  results.print_table(console, evaluation, interval, outlines, classes)
  result |= results.describe(
    config,
    evaluation,
    interval,
    outlines,
    batch_size * jax.process_count(),
    classes,
  )
  names = {index: split[index]['name'] for index in sorted(predictions)}
  result['overlays'] = [f'overlays/{name}.png' for name in names.values()]
  pictures = report_images.make_pictures(extremes, split, classes, palette)
  result['report'] = page.NAME
  result['report_images'] = {
    kind: [{'name': x.name, 'mIoU': x.score} for x in shown]
    for kind, shown in pictures.items()
  }
  results.write_json(out / 'metrics.json', result)
  for path in replaced:
    path.unlink(missing_ok=True)
  if predictions:
    results.draw(out, split, predictions, classes, palette)
  page.write(
    out / page.NAME,
    result,
    evaluation.confusion,
    evaluation.image_counts,
    pictures,
    palette,
  )
  console.print(f'written to {out}', highlight=False, soft_wrap=True)
  console.print(
    f'report: {out / page.NAME}',
    highlight=False,
    soft_wrap=True,
    markup=False,
  )


def from_run(
  workdir: Path,
  checkpoint: str,
  config: ConfigDict,
  mesh: Mesh,
  classes: Sequence[str],
) -> tuple[Any, Any, dict[str, Any]]:
  """The network of the configuration with the weights of a checkpoint.

  Returns:
    The `Segmentor`, its variables on the mesh, and where they are from.
  """
  model = rj.create_segmentor(config.model)
  placed = jax.tree.map(
    lambda x: x.update(sharding=sharding.replicated(mesh)),
    variable_shapes(model),
  )
  variables, step, about = checkpoints.restore_variables(
    workdir, checkpoint, placed
  )
  checkpoints.check_classes(about, classes)
  rule = config.model.dilation_rule
  if about['dilation_rule'] != rule:
    raise UserError(
      f'the checkpoint was trained with model.dilation_rule '
      f'{about["dilation_rule"]!r}, the configuration has '
      f'{rule!r}, with which its weights give wrong '
      f'results. Add --config.model.dilation_rule={about["dilation_rule"]}.'
    )
  stride = config.model.output_stride
  trained = about.get('config', {}).get('model', {}).get('output_stride')
  if trained not in (None, stride) and hosts.is_first():
    print(f'note: trained at output stride {trained}, not {stride}', flush=True)
  folder = checkpoints.checkpoint_dir(workdir.resolve())
  found = {
    'checkpoint': str(folder / str(step)),
    'step': step,
    'model': config.model.to_dict(),
  }
  return model, variables, found


def from_weights(
  source: str, checkpoint: str, config: ConfigDict, classes: Sequence[str]
) -> tuple[Any, Any, dict[str, Any]]:
  """The network that the weights describe; the row gives data and dtype.

  Returns:
    The `Segmentor`, its variables, and where they are from.
  """
  model, variables, weights = load_segmentor(
    source, checkpoint, config.model.dtype
  )
  theirs = weights.description.config
  if theirs['num_classes'] != config.model.num_classes:
    raise UserError(
      f'{source} has {theirs["num_classes"]} classes, {config.name} has '
      f'{config.model.num_classes}; choose the --config of its data set.'
    )
  found = weights.provenance
  keys = [key for key in ('file', 'sha256', 'step') if key in found]
  if 'step' in found:  # Of a run. Others spell the names as they like.
    checkpoints.check_classes({'classes': weights.classes}, classes)
  where = {key: found[key] for key in keys}
  return model, variables, {'checkpoint': source, 'model': theirs, **where}
