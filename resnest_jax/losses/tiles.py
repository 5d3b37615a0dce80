"""Losses over tiles of rows, so that the upsampled logits never exist."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

from resnest_jax.labels import IGNORE
from resnest_jax.models import implementations
from resnest_jax.models.layers import (
  Array,
  at_least_float32,
  einsum,
  resize_matrix,
)


@struct.dataclass
class Logits:
  """Logits (B, h, w, classes), and how those of pixels are interpolated."""

  values: Array
  align_corners: bool = struct.field(pytree_node=False, default=False)


def exact(logits: Array | Logits) -> Logits:
  """Logits in the type of losses, at least float32."""
  logits = logits if isinstance(logits, Logits) else Logits(logits)
  return jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), logits)


def over_tiles(
  visit: Callable[..., tuple[Any, Any, Array | None]],
  logits: Logits,
  labels: Array,
  maps: Sequence[Array] = (),
  known: Sequence[Array] = (),
  *,
  with_gradient: bool = False,
) -> tuple[Any, Any, Logits | None]:
  """Calls `visit` with one tile of upsampled logits after the other.

  `visit` takes a tile's logits (rows, B, W, classes), its labels, its part of
  every map (rows, B, W), and what is `known` of each image (B, ...); rows
  beyond the last one have the label 255. It returns a tree of sums (B, ...),
  one of maps (rows, B, W), and the gradient at the tile's logits, or None.
  Returns the sums over all tiles, the maps (B, H, W), and the gradient at the
  logits.
  """
  run = partial(_over_tiles, visit, with_gradient=with_gradient)
  devices = jax.sharding.get_abstract_mesh().shape.get('spatial', 1)
  if devices == 1:
    return run(logits, labels, maps, known, 1)
  # Left to the partitioner, devices would collect every tile.
  images, pixels = PartitionSpec('data'), PartitionSpec('data', 'spatial')
  return jax.shard_map(
    partial(_over_own_rows, run, devices),
    in_specs=(pixels, pixels, pixels, images),
    out_specs=(images, pixels, pixels),
    # The check refuses a loop's carry that starts as constants.
    check_vma=False,
  )(logits, labels, tuple(maps), tuple(known))


def _over_own_rows(run, devices, logits, labels, maps, known):
  # Pixels at a device's edges lie between its logits and the neighbour's, so
  # neighbours send each other a row of logits, and the gradient at it back.
  last = devices - 1
  down = [(i, i + 1) for i in range(last)]
  up = [(i + 1, i) for i in range(last)]
  place = lax.axis_index('spatial')

  def neighbours(first: Array, final: Array) -> tuple[Array, Array]:
    # An image's edge repeats its own row.
    above = lax.ppermute(final, 'spatial', down)
    below = lax.ppermute(first, 'spatial', up)
    above = jnp.where(place == 0, first, above)
    return above, jnp.where(place == last, final, below)

  def with_margins(own: Array) -> Array:
    above, below = neighbours(own[:, :1], own[:, -1:])
    return jnp.concatenate([above, own, below], 1)

  def without_margins(gradient: Array) -> Array:
    above, below = neighbours(gradient[:, :1], gradient[:, -1:])
    # At an image's edge the gradient comes back to the repeated row.
    return gradient[:, 1:-1].at[:, :1].add(above).at[:, -1:].add(below)

  strip = jax.tree.map(with_margins, logits)
  sums, pixels, gradient = run(strip, labels, maps, known, devices)
  sums = jax.tree.map(lambda x: lax.psum(x, 'spatial'), sums)
  return sums, pixels, jax.tree.map(without_margins, gradient)


def _over_tiles(visit, logits, labels, maps, known, devices, *, with_gradient):
  # Of several devices, the first and the last row of the logits are the
  # neighbours'.
  aligned, values = logits.align_corners, logits.values
  batch, h, w, _ = values.shape
  height, width = labels.shape[1:]
  h -= 2 * (devices > 1)
  rows = max(height // h, 1)
  sizes = height, h, rows, values.dtype
  bands, starts = row_bands(*sizes, devices, aligned)
  place = lax.axis_index('spatial') if len(bands) > 1 else 0
  bands, starts = jnp.asarray(bands)[place], jnp.asarray(starts)[place]
  tiles, _, taps = bands.shape
  missing = tiles * rows - height

  # (B, H, W) -> (tiles, rows, B, W): upsampling rows needs no transposition.
  def cut(values: Array, fill: int) -> Array:
    beyond = ((0, 0), (0, missing), (0, 0))
    values = jnp.pad(values, beyond, constant_values=fill)
    return values.reshape(batch, tiles, rows, width).transpose(1, 2, 0, 3)

  columns = resize_matrix(width, w, width, w, values.dtype, aligned)
  wide = einsum('bhwc,jw->hbjc', values, columns)

  def visited(band: Array, start: Array, label: Array, *parts: Array) -> Any:
    source = lax.dynamic_slice_in_dim(wide, start, taps)
    return visit(_rows(band, source), label, *parts, *known)

  # Sums stay apart for each image, so that devices exchange nothing.
  def tile(carry, this):
    sums, gradient = carry
    band, start, *_ = this
    more, pixels, dz = visited(*this)
    sums = jax.tree.map(jnp.add, sums, more)
    if with_gradient:
      # Neighbouring tiles share rows of logits.
      before = lax.dynamic_slice_in_dim(gradient, start, taps)
      dz = einsum('kbjc,jw->kbwc', _rows(band, dz, back=True), columns)
      gradient = lax.dynamic_update_slice_in_dim(
        gradient, before + dz, start, 0
      )
    return (sums, gradient), pixels

  cuts = [cut(values, 0) for values in maps]
  over = (bands, starts, cut(labels, IGNORE), *cuts)
  one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in over]
  sums, _, _ = jax.eval_shape(visited, *one)
  sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
  gradient = None
  if with_gradient:
    gradient = jnp.zeros((len(wide), batch, w, wide.shape[3]), wide.dtype)
  (sums, gradient), pixels = lax.scan(tile, (sums, gradient), over)
  if with_gradient:
    gradient = Logits(gradient.transpose(1, 0, 2, 3), aligned)

  def whole(values: Array) -> Array:
    values = values.transpose(2, 0, 1, 3)
    return values.reshape(batch, tiles * rows, width)[:, :height]

  return sums, jax.tree.map(whole, pixels), gradient


def _rows(weights: Array, x: Array, back: bool = False) -> Array:
  # Sums (i, ...) of x (k, ...), weighted (i, k), or (k, i) on the way back.
  if implementations.chosen('rows') == 'product':
    return einsum(f'{"ki" if back else "ik"},kbjc->ibjc', weights, x)
  # A product of so few terms leaves a TPU's matrix unit almost empty.
  weights = weights.T if back else weights
  apart = weights.reshape(*weights.shape, 1, 1, 1)
  return sum(apart[:, k] * x[k] for k in range(len(x)))


def exponentials_of(z: Array) -> tuple[Array, Array, Array]:
  """exp(z - largest), its sum and largest (..., 1), of z (..., classes)."""
  largest = jnp.max(z, -1, keepdims=True)
  exponentials = jnp.exp(z - largest)
  return exponentials, jnp.sum(exponentials, -1, keepdims=True), largest


def one_hot(label: Array, classes: int) -> Array:
  """Bool (..., classes), all False where the label is 255."""
  # No gather: a comparison fuses, and stays on the pixel's device.
  return label[..., None] == jnp.arange(classes)


def row_bands(
  height: int,
  h: int,
  rows: int,
  dtype: Any,
  devices: int = 1,
  align_corners: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts the matrix of a bilinear resize from `h` to `height` into tiles.

  Each of several devices has this much of an image, and one more input on
  either side, which no edge repeats. Returns weights (devices, tiles, rows,
  taps), and each tile's first input; devices that are alike come once.
  """
  strips, number = range(devices), devices
  if devices > 1 and not align_corners:
    strips, number = [1], 3  # The middle one stands for all.
  lengths = number * height, number * h
  matrix = resize_matrix(*lengths, *lengths, dtype, align_corners)
  margin = int(devices > 1)
  inputs, tiles = h + 2 * margin, -(-height // rows)
  matrix = np.pad(matrix, ((0, 0), (margin, margin)))
  each = [
    matrix[i * height : (i + 1) * height, i * h : i * h + inputs]
    for i in strips
  ]
  beyond = (0, 0), (0, tiles * rows - height), (0, 0)
  each = np.pad(np.stack(each), beyond).reshape(-1, rows, inputs)
  used = [np.flatnonzero(tile.any(0)) for tile in each]
  # As many taps for all tiles: one at the lower end starts earlier.
  taps = max(x[-1] - x[0] + 1 for x in used)
  starts = np.asarray([min(x[0], inputs - taps) for x in used], np.int32)
  bands = [
    tile[:, start : start + taps]
    for tile, start in zip(each, starts, strict=True)
  ]
  bands = np.stack(bands).reshape(-1, tiles, rows, taps)
  return bands, starts.reshape(-1, tiles)
