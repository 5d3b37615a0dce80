"""Protocols `ms_flip_0x` and `ms_flip_1x`: several scales and their mirrors.

The mean of the softmax of all decides, at the original size. 0x and 1x (after
mmsegmentation's versions) differ in the size to which a scale is relative.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from resnest_jax.data import preprocess, resize
from resnest_jax.inference.label_maps import View, compiled, resized_view


def scaled_sizes(
  sizes: np.ndarray, ratio: float, image_scale: tuple[int, int] | None
) -> np.ndarray:
  """The heights and widths at one scale, int32 (B, 2).

  `ratio` is relative to the original size, or with `image_scale` to that fit.
  """

  def scaled(height, width):
    if image_scale is None:
      return resize.scaled_size(height, width, ratio)
    return resize.resized_size(height, width, ratio, image_scale)

  return np.array([scaled(*size) for size in sizes.tolist()], np.int32)


def taps(
  sizes: np.ndarray, scaled: np.ndarray, canvas: tuple[int, int], flip: bool
) -> tuple[np.ndarray, np.ndarray]:
  """The tables with which `preprocess.resize` resizes and mirrors images.

  int32 (B, canvas height, 4) and (B, canvas width, 4), from sizes int (B, 2).
  """
  # Zeros give zeros: the result is padded as the network expects.
  tables = [np.zeros((len(sizes), length, 4), np.int32) for length in canvas]
  for image, (before, after) in enumerate(zip(sizes, scaled, strict=True)):
    for axis, table in enumerate(tables):
      of_axis = resize.bilinear_taps(before[axis], after[axis], axis)
      # Mirrored within the true width: the padding stays at the right.
      if flip and axis == 1:
        of_axis = of_axis[::-1]
      table[image, : after[axis]] = of_axis
  return tuple(tables)


def mirrored(view: View, label_size: jax.Array) -> View:
  """The view of mirrored images, mirrored back within `label_size` (B, 2)."""
  # Columns beyond the true width are arbitrary, but need a valid index.
  columns = jnp.arange(view.columns.shape[1])
  columns = jnp.maximum(label_size[:, 1, None] - 1 - columns, 0)
  reordered = jax.vmap(lambda matrix, rows: matrix[rows])(view.columns, columns)
  return view._replace(columns=reordered)


def make_multiscale(
  network: Callable,
  place: Callable,
  mesh: Mesh | None,
  *,
  image_scale: tuple[int, int] | None,
  scales: Sequence[float],
  flip: bool,
  bucket: int,
  align_corners: bool = False,
) -> tuple[Callable, Callable]:
  """`look` and `build` of `protocols.make_views`; see there."""
  resized = compiled(preprocess.resize, mesh)

  def look(variables, batch):
    image, sizes = place(batch['image']), np.asarray(batch['size'])
    layout, arrays = [], []
    for ratio in scales:
      scaled = scaled_sizes(sizes, ratio, image_scale)
      multiple = max(int(bucket * ratio), 1)
      canvas = resize.padded_size(scaled.max(0).tolist(), multiple)
      size = place(scaled)
      logits = []
      for mirror in (False, True)[: 1 + flip]:
        tables = place(taps(sizes, scaled, canvas, mirror))
        images = resized(image, *tables)  # uint8 (B, *canvas, 3)
        logits.append(network(variables, images, size))
      layout.append(canvas)
      arrays.append((logits, size))
    return tuple(layout), arrays

  def build(layout, arrays, label_size, label_canvas):
    views = []
    for canvas, (both, size) in zip(layout, arrays, strict=True):
      for mirror, logits in enumerate(both):
        sizes = size, canvas, label_size, label_canvas
        view = resized_view(logits, *sizes, align_corners)
        views.append(mirrored(view, label_size) if mirror else view)
    return views

  return look, build
