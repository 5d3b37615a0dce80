"""Protocol `slide`: windows over the image, their logits averaged.

As in mmsegmentation: the last window of a row or column is moved back to end at
the image's edge, and an image smaller than a window is a smaller window. Logits
are averaged at the network's input size, then resized to the original one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from resnest_jax.inference.label_maps import View, logits_size, split_batch
from resnest_jax.models.layers import at_least_float32, resize_matrix


def grid(length: Any, crop: int, stride: int) -> Any:
  """The number of windows along an axis of `length` pixels (int or array)."""
  beyond = length - crop + stride - 1
  return beyond * (beyond > 0) // stride + 1


def starts(length: Any, crop: int, stride: int, count: int) -> Any:
  """Where windows start, (B, count); beyond its grid an image's last again."""
  room = (length - crop) * (length > crop)
  xp = np if isinstance(length, np.ndarray) else jnp
  return xp.minimum(xp.arange(count) * stride, room[:, None])


def plan(
  sizes: np.ndarray,
  canvas: tuple[int, int],
  crop: tuple[int, int],
  stride: tuple[int, int],
  devices: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Distributes the windows of B images over n batches of B windows.

  Each of the `devices`, a divisor of B, holds B / devices neighbouring images.
  Returns corners int32 (n, B, 3): image, counted on its device, top, and left
  edge; true window sizes int32 (n, B, 2); and places int32 (B, rows, columns)
  of the windows of the canvas' grid among their device's windows.
  """
  # Windows stay on the device that holds their image: nothing is exchanged.
  batch = len(sizes)
  local = batch // devices
  counts = list(map(grid, canvas, crop, stride))
  edges = [starts(sizes[:, i], crop[i], stride[i], counts[i]) for i in (0, 1)]
  mine = [grid(sizes[:, i], crop[i], stride[i]) for i in (0, 1)]
  # 0 where an image has no window: `window_matrix` gives those no weight.
  places = np.zeros((batch, *counts), np.int32)
  windows = [[] for _ in range(devices)]
  for image in range(batch):
    device, index = divmod(image, local)
    for row, column in np.ndindex(mine[0][image], mine[1][image]):
      places[image, row, column] = len(windows[device])
      corner = edges[0][image, row], edges[1][image, column]
      size = np.minimum(sizes[image], crop)
      windows[device].append((index, *corner, *size))
  # Slots without a window show a pixel, as a size of 0 would divide by zero.
  number = -(-max(map(len, windows)) // local)
  table = np.zeros((number, devices, local, 5), np.int32)
  table[..., 3:] = 1
  for device, listed in enumerate(windows):
    for i, window in enumerate(listed):
      table[i // local, device, i % local] = window
  # The batch axis runs device by device, as the mesh splits it.
  table = table.reshape(number, batch, 5)
  return table[..., :3], table[..., 3:], places


def cut(
  crop: tuple[int, int], images: jax.Array, corners: jax.Array
) -> jax.Array:
  """Cuts windows (n, *crop, C) out of images; `corners` is as in `plan`."""
  # `dynamic_slice` would move a window that reaches beyond the array back.
  more = (max(n - m, 0) for n, m in zip(crop, images.shape[1:3], strict=True))
  images = jnp.pad(images, ((0, 0), *((0, n) for n in more), (0, 0)))

  def window(corner):
    start = (*corner, jnp.zeros_like(corner[0]))
    return jax.lax.dynamic_slice(images, start, (1, *crop, images.shape[3]))[0]

  return jax.vmap(window)(corners)


def side_by_side(logits: jax.Array, places: jax.Array) -> jax.Array:
  """Logits of windows (n, h, w, C) as (B, rows * h, columns * w, C).

  `places` (B, rows, columns) is as in `plan`.
  """
  batch, rows, columns = places.shape
  _, h, w, classes = logits.shape
  logits = logits[places].swapaxes(2, 3)
  return logits.reshape(batch, rows * h, columns * w, classes)


def window_matrix(
  lengths: tuple[jax.Array, jax.Array],
  padded: tuple[int, int, int],
  valid: jax.Array,
  crop: int,
  stride: int,
  dtype: Any,
  align_corners: bool = False,
) -> jax.Array:
  """From the logits of all windows along an axis to the original pixels.

  `lengths` are (B,) pixels of the original and of the image that was cut.
  `padded` are the padded lengths of both, and of a window's logits, n, whose
  true length is `valid` (B,). Returns (B, padded[0], windows * n).
  """
  # The number of windows that show a pixel is one of rows times one of columns.
  label_length, length = lengths
  window = jnp.minimum(length, crop)
  count = grid(padded[1], crop, stride)
  upsample = resize_matrix(window, valid, crop, padded[2], dtype, align_corners)
  first = starts(length, crop, stride, count)
  within = jnp.arange(padded[1]) - first[..., None]  # (B, windows, pixels)
  shown = (within >= 0) & (within < window[:, None, None])
  shown &= (jnp.arange(count) < grid(length, crop, stride)[:, None])[..., None]
  weight = shown / jnp.maximum(shown.sum(1, keepdims=True), 1)
  within = jnp.clip(within, 0, crop - 1)
  placed = jax.vmap(lambda matrix, rows: matrix[rows])(upsample, within)
  placed = placed * weight[..., None].astype(dtype)
  mean = placed.swapaxes(1, 2).reshape(len(length), padded[1], -1)
  resize = resize_matrix(label_length, length, *padded[:2], dtype)
  return jnp.matmul(resize, mean, precision='highest')


def make_slide(
  network: Callable,
  place: Callable,
  mesh: Mesh | None,
  crop: tuple[int, int],
  stride: tuple[int, int],
  align_corners: bool = False,
) -> tuple[Callable, Callable]:
  """`look` and `build` of `protocols.make_views`; see there."""

  @functools.cache
  def compiled_cut(window):
    stage = functools.partial(cut, window)
    return jax.jit(split_batch(stage, mesh, P('data'), P('data')))

  def window_of(canvas):
    return min(crop[0], canvas[0]), min(crop[1], canvas[1])

  devices = 1 if mesh is None else mesh.shape['data']

  def look(variables, batch):
    image = place(batch['image'])
    canvas = image.shape[1:3]
    sizes = np.asarray(batch['size'])
    window = window_of(canvas)
    corners, window_sizes, places = plan(sizes, canvas, window, stride, devices)
    cut_out = compiled_cut(window)
    logits = [
      network(variables, cut_out(image, place(corner)), place(size))
      for corner, size in zip(corners, window_sizes, strict=True)
    ]
    return canvas, (logits, place(places), place(sizes))

  def build(canvas, arrays, label_size, label_canvas):
    logits, places, size = arrays
    window = window_of(canvas)
    shown = jnp.minimum(size, jnp.array(window))
    valid = logits_size(shown, window, logits[0].shape[1:3])
    logits = jnp.concatenate(logits)
    logits = logits.astype(at_least_float32(logits.dtype))
    _, h, w, _ = logits.shape
    matrices = [
      window_matrix(
        (label_size[:, i], size[:, i]),
        (label_canvas[i], canvas[i], (h, w)[i]),
        valid[:, i],
        window[i],
        stride[i],
        logits.dtype,
        align_corners,
      )
      for i in (0, 1)
    ]
    return [View(side_by_side(logits, places), *matrices)]

  return look, build
