"""3x3 convolutions with 4 multiplications for every 9.

F(2x2, 3x3) of Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308),
for 2x2 tiles of outputs. It rounds twice as coarsely as XLA.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from resnest_jax.models.layers import Array

Vector = Sequence[Array]


# The paper's transforms of one axis: B^T d, G g and A^T m.
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
  along = [transform(row) for row in grid]
  return list(zip(*map(transform, zip(*along, strict=True)), strict=True))


def _grid(of: Callable[[int, int], Array]) -> list[Vector]:
  return [[of(i, j) for j in range(4)] for i in range(4)]


def convolve_3x3(x: Array, kernel: Array) -> Array:
  """Convolves x (B, H, W, C) with (3, 3, C, out) at padding 1, stride 1."""
  height, width = x.shape[1:3]
  rows, columns = -(-height // 2), -(-width // 2)
  margins = [(1, 1 + length % 2) for length in (height, width)]
  padded = jnp.pad(x, ((0, 0), *margins, (0, 0)))

  def inputs(i: int, j: int) -> Array:
    return padded[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]

  def product(i: int, j: int) -> Array:
    numbers = (((3,), (0,)), ((), ()))
    return lax.dot_general(tiles[i][j], kernels[i][j], numbers)

  # 4 x 4 arrays (B, rows, columns, C): tiles overlap by two pixels.
  tiles = _twice(_inputs, _grid(inputs))
  kernels = _twice(_kernels, kernel)
  outputs = _twice(_outputs, _grid(product))
  y = jnp.stack([jnp.stack(row, 3) for row in outputs], 2)
  y = y.reshape(x.shape[0], 2 * rows, 2 * columns, -1)
  return y[:, :height, :width]
