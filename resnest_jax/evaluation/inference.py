"""From images of mixed sizes to label maps and counts, exactly.

Images share a few padded shapes (buckets). Their true sizes are data, not
shapes, so a bucket compiles once, and every valid pixel gets the logits of the
unpadded run. The final stage, from logits to classes at the original size,
runs in row tiles (`final_stage`). What happens before, whether the image is
seen whole, in windows or at several scales, is the protocol (`protocols`).
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resnest_jax import hosts
from resnest_jax.data import device
from resnest_jax.data.labels import IGNORE
from resnest_jax.errors import UserError
from resnest_jax.evaluation import metrics
from resnest_jax.evaluation.final_stage import (
  TILE_BYTES,
  class_scores,
  count_confusion,
  label_maps,
  split_batch,
)
from resnest_jax.evaluation.protocols import Protocol, make_views

Batch = dict[str, Any]
EvalStep = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


# --- On the device -----------------------------------------------------------


class Views(NamedTuple):
  """A protocol with its network, compiled; see `make_views`.

  `forward(variables, images, sizes)` is the network alone, a jitted function.
  """

  forward: Callable
  look: Callable
  build: Callable
  place: Callable


def compile_views(
  model: Any,
  num_classes: int,
  protocol: Protocol | None,
  mesh: Mesh | None,
  dtype: Any,
  on_compile: Callable[[int, int], None],
) -> Views:
  """What `make_eval_step` and `make_predict_step` share; see there."""
  if num_classes > IGNORE:
    raise ValueError(
      f'label maps are 8 bit with {IGNORE} for "no class", so at most '
      f'{IGNORE} classes fit; got {num_classes}'
    )

  def forward(variables, image, size):
    images = device.preprocess(image, size, dtype=dtype)
    logits = model.apply(variables, images, train=False, size=size).logits
    if logits.shape[-1] != num_classes:
      raise ValueError(
        f'the model has {logits.shape[-1]} classes, the labels {num_classes}'
      )
    return logits

  def place(arrays):
    return jax.device_put(arrays, sharding)

  sharding = None if mesh is None else NamedSharding(mesh, P('data'))
  compiled_forward = jax.jit(
    split_batch(forward, mesh, P(), P('data'), P('data'))
  )
  compiled_shapes = set()

  def network(variables, image, size):
    if image.shape not in compiled_shapes:
      compiled_shapes.add(image.shape)
      on_compile(*image.shape[1:3])
    return compiled_forward(variables, image, size)

  look, build = make_views(protocol or Protocol(), network, place, mesh)
  return Views(compiled_forward, look, build, place)


def make_eval_step(
  model: Any,
  num_classes: int,
  *,
  protocol: Protocol | None = None,
  mesh: Mesh | None = None,
  dtype: Any = jnp.float32,
  tile_bytes: int = TILE_BYTES,
  on_compile: Callable[[int, int], None] = lambda height, width: None,
) -> EvalStep:
  """A protocol, compiled.

  Args:
    model: a segmentor; `apply(variables, images, train=False, size=size)`.
    num_classes: C, at most 255.
    protocol: None: the whole image.
    mesh: devices; the batch is split over its axis `data`, every device works
      on its own images and nothing is exchanged. None: the default device.
    dtype: of the normalised images; float64 for comparisons.
    tile_bytes: see `label_maps`; per device.
    on_compile: called with a new padded height and width in pixels, before the
      network is compiled for it, which may take minutes.

  Returns:
    eval_step(variables, batch) -> (label maps, counts): `batch` as the
    evaluation pipeline yields it, with NumPy arrays; label maps uint8
    (B, Hl, Wl) at the labels' padded size, 255 outside the true size; counts
    int32 (B, C, C). The network compiles once for each padded shape that it
    sees (in windows: for one in all), the final stage, which is quick to
    compile, for each pair of padded shapes of images and labels.
  """
  _, look, build, place = compile_views(
    model, num_classes, protocol, mesh, dtype, on_compile
  )

  compiled_finish = make_finish(build, num_classes, mesh, tile_bytes)

  def eval_step(variables, batch):
    if mesh is not None and len(batch['image']) % mesh.shape['data']:
      raise UserError(
        f'an evaluation batch of {len(batch["image"])} images cannot be split '
        f'over {mesh.shape["data"]} devices; set eval.batch_size to a multiple.'
      )
    layout, arrays = look(variables, batch)
    labels = place((batch['label'], batch['label_size']))
    return compiled_finish(layout, arrays, *labels)

  return eval_step


def make_finish(
  build: Callable,
  num_classes: int,
  mesh: Mesh | None,
  tile_bytes: int = TILE_BYTES,
) -> Callable:
  """What follows the network in an `EvalStep`, a jitted function.

  Returns:
    finish(layout, arrays, label, label_size) -> (label maps, counts); `layout`
    and `arrays` are those of `make_views`.
  """

  def finish(layout, arrays, label, label_size):
    views = build(layout, arrays, label_size, label.shape[1:3])
    maps = label_maps(views, label_size, tile_bytes)
    return maps, count_confusion(maps, label, num_classes)

  @functools.partial(jax.jit, static_argnums=0)
  def compiled_finish(layout, *arrays):
    stage = functools.partial(finish, layout)
    return split_batch(stage, mesh, *3 * [P('data')])(*arrays)

  return compiled_finish


def make_predict_step(
  model: Any,
  num_classes: int,
  *,
  protocol: Protocol | None = None,
  mesh: Mesh | None = None,
  on_compile: Callable[[int, int], None] = lambda height, width: None,
) -> Callable[[Any, Batch, bool], tuple[jax.Array, jax.Array | None]]:
  """As `make_eval_step`, where there is no ground truth.

  Returns:
    predict_step(variables, batch, probabilities) -> (label maps, probabilities
    of the classes or None): float32 (B, Hl, Wl, C), all in memory at once.
  """
  _, look, build, place = compile_views(
    model, num_classes, protocol, mesh, jnp.float32, on_compile
  )

  def finish(layout, canvas, probabilities, arrays, label_size):
    views = build(layout, arrays, label_size, canvas)
    maps = label_maps(views, label_size)
    if not probabilities:
      return maps, None
    mean = class_scores(views)
    mean = jax.nn.softmax(mean) if len(views) == 1 else mean
    return maps, mean.astype(jnp.float32)

  @functools.partial(jax.jit, static_argnums=(0, 1, 2))
  def compiled_finish(layout, canvas, probabilities, *arrays):
    stage = functools.partial(finish, layout, canvas, probabilities)
    return split_batch(stage, mesh, *2 * [P('data')])(*arrays)

  def predict_step(variables, batch, probabilities=False):
    layout, arrays = look(variables, batch)
    canvas = batch['label'].shape[1:3]
    size = place(batch['label_size'])
    return compiled_finish(layout, canvas, probabilities, arrays, size)

  return predict_step


# --- Over a data set ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageResult:
  """What came out for one image."""

  index: int  # Position in the split.
  name: str
  prediction: np.ndarray | None  # uint8 (H, W) at the original size, classes.
  label: np.ndarray  # uint8 (H, W), classes or 255.
  confusion: np.ndarray  # int64 (C, C), this image's counts.


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What came out for a data set."""

  confusion: np.ndarray  # int64 (C, C), rows = ground truth.
  scores: metrics.Scores
  num_images: int
  seconds: float  # Wall time, compilation included.
  # int64 (num_images, 2, C), by the images' position in the split: pixels in
  # both and in either of ground truth and prediction.
  image_counts: np.ndarray


