"""Compiled steps from images of mixed sizes to label maps and counts, exactly.

Images share a few padded shapes. Their true sizes are data, so that a shape
compiles once and every valid pixel gets the logits of the unpadded image.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from resnest_jax.data import preprocess
from resnest_jax.inference.label_maps import (
  TILE_BYTES,
  Measure,
  compiled,
  count_confusion,
  label_maps,
  probabilities,
  split_batch,
  tempered,
)
from resnest_jax.inference.protocols import Protocol, make_views
from resnest_jax.labels import IGNORE
from resnest_jax.sharding import batch_sharding

# Classes of an image that an evaluation keeps, the most probable ones.
BEST = 5
# Instead of True: the probabilities of each pixel's own class alone.
LARGEST = 'largest'

Batch = dict[str, Any]
OnCompile = Callable[[int, int], None]
EvalStep = Callable[[Any, Batch], tuple[jax.Array, ...]]


class Views(NamedTuple):
  """A protocol with its network, compiled; see `make_views`."""

  forward: Callable  # (variables, images, sizes) -> logits, jitted.
  look: Callable
  build: Callable
  place: Callable


def compile_views(
  model: Any,
  num_classes: int,
  protocol: Protocol | None,
  mesh: Mesh | None,
  dtype: Any,
  on_compile: OnCompile,
) -> Views:
  """The part that `make_eval_step` and `make_predict_step` share."""
  if num_classes > IGNORE:
    raise ValueError(
      f'label maps are 8 bit with {IGNORE} for "no class", so at most '
      f'{IGNORE} classes fit; got {num_classes}'
    )

  protocol = protocol or Protocol()

  def forward(variables, image, size):
    images = preprocess.preprocess(
      image, size, dtype=dtype, normalization=protocol.normalization
    )
    logits = model.apply(variables, images, train=False, size=size).logits
    return _checked(logits, num_classes)

  place = _placing(mesh)
  specs = P(), P('data'), P('data')
  compiled_forward = jax.jit(split_batch(forward, mesh, *specs))
  network = _noticed(compiled_forward, on_compile)
  aligned = model.decode_head.align_corners
  look, build = make_views(protocol, network, place, mesh, aligned, dtype)
  return Views(compiled_forward, look, build, place)


def _checked(logits: jax.Array, num_classes: int) -> jax.Array:
  if logits.shape[-1] != num_classes:
    raise ValueError(
      f'the model has {logits.shape[-1]} classes, the labels {num_classes}'
    )
  return logits


def _placing(mesh: Mesh | None) -> Callable:
  sharding = None if mesh is None else batch_sharding(mesh)
  return functools.partial(jax.device_put, device=sharding)


def _noticed(function: Callable, on_compile: OnCompile) -> Callable:
  """Calls `on_compile` before each new shape of images, (B, H, W, 3)."""
  # JAX calls nobody before it compiles, so new shapes are noticed here.
  shapes = set()

  def call(variables, image, *more):
    if image.shape not in shapes:
      shapes.add(image.shape)
      on_compile(*image.shape[1:3])
    return function(variables, image, *more)

  return call


def run_ahead(
  run: Callable[[Batch], Any], batches: Iterable[Batch]
) -> Iterator[tuple[Batch, Any]]:
  """Yields each batch and what `run` makes of it, in the order of the batches.

  A batch is dispatched before the results of the previous one are awaited: the
  device computes meanwhile.
  """
  pending = None
  # None makes room for the last results.
  for batch in itertools.chain(batches, [None]):
    started = batch and (batch, run(batch))
    if pending:
      yield pending
    pending = started


def filled(batch: Batch) -> Iterator[tuple[int, int]]:
  """Slots of a batch that hold an image, and its index."""
  slots = enumerate(batch['index'])
  return ((slot, int(index)) for slot, index in slots if index >= 0)


def make_class_step(
  model: Any,
  num_classes: int,
  *,
  normalization: preprocess.Normalization = preprocess.IMAGENET,
  mesh: Mesh | None = None,
  dtype: Any = jnp.float32,
  on_compile: OnCompile = lambda height, width: None,
  measure: Measure | None = None,
  temperature: float = 1.0,
) -> EvalStep:
  """A classifier, compiled; arguments as of `make_eval_step`.

  Returns:
    step(variables, batch) -> the `BEST` most probable classes int32 (B, k), in
    order; all probabilities (B, C); the cross entropy (B,), which means nothing
    where there is no label; and what `measure` gives of one pixel, (B, 1, ...).
    `label` is int32 (B,).
  """

  def forward(variables, image, size, label):
    images = preprocess.preprocess(
      image, size, dtype=dtype, normalization=normalization
    )
    logits = model.apply(variables, images, train=False)
    logits = _checked(logits, num_classes)
    logs = jax.nn.log_softmax(tempered(logits, temperature))
    _, best = jax.lax.top_k(logits, min(BEST, num_classes))
    loss = -jnp.take_along_axis(logs, label[:, None], 1)[:, 0]
    pixel = logits[:, None, :, None], best[:, None, :1], label[:, None, None]
    more = [measure(*pixel)] if measure else []
    return best, jnp.exp(logs), loss, *more

  specs = P(), *3 * [P('data')]
  network = _noticed(jax.jit(split_batch(forward, mesh, *specs)), on_compile)
  place = _placing(mesh)

  def step(variables, batch):
    arrays = (batch[key] for key in ('image', 'size', 'label'))
    return network(variables, *place(tuple(arrays)))

  return step


def make_eval_step(
  model: Any,
  num_classes: int,
  *,
  protocol: Protocol | None = None,
  mesh: Mesh | None = None,
  dtype: Any = jnp.float32,
  tile_bytes: int = TILE_BYTES,
  on_compile: OnCompile = lambda height, width: None,
  with_loss: bool = False,
  measure: Measure | None = None,
) -> EvalStep:
  """A protocol, compiled.

  Args:
    model: a `Segmentor` of `num_classes` C, at most 255.
    protocol: None: the whole image.
    mesh: devices that share the images of a batch; None: the default one.
    dtype: of the normalised images; float64 for comparisons.
    on_compile: called with a padded height and width before a compilation.
    with_loss: only for a protocol of a single view.
    measure: likewise.

  Returns:
    eval_step(variables, batch of `make_eval_iterator`) -> label maps uint8 (B,
    Hl, Wl), 255 outside the true size, counts int32 (B, C, C), with `with_loss`
    or `measure` the cross entropy (B,), summed over the labelled pixels, and
    what the latter gives, (B, Hl, ...).
  """
  _, look, build, place = compile_views(
    model, num_classes, protocol, mesh, dtype, on_compile
  )
  how = tile_bytes, with_loss, measure
  compiled_finish = make_finish(build, num_classes, mesh, *how)

  def eval_step(variables, batch):
    layout, arrays = look(variables, batch)
    labels = place((batch['label'], batch['label_size']))
    return compiled_finish(layout, arrays, *labels)

  return eval_step


def make_finish(
  build: Callable,
  num_classes: int,
  mesh: Mesh | None,
  tile_bytes: int = TILE_BYTES,
  with_loss: bool = False,
  measure: Measure | None = None,
) -> Callable:
  """The rest of an `EvalStep` after `look` of `make_views`, jitted."""
  labelled = with_loss or measure is not None

  def finish(layout, arrays, label, label_size):
    views = build(layout, arrays, label_size, label.shape[1:3])
    compared = label if labelled else None
    maps = label_maps(views, label_size, tile_bytes, compared, measure)
    maps, *more = maps if labelled else (maps,)
    return maps, count_confusion(maps, label, num_classes), *more

  return compiled(finish, mesh, 1)


def make_predict_step(
  model: Any,
  num_classes: int,
  *,
  protocol: Protocol | None = None,
  mesh: Mesh | None = None,
  on_compile: OnCompile = lambda height, width: None,
  temperature: float = 1.0,
) -> Callable[[Any, Batch, bool | str], tuple[jax.Array, jax.Array | None]]:
  """As `make_eval_step`, for images without ground truth.

  The step is (variables, batch, with_probabilities) -> label maps, and None or
  probabilities float32 (B, Hl, Wl, C); with `LARGEST` for True, (B, Hl, Wl).
  The `temperature` is that of a protocol of a single view.
  """
  _, look, build, place = compile_views(
    model, num_classes, protocol, mesh, jnp.float32, on_compile
  )

  def finish(layout, canvas, with_probabilities, arrays, label_size):
    views = build(layout, arrays, label_size, canvas)
    maps = label_maps(views, label_size)
    if not with_probabilities:
      return maps, None
    largest = with_probabilities == LARGEST
    found = probabilities(views, largest, temperature).astype(jnp.float32)
    return maps, found if largest else found.swapaxes(2, 3)

  compiled_finish = compiled(finish, mesh, 3)

  def predict_step(variables, batch, with_probabilities=False):
    layout, arrays = look(variables, batch)
    canvas = batch['label'].shape[1:3]
    size = place(batch['label_size'])
    return compiled_finish(layout, canvas, with_probabilities, arrays, size)

  return predict_step
