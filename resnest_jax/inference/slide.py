"""Protocol `slide`: windows over the image, their logits averaged.

As in mmsegmentation: the last window of a row or column is moved back to end at
the image's edge, and an image smaller than a window is a smaller window. Logits
are averaged at the network's input size, then resized to the original one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from resnest_jax.inference.label_maps import View, compiled, logits_size
from resnest_jax.models.layers import at_least_float32, einsum, resize_matrix


def grid(length: Any, crop: int, stride: int) -> Any:
  """The number of windows along an axis of `length` pixels (int or array)."""
  beyond = length - crop + stride - 1
  return beyond * (beyond > 0) // stride + 1


class Axis(NamedTuple):
  """How windows lie along an axis of images that share a canvas."""

  length: Any  # (B,), true pixels of the images.
  crop: int  # Pixels of a window.
  stride: int
  count: int  # Windows of the canvas.
  upsample: Any = None  # (B, crop, n), from a window's n logits to its pixels.

  def starts(self, windows: Any) -> Any:
    """Where windows (n,) start, (B, n); beyond an image's grid its last."""
    xp = np if isinstance(self.length, np.ndarray) else jnp
    room = xp.maximum(self.length - self.crop, 0)
    return xp.minimum(windows * self.stride, room[:, None])

  def own(self) -> np.ndarray:
    """Where all windows of a single image start, on the host."""
    number = grid(self.length[0], self.crop, self.stride)
    return self.starts(np.arange(number))[0]

  def reach(self, pixel: Any, number: int) -> tuple[Any, int]:
    """The first of the windows that show `number` pixels, and how many may.

    The latter holds for any `pixel` (int or array): one shape serves all.
    """
    xp = np if isinstance(pixel, int) else jnp
    # One more than at multiples of the stride: the last window is moved back.
    most = min(-(-(self.crop + number - 1) // self.stride) + 1, self.count)
    first = (pixel - self.crop) // self.stride + 1
    return xp.clip(first, 0, self.count - most), most

  def matrix(self, pixels: jax.Array, first: Any, most: int) -> jax.Array:
    """From the logits of windows to pixels (p,): (B, p, most * n)."""
    # The number of windows that show a pixel is one of rows times one of
    # columns. Each product is rounded once: any program has the same bits.
    windows = first + jnp.arange(most)
    own = grid(self.length, self.crop, self.stride)
    within = pixels[:, None] - self.starts(windows)[:, None]  # (B, p, windows)
    shown = (within >= 0) & (windows < own[:, None])[:, None]
    shown &= within < jnp.minimum(self.length, self.crop)[:, None, None]
    weight = shown / jnp.maximum(shown.sum(-1, keepdims=True), 1)
    within = jnp.clip(within, 0, self.crop - 1)
    placed = jax.vmap(lambda matrix, rows: matrix[rows])(self.upsample, within)
    placed = placed * weight[..., None].astype(placed.dtype)
    return placed.reshape(*placed.shape[:2], -1)


def axes_of(
  size: Any,
  canvas: tuple[int, int],
  crop: tuple[int, int],
  stride: tuple[int, int],
  logits: tuple[int, int] | None = None,
  *how: Any,
) -> list[Axis]:
  """The axes of images of `size` (B, 2).

  They have `upsample` if the size of a window's logits is given, with their
  type and whether they align corners.
  """
  crop = tuple(map(min, crop, canvas))
  counts = map(grid, canvas, crop, stride)
  axes = [*map(Axis, size.swapaxes(0, 1), crop, stride, counts)]
  if logits is None:
    return axes
  shown = jnp.minimum(size, jnp.array(crop))
  valid = logits_size(shown, crop, logits)
  pairs = zip(shown.T, valid.T, crop, logits, strict=True)
  matrices = [resize_matrix(*lengths, *how) for lengths in pairs]
  return [x._replace(upsample=y) for x, y in zip(axes, matrices, strict=True)]


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
  axes = axes_of(sizes, canvas, crop, stride)
  edges = [axis.starts(np.arange(axis.count)) for axis in axes]
  mine = [grid(sizes[:, i], crop[i], stride[i]) for i in (0, 1)]
  # 0 where an image has no window: `window_matrix` gives those no weight.
  places = np.zeros((batch, *(axis.count for axis in axes)), np.int32)
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


class Windows(NamedTuple):
  """A `View` of images that keep their size, where few windows show a pixel.

  A tile has the same bits if all logits are in memory, and if `apart` are those
  of the rows of windows in its reach.
  """

  logits: jax.Array  # As `side_by_side` gives them.
  rows: jax.Array  # int (B, Hl), the pixels' own numbers.
  down: Axis
  # Blocks of columns: where their logits begin, and (B, columns, logits).
  columns: Sequence[tuple[int, jax.Array]]
  apart: Sequence[jax.Array] = ()  # Each (B, h, columns * w, C).

  @property
  def canvas(self) -> tuple[int, int]:
    return self.rows.shape[1], sum(x.shape[1] for _, x in self.columns)

  def scores(self) -> jax.Array:
    """(B, rows, C, columns)."""
    first, most = self.down.reach(self.rows[0, 0], self.rows.shape[1])
    h, x = self.down.upsample.shape[2], 0
    logits = self.apart or [
      jax.lax.dynamic_slice_in_dim(self.logits, (first + i) * h, h, 1)
      for i in range(most)
    ]
    matrix = self.down.matrix(self.rows[0], first, most)
    # XLA sees the same products after this, wherever the logits are from.
    logits, matrix = jax.lax.optimization_barrier((tuple(logits), matrix))
    for i, each in enumerate(logits):
      x += einsum('bth,bhwc->btwc', matrix[..., i * h : (i + 1) * h], each)
    parts = [
      einsum('bxw,btwc->btcx', part, x[:, :, start : start + part.shape[2]])
      for start, part in self.columns
    ]
    return jnp.concatenate(parts, -1)


def windows_view(
  axes: Sequence[Axis],
  rows: jax.Array,
  width: int,
  logits: jax.Array,
  apart: Sequence[jax.Array] = (),
) -> Windows:
  """Arguments are those of `Windows`, but `rows` is (Hl,)."""
  down, across = axes
  n, columns = across.upsample.shape[2], []
  step = across.crop
  if across.reach(0, step)[1] == across.count:
    step = width  # Each block would need all windows.
  for left in range(0, width, step):
    first, most = across.reach(left, step)
    pixels = jnp.arange(left, min(left + step, width))
    columns.append((int(first) * n, across.matrix(pixels, first, most)))
  rows = jnp.broadcast_to(rows, (len(logits), len(rows)))
  return Windows(logits, rows, down, columns, apart)


def make_slide(
  network: Callable,
  place: Callable,
  mesh: Mesh | None,
  crop: tuple[int, int],
  stride: tuple[int, int],
  align_corners: bool = False,
) -> tuple[Callable, Callable]:
  """`look` and `build` of `protocols.make_views`; see there."""
  devices = 1 if mesh is None else mesh.shape['data']
  cut_out = compiled(cut, mesh, 1)

  def look(variables, batch):
    image = place(batch['image'])
    canvas = image.shape[1:3]
    sizes = np.asarray(batch['size'])
    window = tuple(map(min, crop, canvas))
    corners, window_sizes, places = plan(sizes, canvas, window, stride, devices)
    logits = [
      network(variables, cut_out(window, image, place(corner)), place(size))
      for corner, size in zip(corners, window_sizes, strict=True)
    ]
    kept = np.array_equal(sizes, batch.get('label_size'))
    return (canvas, kept), (logits, place(places), place(sizes))

  def build(layout, arrays, label_size, label_canvas):
    (canvas, kept), (logits, places, size) = layout, arrays
    logits = jnp.concatenate(logits)
    logits = logits.astype(at_least_float32(logits.dtype))
    how = logits.shape[1:3], logits.dtype, align_corners
    axes = axes_of(size, canvas, crop, stride, *how)
    logits, matrices = side_by_side(logits, places), []
    if kept:
      rows = jnp.arange(label_canvas[0])
      return [windows_view(axes, rows, label_canvas[1], logits)]
    for i, axis in enumerate(axes):
      mean = axis.matrix(jnp.arange(canvas[i]), 0, axis.count)
      lengths = label_size[:, i], size[:, i], label_canvas[i], canvas[i]
      resize = resize_matrix(*lengths, mean.dtype)
      matrices.append(jnp.matmul(resize, mean, precision='highest'))
    return [View(logits, *matrices)]

  return look, build
