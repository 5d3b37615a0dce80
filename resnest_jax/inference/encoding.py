"""Protocol `encoding`: PyTorch-Encoding's own, which made its numbers.

At each scale windows start at multiples of the stride, and a window that passes
the image's edge is black there. The exponential of the logits of a window and
its mirror, added up, is averaged over the windows that show a pixel, and the
scales are summed. All resizes align corners, and images are not rounded.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from resnest_jax.data.resize import long_edge_size
from resnest_jax.inference import slide
from resnest_jax.inference.exponentials import Columns, Exponentials, Rows
from resnest_jax.inference.label_maps import compiled
from resnest_jax.models import layers


def scaled_sizes(batch: dict[str, Any], long_edge: int) -> np.ndarray:
  """The images' sizes at one scale, int32 (B, 2)."""
  sizes = [long_edge_size(*x, long_edge) for x in batch['size'].tolist()]
  # An empty slot would have the windows of a whole image.
  empty = batch['index'][:, None] < 0
  return np.where(empty, 1, np.array(sizes)).astype(np.int32)


def pixel_places(
  length: int,
  original: jax.Array,
  scaled: jax.Array,
  count: int,
  crop: int,
  stride: int,
  dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Where the pixels of the original are in windows, along an axis.

  `length` is the padded original's, `original` and `scaled` (B,) are true ones,
  `count` is the most windows of an image. Returns (B, length, n) windows,
  pixels in them, and the share of these in a score, 0: not shown.
  """
  taps = layers.resize_taps(jnp.arange(length), original, scaled, dtype, True)
  low, high, weight = taps
  pixel = jnp.stack([low, high], -1)[..., None]  # (B, length, 2, 1)
  weight = jnp.stack([1 - weight, weight], -1)[..., None]
  # The last window that starts before a pixel, and those before that one.
  last = slide.grid(scaled, crop, stride)[:, None, None, None] - 1
  last = jnp.minimum(pixel // stride, last)
  window = last - jnp.arange(min(-(-crop // stride), count))
  within = pixel - window * stride
  shown = (window >= 0) & (within < crop)
  share = (weight * shown / shown.sum(-1, keepdims=True)).astype(dtype)
  found = jnp.maximum(window, 0), jnp.clip(within, 0, crop - 1), share
  return tuple(x.reshape(*x.shape[:2], -1) for x in found)


def make_encoding(
  network: Callable,
  place: Callable,
  mesh: Mesh | None,
  *,
  base_size: int,
  crop: tuple[int, int],
  stride: tuple[int, int],
  scales: Sequence[float],
  flip: bool,
  dtype: Any = jnp.float32,
  align_corners: bool = False,
) -> tuple[Callable, Callable]:
  """`look` and `build` of `protocols.make_views`; see there.

  `base_size` are the pixels of the long edge at scale 1, `dtype` is of images.
  """
  devices = 1 if mesh is None else mesh.shape['data']

  def resized(canvas, image, size, scaled):
    image = image.astype(dtype)
    return layers.resize(image, canvas, size, scaled, align_corners=True)

  def cut_out(images, corners):
    windows = slide.cut(crop, images, corners)
    return (windows, windows[:, :, ::-1])[: 1 + flip]

  def joined(places, logits):
    both = [jnp.concatenate(x) for x in zip(*logits, strict=True)]
    both = [x.astype(layers.at_least_float32(x.dtype)) for x in both]
    # Resizing is linear and symmetric: mirrors are added before it.
    total = both[0] + both[1][:, :, ::-1] if flip else both[0]
    return slide.side_by_side(total, places)

  compiled_resize = compiled(resized, mesh, 1)
  compiled_cut, compiled_join = compiled(cut_out, mesh), compiled(joined, mesh)

  def look(variables, batch):
    image, size = place((batch['image'], batch['size']))
    whole = place(np.tile(np.int32(crop), (len(size), 1)))
    layout, arrays = [], []
    for ratio in scales:
      scaled = scaled_sizes(batch, math.ceil(base_size * ratio))
      counts = slide.grid(scaled, np.array(crop), np.array(stride))
      # With the black beyond its edges the last window is as large as others.
      sizes = (counts - 1) * stride + crop
      canvas = tuple(sizes.max(0).tolist())
      corners, _, places = slide.plan(sizes, canvas, crop, stride, devices)
      scaled = place(scaled)
      images = compiled_resize(canvas, image, size, scaled)
      cuts = (compiled_cut(images, place(corner)) for corner in corners)
      logits = [[network(variables, x, whole) for x in both] for both in cuts]
      layout.append(places.shape[1:])
      arrays.append((compiled_join(place(places), logits), scaled))
    return tuple(layout), arrays

  return look, functools.partial(exponentials, crop, stride, align_corners)


def exponentials(
  crop: tuple[int, int],
  stride: tuple[int, int],
  align_corners: bool,
  layout: Sequence[tuple[int, int]],
  arrays: Sequence[tuple[jax.Array, jax.Array]],
  label_size: jax.Array,
  label_canvas: tuple[int, int],
) -> list[Exponentials]:
  """`build` of `make_encoding`: of each scale, its logits and true sizes.

  `layout` has the numbers of windows down and across.
  """
  found = []
  for counts, (logits, size) in zip(layout, arrays, strict=True):
    given = label_canvas, label_size.T, size.T, counts, crop, stride
    axes = [*map(pixel_places, *given, 2 * [logits.dtype])]
    batch, height, width, classes = logits.shape
    h, w = height // counts[0], width // counts[1]
    # A window of `crop` rows has h rows of logits, one of its columns w.
    window, within, share = axes[0]
    taps = crop[0], h, h, share.dtype, align_corners
    own = window[..., None] == jnp.arange(counts[0])
    matrix = own[..., None] * layers.resize_rows(within, *taps)[..., None, :]
    rows = Rows(matrix.reshape(*share.shape, -1), share)
    window, within, share = axes[1]
    lengths = 2 * (crop[1], w)
    upsample = layers.resize_matrix(*lengths, share.dtype, align_corners)
    columns = Columns(window * crop[1] + within, share, upsample)
    logits = logits.reshape(batch, height, counts[1], w, classes)
    logits = logits.transpose(0, 4, 2, 3, 1)
    found.append(Exponentials(logits, rows, columns))
  return found
