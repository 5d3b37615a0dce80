"""Protocol `slide` of a picture of any height, in rows of windows.

Pixels, logits and labels are in memory for the rows in work alone. The labels
are those of `slide` in memory, bit for bit: both compute the same products of
the same shapes, in the same tiles.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnest_jax.data.resize import padded_size
from resnest_jax.inference import slide
from resnest_jax.inference.label_maps import label_maps, rows_in_a_tile
from resnest_jax.inference.steps import compile_views, run_ahead
from resnest_jax.threads import map_in_threads


class Stream:
  """`slide` at a picture's own size; arguments are of `make_predict_step`."""

  def __init__(self, model, num_classes, *, protocol, mesh, on_compile):
    common = model, num_classes, protocol, mesh, jnp.float32, on_compile
    self._network, *_, self._place = compile_views(*common)
    self._protocol, self._on_compile = protocol, on_compile

    @functools.partial(jax.jit, static_argnums=0)
    def finish(canvas, logits, size, rows):
      facts = size, canvas, protocol.crop, protocol.stride
      _, h, w, _ = logits[0].shape
      of_window = h, w // slide.axes_of(*facts)[1].count
      how = logits[0].dtype, model.decode_head.align_corners
      axes = slide.axes_of(*facts, of_window, *how)
      view = slide.windows_view(axes, rows, canvas[1], logits[0], logits)
      return label_maps([view], size.at[:, 0].set(len(rows)))[0]

    self._finish = finish

  def __call__(
    self,
    variables: Any,
    read: Callable[[slice], np.ndarray],
    size: tuple[int, int],
    *,
    number: int,
    start: int = 0,
    tell: Callable[[int, int], None] = lambda number, total: None,
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Yields a row and the labels from there, uint8 (n, W), in order.

    Args:
      read: gives the pixels (n, W, bands) of some rows.
      number: windows that the network sees at a time, over all devices.
      start: a row in the first tile; no earlier window is read.
      tell: takes the numbers of windows that were done now, and of all.
    """
    canvas = padded_size(size, self._protocol.bucket)
    how = canvas, self._protocol.crop, self._protocol.stride
    down, across = axes = slide.axes_of(np.array([size]), *how)
    tops, columns = down.own(), len(across.own())
    some = _windows(read(slice(0, 1)), axes, number, [])
    _, _, w, classes = jax.eval_shape(self._network, variables, *some).shape
    width = max(canvas[1], across.count * w)
    tile = rows_in_a_tile(4 * width * classes, canvas[0])
    self._on_compile(down.crop, across.crop)

    def needed(top: int) -> list[int]:
      inside = (tops < top + tile) & (tops + down.crop > top)
      return np.flatnonzero(inside).tolist()

    first, held = start // tile * tile, {}
    slices = tops[needed(first)[0] :].tolist()
    slices = [slice(top, top + down.crop) for top in slices]
    total = len(slices) * columns
    tell(0, total)
    # A thread reads the next row of windows meanwhile.
    bands = map_in_threads(read, slices, num_threads=1, ahead=1)
    with contextlib.closing(bands):
      for top in range(first, size[0], tile):
        held = {row: held[row] for row in needed(top) if row in held}
        for row in needed(top):
          if row not in held:
            given = variables, next(bands), axes, number
            held[row] = self._row(*given, lambda n: tell(n, total))
        row, most = down.reach(top, tile)
        # Where no pixel of the tile has a share in them, any other logits do.
        logits = [held.get(row + i, held[max(held)]) for i in range(most)]
        place = np.array([size], np.int32), np.arange(top, top + tile)
        labels = self._finish(canvas, logits, *place)
        yield top, np.asarray(labels)[: size[0] - top, : size[1]]

  def _row(
    self,
    variables: Any,
    pixels: np.ndarray,
    axes: Sequence[slide.Axis],
    number: int,
    tell: Callable[[int], None],
  ) -> jax.Array:
    """Logits of a row of windows, (1, h, columns * w, C)."""
    lefts, found, done = axes[1].own().tolist(), None, 0

    def run(group):
      batch = _windows(pixels, axes, number, group)
      return self._network(variables, *self._place(batch))

    # On the host: a device would hold them twice to put them side by side.
    groups = [lefts[i : i + number] for i in range(0, len(lefts), number)]
    for group, logits in run_ahead(run, groups):
      logits = np.asarray(logits)[: len(group)].swapaxes(0, 1)
      if found is None:
        h, _, w, classes = logits.shape
        found = np.zeros((1, h, axes[1].count, w, classes), np.float32)
      found[0, :, done : done + len(group)] = logits
      done += len(group)
      tell(len(group))
    found = found.reshape(1, h, -1, classes)
    return jax.device_put(found, jax.local_devices()[0])


def _windows(
  pixels: np.ndarray, axes: Sequence[slide.Axis], number: int, lefts: Any
) -> tuple[np.ndarray, np.ndarray]:
  """Windows of a row of them, (number, *crop, bands), and their true sizes."""
  crop = [axis.crop for axis in axes]
  size = [min(int(axis.length[0]), axis.crop) for axis in axes]
  images = np.zeros((number, *crop, pixels.shape[2]), pixels.dtype)
  for image, left in zip(images, lefts, strict=False):
    image[: size[0], : size[1]] = pixels[:, left : left + size[1]]
  return images, np.tile(np.int32(size), (number, 1))
