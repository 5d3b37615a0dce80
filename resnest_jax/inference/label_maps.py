"""From logits to label maps and counts, in tiles of rows.

All steps between the logits and the scores at the original size are linear
along each axis, so that one matrix for each axis does all of them. Tiles of
rows need no others: only label maps and counts leave the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from resnest_jax.inference import exponentials
from resnest_jax.inference.exponentials import Exponentials
from resnest_jax.labels import IGNORE
from resnest_jax.models import implementations, layers

# An image of 3000 x 4000 pixels and 150 classes would need 7.2 GB in one piece.
TILE_BYTES = 64 * 2**20


class View(NamedTuple):
  """Logits, and how they become scores at the original size (Hl, Wl)."""

  logits: jax.Array  # float (B, h, w, C).
  # Weights in each row of the result, arbitrary beyond an image's true size.
  rows: jax.Array  # (B, Hl, h)
  columns: jax.Array  # (B, Wl, w), likewise.

  @property
  def canvas(self) -> tuple[int, int]:
    return self.rows.shape[1], self.columns.shape[1]

  def scores(self) -> jax.Array:
    """(B, rows, C, columns)."""
    x = layers.einsum('bth,bhwc->btwc', self.rows, self.logits)
    return layers.einsum('bxw,btwc->btcx', self.columns, x)


Views = Sequence[View] | Sequence[Exponentials]
# (scores (B, rows, C, columns), classes, label (B, rows, columns)) -> (B, rows,
# ...), of the rows of a tile.
Measure = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def logits_size(
  size: jax.Array, canvas: tuple[int, int], logits_canvas: tuple[int, int]
) -> jax.Array:
  """The valid size of logits, ceil(size / stride), int (..., 2)."""
  # The network halves with round-up k times: one such division by 2^k.
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
  align_corners: bool = False,
) -> View:
  """Two bilinear resizes: to the network's input, then to the original size.

  Sizes are int (B, 2), true heights and widths; canvases are padded ones. Only
  the first resize may align corners, as images are resized without.
  """
  # bfloat16 ends here: neighbouring scores would round to equal ones.
  logits = logits.astype(layers.at_least_float32(logits.dtype))
  valid = logits_size(size, canvas, logits.shape[1:3])
  dtype, matrices = logits.dtype, []
  for axis in (0, 1):
    middle = size[:, axis]
    # mmsegmentation interpolates twice, and one interpolation gives other
    # labels.
    outputs = jnp.arange(label_canvas[axis]), label_size[:, axis]
    low, high, weight = layers.resize_taps(*outputs, middle, dtype)
    lengths = middle, valid[:, axis], logits.shape[1 + axis]
    first, second = (
      layers.resize_rows(places, *lengths, dtype, align_corners)
      for places in (low, high)
    )
    weight = weight[..., None]
    matrices.append((1 - weight) * first + weight * second)
  return View(logits, *matrices)


def class_scores(views: Views) -> jax.Array:
  """(B, rows, C, columns): logits of a view, mean probabilities of several.

  Of `Exponentials` their sums, up to a factor of each pixel. CPUs compute it in
  this order several times as fast as with classes last.
  """
  if isinstance(views[0], Exponentials):
    return exponentials.summed(views)
  # The largest logit has the largest probability: one view needs no softmax.
  if len(views) == 1:
    return views[0].scores()
  return sum(jax.nn.softmax(view.scores(), 2) for view in views) / len(views)


def tempered(logits: jax.Array, temperature: float) -> jax.Array:
  """The logits whose softmax are the probabilities at a temperature."""
  # 1 leaves no trace in a program.
  return logits if temperature == 1 else logits / temperature


def probabilities(
  views: Views, largest: bool = False, temperature: float = 1.0
) -> jax.Array:
  """(B, Hl, C, Wl), the scores that decide, of sum 1; or each largest one."""

  def visit(scores, _):
    if isinstance(views[0], Exponentials):
      scores = scores / scores.sum(2, keepdims=True)
    elif len(views) == 1:
      scores = jax.nn.softmax(tempered(scores, temperature), 2)
    return scores.max(2) if largest else scores, None

  return _over_tiles(visit, views, TILE_BYTES)[0]


def label_maps(
  views: Views,
  label_size: jax.Array,
  tile_bytes: int = TILE_BYTES,
  label: jax.Array | None = None,
  measure: Measure | None = None,
) -> Any:
  """Classes at the original size, uint8 (B, Hl, Wl), 255 outside the images.

  With `label`, uint8 of that shape, and a single view also the sum of the cross
  entropy over the labelled pixels of each image, (B,), and then what `measure`
  gives of all rows, (B, Hl, ...).
  """

  def visit(scores, label):
    classes = _classes(scores)
    measured = [measure(scores, classes, label)] if measure else []
    loss = None if label is None else _cross_entropy(scores, label)
    return (classes, *measured), loss

  (maps, *measured), losses = _over_tiles(visit, views, tile_bytes, label)
  inside = layers.true_pixels(label_size, views[0].canvas)[..., 0]
  maps = jnp.where(inside, maps, jnp.uint8(IGNORE))
  return maps if label is None else (maps, losses.sum(0), *measured)


def _over_tiles(
  visit: Callable[..., tuple[Any, Any]],
  views: Views,
  tile_bytes: int,
  label: jax.Array | None = None,
) -> tuple[Any, Any]:
  """Calls `visit` with the scores of one tile of rows after the other.

  It also gets the tile's label, and returns arrays (B, rows, ...) and anything.
  Gives (B, Hl, ...), and the latter of all tiles, stacked.
  """
  batch, height = len(views[0].logits), views[0].canvas[0]
  row_bytes = _row_numbers(views) * batch * views[0].logits.dtype.itemsize
  tile_rows = rows_in_a_tile(row_bytes, height, tile_bytes)
  tiles = -(-height // tile_rows)

  def in_tiles(rows, fill=0):  # (B, Hl, ...) -> (tiles, B, tile_rows, ...)
    beyond = (rows.ndim - 2) * [(0, 0)]
    beyond = (0, 0), (0, tiles * tile_rows - height), *beyond
    rows = jnp.pad(rows, beyond, constant_values=fill)
    rows = rows.reshape(batch, tiles, tile_rows, *rows.shape[2:])
    return rows.swapaxes(0, 1)

  def of_tile(tile):
    rows_of_views, label = tile
    pairs = zip(views, rows_of_views, strict=True)
    scores = class_scores([view._replace(rows=rows) for view, rows in pairs])
    return visit(scores, label)

  labels = None if label is None else in_tiles(label, IGNORE)
  tiled = jax.tree.map(in_tiles, [view.rows for view in views]), labels
  found, others = jax.lax.map(of_tile, tiled)

  def joined(x):  # (tiles, B, tile_rows, ...) -> (B, Hl, ...)
    return x.swapaxes(0, 1).reshape(batch, -1, *x.shape[3:])[:, :height]

  return jax.tree.map(joined, found), others


def rows_in_a_tile(
  row_bytes: int, height: int, tile_bytes: int = TILE_BYTES
) -> int:
  return min(max(tile_bytes // row_bytes, 1), height)


def _row_numbers(views: Views) -> int:
  """How many numbers `class_scores` holds for a row of an image, about."""
  if isinstance(views[0], Exponentials):
    return max(view.numbers for view in views)
  # All views may be in memory together, and one before its softmax.
  copies = 1 if len(views) == 1 else len(views) + 2
  width, classes = views[0].canvas[1], views[0].logits.shape[3]
  widest = max(width, *(view.logits.shape[2] for view in views))
  return copies * widest * classes


def _classes(scores: jax.Array) -> jax.Array:
  # Of equal scores the lowest class wins, as in NumPy and PyTorch.
  if implementations.chosen('argmax') == 'reduction':
    return jnp.argmax(scores, axis=2).astype(jnp.uint8)

  def compare(index, found):
    best, classes = found
    score = jax.lax.dynamic_index_in_dim(scores, index, 2, keepdims=False)
    is_better = score > best
    classes = jnp.where(is_better, index.astype(jnp.uint8), classes)
    return jnp.where(is_better, score, best), classes

  first = scores[:, :, 0], jnp.zeros_like(scores[:, :, 0], jnp.uint8)
  return jax.lax.fori_loop(1, scores.shape[2], compare, first)[1]


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
  classes = jnp.arange(logits.shape[2])
  # No gather: a comparison fuses. It holds nowhere for a pixel to ignore.
  is_own = label[:, :, None] == classes[:, None]
  own = jnp.where(is_own, logits, 0).sum(2)
  loss = jax.nn.logsumexp(logits, axis=2) - own
  return jnp.where(label < len(classes), loss, 0).sum((1, 2))


def count_confusion(
  prediction: jax.Array, label: jax.Array, num_classes: int
) -> jax.Array:
  """Counts pixels of uint8 (B, H, W): int32 (B, C, C), rows = ground truth."""
  label, prediction = label.astype(jnp.int32), prediction.astype(jnp.int32)
  bins = num_classes**2
  # A device cannot raise: pixels whose label is not a class fall into an extra
  # bin, which is dropped, and `evaluate` finds them missing.
  counted = (label < num_classes) & (prediction < num_classes)
  index = jnp.where(counted, label * num_classes + prediction, bins)

  def count(index):
    return jnp.zeros(bins + 1, jnp.int32).at[index.ravel()].add(1)[:bins]

  return jax.vmap(count)(index).reshape(-1, num_classes, num_classes)


def split_batch(function: Callable, mesh: Mesh | None, *specs: P) -> Callable:
  """Runs the function on each device, with the images that the device holds."""
  if mesh is None:
    return function
  # The partitioner would gather the batch, say for XLA's grouped convolution.
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=specs,
    out_specs=P('data'),
    axis_names={'data'},
    check_vma=False,
  )


def compiled(
  function: Callable, mesh: Mesh | None, static: int = 0
) -> Callable:
  """Jits `split_batch`; the first `static` arguments are no arrays."""

  @functools.partial(jax.jit, static_argnums=range(static))
  def run(*arguments):
    stage = functools.partial(function, *arguments[:static])
    arrays = arguments[static:]
    return split_batch(stage, mesh, *len(arrays) * [P('data')])(*arrays)

  return run
