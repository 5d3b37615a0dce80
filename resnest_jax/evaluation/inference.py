"""From images of mixed sizes to label maps and counts, exactly.

Images share a few padded shapes (buckets). Their true sizes are data, not
shapes, so a bucket compiles once, and every valid pixel gets the logits of the
unpadded run. The final stage, from logits to classes at the original size,
runs in row tiles: floats of the size (B, height, width, classes) never exist,
and only label maps and counts leave the device.

Protocol `whole` (mmsegmentation's whole-image mode): the image is resized with
its ratio kept, its logits are resized to that size and then to the original
size, both bilinear with half-pixel centres, and the largest logit wins. The
two resizes are linear maps, so each axis needs one matrix, their product.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resnest_jax.data import device
from resnest_jax.errors import UserError
from resnest_jax.evaluation import metrics
from resnest_jax.models.layers import resize_matrix

# Upper bound of one tile's logits at the original resolution, per device.
TILE_BYTES = 64 * 2**20

Batch = dict[str, Any]
EvalStep = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


# --- On the device -----------------------------------------------------------


def logits_size(
  size: jax.Array, canvas: tuple[int, int], logits_canvas: tuple[int, int]
) -> jax.Array:
  """The valid size of logits, ceil(size / stride), int (..., 2).

  The stride is the power of two that leads from the padded image's shape to
  the padded logits' shape. (Halving with round-up k times is one division by
  2^k with round-up, so this holds for every size.)
  """
  for stride in (1, 2, 4, 8, 16, 32):
    if tuple(-(-length // stride) for length in canvas) == logits_canvas:
      return (size + stride - 1) // stride
  raise ValueError(
    f'logits of shape {logits_canvas} are no stride 1, 2, ... 32 of an image '
    f'of shape {canvas}'
  )


def label_maps(
  logits: jax.Array,
  size: jax.Array,
  canvas: tuple[int, int],
  label_size: jax.Array,
  label_canvas: tuple[int, int],
  tile_bytes: int = TILE_BYTES,
) -> jax.Array:
  """Classes at the original resolution, without the logits at that size.

  Args:
    logits: (B, h, w, C), valid in ceil(size / stride), C <= 255.
    size: int (B, 2), height and width of the network's input, in pixels.
    canvas: the padded height and width of that input.
    label_size: int (B, 2), height and width of the original image.
    label_canvas: the padded height and width of the result.
    tile_bytes: how many bytes of logits may exist at the original resolution.

  Returns:
    uint8 (B, *label_canvas): the class with the largest logit, the lowest one
    of equals; 255 outside `label_size`.
  """
  batch, height, width, num_classes = logits.shape
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  logits = logits.astype(dtype)
  valid = logits_size(size, canvas, (height, width))
  rows, columns = (
    _resize_twice(
      (label_size[:, axis], size[:, axis], valid[:, axis]),
      (label_canvas[axis], canvas[axis], logits.shape[1 + axis]),
      dtype,
    )
    for axis in (0, 1)
  )

  row_bytes = batch * label_canvas[1] * num_classes * dtype.itemsize
  tile_rows = min(max(tile_bytes // row_bytes, 1), label_canvas[0])
  tiles = -(-label_canvas[0] // tile_rows)
  rows = jnp.pad(rows, ((0, 0), (0, tiles * tile_rows - rows.shape[1]), (0, 0)))
  rows = rows.reshape(batch, tiles, tile_rows, height).swapaxes(0, 1)

  def classes_of(tile):  # (B, tile_rows, h) -> (B, tile_rows, Wl)
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    tile = dot('bth,bhwc->btwc', tile, logits)
    tile = dot('bxw,btwc->btxc', columns, tile)
    return jnp.argmax(tile, axis=-1).astype(jnp.uint8)

  maps = jax.lax.map(classes_of, rows).swapaxes(0, 1)
  maps = maps.reshape(batch, -1, label_canvas[1])[:, : label_canvas[0]]
  inside = (
    jnp.arange(label_canvas[0])[:, None] < label_size[:, 0, None, None]
  ) & (jnp.arange(label_canvas[1]) < label_size[:, 1, None, None])
  return jnp.where(inside, maps, jnp.uint8(metrics.IGNORE))


def _resize_twice(
  sizes: tuple[jax.Array, ...], lengths: tuple[int, ...], dtype: Any
) -> jax.Array:
  """(B, lengths[0], lengths[2]): bilinear to sizes[1], then to sizes[0].

  All three `sizes` are (B,) valid lengths, `lengths` the padded ones.
  """
  outer = resize_matrix(sizes[0], sizes[1], lengths[0], lengths[1], dtype)
  inner = resize_matrix(sizes[1], sizes[2], lengths[1], lengths[2], dtype)
  return jnp.matmul(outer, inner, precision=jax.lax.Precision.HIGHEST)


def count_confusion(
  prediction: jax.Array, label: jax.Array, num_classes: int
) -> jax.Array:
  """Counts pixels of each image by (ground truth, prediction).

  Args:
    prediction: uint8 (B, H, W), classes.
    label: uint8 (B, H, W), classes or 255.
    num_classes: C.

  Returns:
    int32 (B, C, C), rows = ground truth. A pixel whose label or prediction is
    not a class falls into an overflow bin that is thrown away; `evaluate`
    compares the counts with the number of labelled pixels, so that only
    labels of 255 can vanish.
  """
  label, prediction = label.astype(jnp.int32), prediction.astype(jnp.int32)
  bins = num_classes**2
  counted = (label < num_classes) & (prediction < num_classes)
  index = jnp.where(counted, label * num_classes + prediction, bins)

  def count(index):
    return jnp.zeros(bins + 1, jnp.int32).at[index.ravel()].add(1)[:bins]

  return jax.vmap(count)(index).reshape(-1, num_classes, num_classes)


def make_eval_step(
  model: Any,
  num_classes: int,
  *,
  mesh: Mesh | None = None,
  dtype: Any = jnp.float32,
  tile_bytes: int = TILE_BYTES,
  on_compile: Callable[[int, int], None] = lambda height, width: None,
) -> EvalStep:
  """The whole-image protocol, compiled.

  Args:
    model: a segmentor; `apply(variables, images, train=False, size=size)`.
    num_classes: C, at most 255.
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
    int32 (B, C, C). The network compiles once for each padded shape of
    images, the final stage, which is quick to compile, for each pair of padded
    shapes of images and labels.
  """
  if num_classes > metrics.IGNORE:
    raise ValueError(
      f'label maps are 8 bit with {metrics.IGNORE} for "no class", so at most '
      f'{metrics.IGNORE} classes fit; got {num_classes}'
    )

  def forward(variables, image, size):
    images = device.preprocess(image, size, dtype=dtype)
    logits = model.apply(variables, images, train=False, size=size).logits
    if logits.shape[-1] != num_classes:
      raise ValueError(
        f'the model has {logits.shape[-1]} classes, the labels {num_classes}'
      )
    return logits

  def finish(canvas, logits, size, label, label_size):
    maps = label_maps(
      logits, size, canvas, label_size, label.shape[1:3], tile_bytes
    )
    return maps, count_confusion(maps, label, num_classes)

  sharding = None if mesh is None else NamedSharding(mesh, P('data'))
  compiled_forward = jax.jit(
    _split_batch(forward, mesh, P(), P('data'), P('data'))
  )

  @functools.partial(jax.jit, static_argnums=0)
  def compiled_finish(canvas, *arrays):
    stage = functools.partial(finish, canvas)
    return _split_batch(stage, mesh, *4 * [P('data')])(*arrays)

  compiled_shapes = set()

  def eval_step(variables, batch):
    if mesh is not None and len(batch['image']) % mesh.shape['data']:
      raise UserError(
        f'an evaluation batch of {len(batch["image"])} images cannot be split '
        f'over {mesh.shape["data"]} devices; set eval.batch_size to a multiple.'
      )
    image, size, label, label_size = jax.device_put(
      [batch[name] for name in ('image', 'size', 'label', 'label_size')],
      sharding,
    )
    if image.shape not in compiled_shapes:
      compiled_shapes.add(image.shape)
      on_compile(*image.shape[1:3])
    logits = compiled_forward(variables, image, size)
    return compiled_finish(image.shape[1:3], logits, size, label, label_size)

  return eval_step


def _split_batch(function: Callable, mesh: Mesh | None, *specs: P) -> Callable:
  """Runs the function on each device with the images it holds.

  Not left to the partitioner: with the batch split by hand no operator of the
  network can gather it, and counting stays where the pixels are.
  """
  if mesh is None:
    return function
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=specs,
    out_specs=P('data'),
    axis_names={'data'},
    check_vma=False,
  )


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

  Args:
    eval_step: from `make_eval_step`.
    variables: the model's `params` and `batch_stats`, on the step's devices.
    batches: the evaluation pipeline's, filler slots marked by index -1.
    class_names: C names.
    num_images: how many images `batches` has to hold: those of the split.
    progress: a running display that gets a task 'evaluate'.
    on_image: called for every image, in the order of the batches.
    fscore_beta: see `metrics.scores`.

  Returns:
    `Evaluation`, the same for every batch size and number of devices.

  Raises:
    UserError: a label is neither a class nor 255.
    RuntimeError: `batches` had an image twice, or not at all.
  """
  started = time.perf_counter()
  confusion = np.zeros((len(class_names), len(class_names)), np.int64)
  seen = {}
  task = progress and progress.add_task('evaluate', total=num_images)
  for result in image_results(
    eval_step, variables, batches, with_predictions=on_image is not None
  ):
    if result.index in seen:
      raise RuntimeError(f'image {result.index} ({result.name}) came twice')
    seen[result.index] = metrics.intersection_and_union(result.confusion)
    confusion += result.confusion
    if on_image is not None:
      on_image(result)
    if progress:
      progress.advance(task)
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
  labelled = np.count_nonzero(label != metrics.IGNORE)
  if counts.sum() != labelled:
    raise UserError(
      f'{labelled - counts.sum()} of {labelled} labelled pixels of '
      f'{batch["name"][slot]} have no class: its labels go up to '
      f'{label[label != metrics.IGNORE].max()}; accepted are '
      f'0..{len(counts) - 1} and {metrics.IGNORE} (ignored). Prepare the data '
      'set again'
    )


def divisible_batch_size(batch_size: int, mesh: Mesh | None) -> int:
  """The next batch size that the mesh's `data` axis divides."""
  devices = 1 if mesh is None else mesh.shape['data']
  return -(-batch_size // devices) * devices