def image_results(
  eval_step: EvalStep,
  variables: Any,
  batches: Iterable[Batch],
  with_predictions: bool = True,
) -> Iterator[ImageResult]:
  """Yields each image's result, in the order of the batches, without fillers.

  One batch is always on the device while the previous one is looked at and
  the next one is read. Without predictions label maps stay on the device.
  """

  def results(batch, maps, counts):
    counts = np.asarray(counts).astype(np.int64)
    maps = np.asarray(maps) if with_predictions else None
    for slot, index in enumerate(batch['index']):
      if index < 0:
        continue
      _check_counts(counts[slot], batch, slot)
      height, width = batch['label_size'][slot]
      prediction = maps[slot, :height, :width] if with_predictions else None
      label = batch['label'][slot, :height, :width]
      yield ImageResult(
        int(index), batch['name'][slot], prediction, label, counts[slot]
      )

  pending = None
  for batch in batches:
    outputs = eval_step(variables, batch)
    if pending is not None:
      yield from results(*pending)
    pending = (batch, *outputs)
  if pending is not None:
    yield from results(*pending)


def evaluate(
  eval_step: EvalStep,
  variables: Any,
  batches: Iterable[Batch],
  class_names: Sequence[str],
  num_images: int,
  *,
  progress: rich.progress.Progress | None = None,
  on_image: Callable[[ImageResult], None] | None = None,
  fscore_beta: float = 1.0,
) -> Evaluation:
  """Evaluates every image of a split once.

  Several processes each evaluate images of their own, on devices of their own,
  and add up the counts at the end; all have to call this.

  Args:
    eval_step: from `make_eval_step`.
    variables: the model's `params` and `batch_stats`, on the step's devices.
    batches: the evaluation pipeline's, filler slots marked by index -1; this
      process' share of the images, which may be none.
    class_names: C names.
    num_images: those of the split, which all processes' `batches` together
      have to hold.
    progress: a running display that gets a task 'evaluate'.
    on_image: called for every image of this process, in the order of the
      batches.
    fscore_beta: see `metrics.scores`.

  Returns:
    `Evaluation`, the same for every batch size and number of devices and
    processes, in all of them.

  Raises:
    UserError: a label is neither a class nor 255, or another process failed.
    RuntimeError: `batches` had an image twice, or not at all.
  """
  started = time.perf_counter()
  total = len(hosts.share(num_images))
  task = progress and progress.add_task('evaluate', total=total)

  def count_mine():
    confusion = np.zeros((len(class_names), len(class_names)), np.int64)
    counted = []
    for result in image_results(
      eval_step, variables, batches, with_predictions=on_image is not None
    ):
      counts = metrics.intersection_and_union(result.confusion)
      counted.append((result.index, result.name, counts))
      confusion += result.confusion
      if on_image is not None:
        on_image(result)
      if progress:
        progress.advance(task)
    return confusion, counted

  parts = hosts.gather(count_mine)
  confusion = sum(part for part, _ in parts)
  seen = {}
  for index, name, counts in itertools.chain(
    *(counted for _, counted in parts)
  ):
    if index in seen:
      raise RuntimeError(f'image {index} ({name}) came twice')
    seen[index] = counts
  if len(seen) != num_images:
    raise RuntimeError(
      f'the pipeline gave {len(seen)} images, the split has {num_images}'
    )
  image_counts = [seen[index] for index in sorted(seen)]
  return Evaluation(
    confusion,
    metrics.scores(confusion, class_names, fscore_beta),
    num_images,
    time.perf_counter() - started,
    np.reshape(image_counts, (num_images, 2, len(class_names))),
  )


def _check_counts(counts: np.ndarray, batch: Batch, slot: int) -> None:
  """Every pixel that has a label must have been counted."""
  label = batch['label'][slot]
  labelled = np.count_nonzero(label != IGNORE)
  if counts.sum() != labelled:
    raise UserError(
      f'{labelled - counts.sum()} of {labelled} labelled pixels of '
      f'{batch["name"][slot]} have no class: its labels go up to '
      f'{label[label != IGNORE].max()}; accepted are '
      f'0..{len(counts) - 1} and {IGNORE} (ignored). Prepare the data '
      'set again'
    )


def divisible_batch_size(batch_size: int, mesh: Mesh | None) -> int:
  """This process' share of a batch, rounded up to what its devices divide.

  Args:
    batch_size: images over all devices.
    mesh: this process' devices; None: one.
  """
  devices = 1 if mesh is None else mesh.shape['data']
  return -(-batch_size // (devices * jax.process_count())) * devices
