"""From logits to label maps and counts, in tiles of rows.

Every protocol ends here. What lies between the network's logits and scores at
the original size is linear along each axis: upsampling to the network's input,
averaging windows, resizing to the original size, mirroring. So one matrix an
axis does all of it, and a few rows of the result can be computed without the
others: floats of the size (B, height, width, classes) never exist, and only
label maps and counts leave the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from resnest_jax.labels import IGNORE
from resnest_jax.models.layers import resize_rows, resize_taps

# Upper bound of one tile's logits at the original resolution, per device.
TILE_BYTES = 64 * 2**20


class View(NamedTuple):
  """Logits, and how they become scores at the original size.

  Attributes:
    logits: float (B, h, w, C).
    rows: (B, Hl, h), the weights of the logits' rows in each row of the result
      (meaningless beyond its true size).
    columns: (B, Wl, w), likewise.
  """

  logits: jax.Array
  rows: jax.Array
  columns: jax.Array


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


def resized_view(
  logits: jax.Array,
  size: jax.Array,
  canvas: tuple[int, int],
  label_size: jax.Array,
  label_canvas: tuple[int, int],
) -> View:
  """Two bilinear resizes: to the network's input, then to the original size.

  Args:
    logits: (B, h, w, C), valid in ceil(size / stride).
    size: int (B, 2), height and width of the network's input, in pixels.
    canvas: the padded height and width of that input.
    label_size: int (B, 2), height and width of the original image.
    label_canvas: the padded height and width of the result.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  valid = logits_size(size, canvas, logits.shape[1:3])
  matrices = []
  for axis in (0, 1):
    sizes = label_size[:, axis], size[:, axis], valid[:, axis]
    lengths = label_canvas[axis], logits.shape[1 + axis]
    matrices.append(two_resizes(*sizes, *lengths, logits.dtype))
  return View(logits, *matrices)


def two_resizes(
  out_size: jax.Array,
  middle_size: jax.Array,
  in_size: jax.Array,
  out_length: int,
  in_length: int,
  dtype: Any,
) -> jax.Array:
  """Two bilinear interpolations along an axis, one after the other, as one.

  Args:
    out_size: int (B,), true number of outputs.
    middle_size: int (B,), after the first.
    in_size: int (B,), true number of inputs.
    out_length: padded number of outputs.
    in_length: padded number of inputs.
    dtype: of the weights.

  Returns:
    (B, out_length, in_length). Rows beyond `out_size` are meaningless.
  """
  low, high, weight = resize_taps(
    jnp.arange(out_length), out_size, middle_size, dtype
  )
  first, second = (
    resize_rows(places, middle_size, in_size, in_length, dtype)
    for places in (low, high)
  )
  weight = weight[..., None]
  return (1 - weight) * first + weight * second


def class_scores(views: Sequence[View]) -> jax.Array:
  """(B, rows, columns, C): logits of one view, mean probabilities of several.

  The rows are those of the views' `rows`; a tile of them gives a tile.
  """
  dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

  def resized(view):
    x = dot('bth,bhwc->btwc', view.rows, view.logits)
    return dot('bxw,btwc->btxc', view.columns, x)

  if len(views) == 1:
    return resized(views[0])
  return sum(jax.nn.softmax(resized(view)) for view in views) / len(views)


def label_maps(
  views: Sequence[View], label_size: jax.Array, tile_bytes: int = TILE_BYTES
) -> jax.Array:
  """Classes at the original resolution, without the scores at that size.

  Args:
    views: of the same images, C <= 255.
    label_size: int (B, 2), height and width of the original image.
    tile_bytes: how many bytes of scores may exist at the original resolution.

  Returns:
    uint8 (B, Hl, Wl): the class with the largest score, the lowest one of
    equals; 255 outside `label_size`.
  """
  batch, *_, num_classes = views[0].logits.shape
  height, width = views[0].rows.shape[1], views[0].columns.shape[1]
  # All views may be in memory together, and one before its softmax.
  widest = max(width, *(view.logits.shape[2] for view in views))
  copies = 1 if len(views) == 1 else len(views) + 2
  itemsize = views[0].logits.dtype.itemsize
  row_bytes = copies * batch * widest * num_classes * itemsize
  tile_rows = min(max(tile_bytes // row_bytes, 1), height)
  tiles = -(-height // tile_rows)

  def in_tiles(rows):  # (B, Hl, h) -> (tiles, B, tile_rows, h)
    rows = jnp.pad(rows, ((0, 0), (0, tiles * tile_rows - height), (0, 0)))
    return rows.reshape(batch, tiles, tile_rows, -1).swapaxes(0, 1)

  def classes_of(tile):
    parts = [
      view._replace(rows=rows) for view, rows in zip(views, tile, strict=True)
    ]
    return jnp.argmax(class_scores(parts), axis=-1).astype(jnp.uint8)

  maps = jax.lax.map(classes_of, [in_tiles(view.rows) for view in views])
  maps = maps.swapaxes(0, 1).reshape(batch, -1, width)[:, :height]
  inside = (jnp.arange(height)[:, None] < label_size[:, 0, None, None]) & (
    jnp.arange(width) < label_size[:, 1, None, None]
  )
  return jnp.where(inside, maps, jnp.uint8(IGNORE))


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


def split_batch(function: Callable, mesh: Mesh | None, *specs: P) -> Callable:
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
