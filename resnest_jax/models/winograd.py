"""3x3 convolutions with 4 multiplications for every 9.

F(2x2, 3x3) of Winograd's minimal filtering, for networks by Lavin and Gray
(arXiv 1509.09308): outputs come in tiles of 2x2. The 4x4 inputs that a tile
sees and the 3x3 kernel become 4x4 sums each, which are multiplied place by
place; sums of the products are the tile. Over all tiles and channels that is a
matrix product for each of the 16 places.

In float32 it rounds twice as coarsely as XLA's sum over nine taps. In bfloat16
the sums would cost digits that it does not have.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from resnest_jax.models.layers import Array

Vector = Sequence[Array]


def _inputs(d: Vector) -> Vector:
  return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _kernels(g: Vector) -> Vector:
  ends, middle = (g[0] + g[2]) / 2, g[1] / 2
  return g[0], ends + middle, ends - middle, g[2]


def _outputs(m: Vector) -> Vector:
  return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _twice(
  transform: Callable[[Vector], Vector], grid: Sequence[Vector]
) -> list[Vector]:
  """Along the columns of a grid, and along its rows."""
  along = [transform(row) for row in grid]
  return list(zip(*map(transform, zip(*along, strict=True)), strict=True))


def convolve_3x3(x: Array, kernel: Array) -> Array:
  """Convolution with padding 1, stride 1.

  Args:
    x: (B, H, W, C).
    kernel: (3, 3, C, out).

  Returns:
    (B, H, W, out).
  """
  height, width = x.shape[1:3]
  rows, columns = -(-height // 2), -(-width // 2)
  margins = [(1, 1 + length % 2) for length in (height, width)]
  padded = jnp.pad(x, ((0, 0), *margins, (0, 0)))
  places = range(4)
  tiles = _twice(
    _inputs,
    [
      [
        padded[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
        for j in places
      ]
      for i in places
    ],
  )
  kernels = _twice(_kernels, kernel)
  products = [
    [
      lax.dot_general(tiles[i][j], kernels[i][j], (((3,), (0,)), ((), ())))
      for j in places
    ]
    for i in places
  ]
  # (B, rows, 2, columns, 2, out)
  y = jnp.stack(
    [jnp.stack(row, 3) for row in _twice(_outputs, products)], 2
  ).reshape(x.shape[0], 2 * rows, 2 * columns, -1)
  return y[:, :height, :width]
