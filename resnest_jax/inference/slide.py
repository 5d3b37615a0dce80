"""Protocol `slide`: windows over the image, their logits averaged.

As in mmsegmentation: windows of `crop` pixels start every `stride` pixels, the
last one of a row or column is moved back to end at the image's edge, and an
image smaller than a window is a smaller window. Each window's logits are
upsampled to its size, a pixel gets the mean over the windows that show it, and
the result is resized to the original size.

The windows of all images of a batch are cut on the device and share batches of
one shape, so the network compiles once, whatever the images' sizes. The mean
is a matrix an axis, too: windows are a grid, so how many of them show a pixel
is a number of rows times a number of columns.
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
from resnest_jax.models.layers import resize_matrix


def grid(length: Any, crop: int, stride: int) -> Any:
  """How many windows an axis of `length` pixels (int or array) has."""
  beyond = length - crop + stride - 1
  return beyond * (beyond > 0) // stride + 1


def starts(length: Any, crop: int, stride: int, count: int) -> Any:
  """Where windows 0 to `count` - 1 start, (B, count).

  Args:
    length: (B,) true lengths of an axis in pixels.
    crop: length of a window.
    stride: between two windows.
    count: windows to give; those past `grid` are to be ignored.
  """
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
  """Puts the windows of a batch of images into batches of the same length.

  Args:
    sizes: int (B, 2), the images' true heights and widths in pixels.
    canvas: their padded height and width.
    crop: height and width of a window.
    stride: between windows, downwards and to the right.
    devices: D, a divisor of B. Each works on the windows of its own B / D
      images, which are neighbours in the batch.

  Returns:
    corners: int32 (n, B, 3), for each of n batches and each place in it the
      image, counted on its device, and the window's top and left edge.
    window_sizes: int32 (n, B, 2), true heights and widths, 1x1 where there is
      no window.
    places: int32 (B, rows, columns), where among its device's windows (batch
      by batch) that of an image and a row and column of the canvas' grid is; 0
      where the image has none.
  """
  batch = len(sizes)
  local = batch // devices
  counts = [grid(canvas[i], crop[i], stride[i]) for i in (0, 1)]
  edges = [starts(sizes[:, i], crop[i], stride[i], counts[i]) for i in (0, 1)]
  mine = [grid(sizes[:, i], crop[i], stride[i]) for i in (0, 1)]
  places = np.zeros((batch, *counts), np.int32)
  windows = [[] for _ in range(devices)]
  for image in range(batch):
    device, index = divmod(image, local)
    for row, column in np.ndindex(mine[0][image], mine[1][image]):
      places[image, row, column] = len(windows[device])
      corner = edges[0][image, row], edges[1][image, column]
      size = np.minimum(sizes[image], crop)
      windows[device].append((index, *corner, *size))
  number = -(-max(map(len, windows)) // local)
  table = np.zeros((number, devices, local, 5), np.int32)
  table[..., 3:] = 1
  for device, listed in enumerate(windows):
    for i, window in enumerate(listed):
      table[i // local, device, i % local] = window
  table = table.reshape(number, batch, 5)
  return table[..., :3], table[..., 3:], places


def cut(
  crop: tuple[int, int], images: jax.Array, corners: jax.Array
) -> jax.Array:
  """Cuts windows (n, *crop, 3) out of images (B, H, W, 3).

  Args:
    crop: height and width of a window.
    images: smaller ones than a window are padded with zeros.
    corners: int (n, 3): which image, top and left edge.
  """
  more = (max(n - m, 0) for n, m in zip(crop, images.shape[1:3], strict=True))
  images = jnp.pad(images, ((0, 0), *((0, n) for n in more), (0, 0)))

  def window(corner):
    start = (*corner, jnp.zeros_like(corner[0]))
    return jax.lax.dynamic_slice(images, start, (1, *crop, 3))[0]

  return jax.vmap(window)(corners)


def window_matrix(
  lengths: tuple[jax.Array, jax.Array],
  padded: tuple[int, int, int],
  valid: jax.Array,
  crop: int,
  stride: int,
  dtype: Any,
) -> jax.Array:
  """From the logits of all windows along an axis to the original pixels.

  Args:
    lengths: (B,) pixels of the original, and of the image that was cut.
    padded: padded lengths of both, and of one window's logits, n.
    valid: (B,), the true length of a window's logits.
    crop: padded pixels of a window.
    stride: pixels between windows.
    dtype: of the weights.

  Returns:
    (B, padded[0], windows * n): upsampled to the window, averaged over windows,
    resized to the original.
  """
  label_length, length = lengths
  window = jnp.minimum(length, crop)
  count = grid(padded[1], crop, stride)
  upsample = resize_matrix(window, valid, crop, padded[2], dtype)
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
  return jnp.matmul(resize, mean, precision=jax.lax.Precision.HIGHEST)


def make_slide(
  network: Callable,
  place: Callable,
  mesh: Mesh | None,
  crop: tuple[int, int],
  stride: tuple[int, int],
) -> tuple[Callable, Callable]:
  """The protocol's two parts; see `protocols.make_views`."""

  @functools.cache
  def compiled_cut(window):
    stage = functools.partial(cut, window)
    return jax.jit(split_batch(stage, mesh, P('data'), P('data')))

  def window_of(canvas):
    """What of a window lies beyond all images of a batch is not computed."""
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
    valid = logits_size(
      jnp.minimum(size, jnp.array(window)), window, logits[0].shape[1:3]
    )
    logits = jnp.concatenate(logits)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    _, h, w, classes = logits.shape
    matrices = [
      window_matrix(
        (label_size[:, i], size[:, i]),
        (label_canvas[i], canvas[i], (h, w)[i]),
        valid[:, i],
        window[i],
        stride[i],
        logits.dtype,
      )
      for i in (0, 1)
    ]
    batch, rows, columns = places.shape
    # (B, rows, columns, h, w, C) -> (B, rows * h, columns * w, C)
    logits = logits[places].swapaxes(2, 3)
    logits = logits.reshape(batch, rows * h, columns * w, classes)
    return [View(logits, *matrices)]

  return look, build
