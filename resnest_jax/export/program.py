"""The whole way from pictures to label maps as one function of fixed size.

What the exports hold: normalisation, the network, its logits brought to the
size of the picture, and the class with the largest. The protocol is `whole`
without a resize: the network sees a picture as it is given.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnest_jax.data.preprocess import preprocess
from resnest_jax.models.layers import apply_matrices, resize_matrix

# Upper bound of the scores of one picture that exist at a time, where only
# labels are asked for.
TILE_BYTES = 16 * 2**20

Program = Callable[[jax.Array], tuple[jax.Array, ...]]


def make_program(
  model: nn.Module,
  variables: Mapping[str, Any],
  size: tuple[int, int],
  *,
  probabilities: bool = False,
) -> Program:
  """A function of pictures alone; the variables are constants of it.

  Args:
    model: a segmentor that computes in float32.
    variables: its `params` and `batch_stats`.
    size: height and width of the pictures, in pixels.
    probabilities: whether those of all classes are given, too.

  Returns:
    program(images) -> (labels,) or (labels, probabilities): uint8
    (b, H, W, 3) RGB to uint8 (b, H, W) and float32 (b, H, W, C). b may be a
    symbol.
  """

  def program(images: jax.Array) -> tuple[jax.Array, ...]:
    normalised = preprocess(images, jnp.asarray([size]))
    logits = model.apply(variables, normalised, train=False).logits
    # NumPy's: the sizes are fixed.
    rows, columns = (
      resize_matrix(to, now, to, now)
      for to, now in zip(size, logits.shape[1:3], strict=True)
    )
    if probabilities:
      scores = apply_matrices(logits, rows, columns)
      return labels_of(scores), jax.nn.softmax(scores)
    tiles = [
      labels_of(apply_matrices(logits, tile, columns))
      for tile in split_rows(rows, size[1] * logits.shape[-1] * 4)
    ]
    return (jnp.concatenate(tiles, 1),)

  return program


def labels_of(scores: jax.Array) -> jax.Array:
  """The class with the largest score: (B, H, W, C) -> uint8 (B, H, W)."""
  return jnp.argmax(scores, -1).astype(jnp.uint8)


def split_rows(rows: np.ndarray, row_bytes: int) -> list[np.ndarray]:
  """Cuts a matrix (H, h) into tiles of so many rows as `TILE_BYTES` hold.

  Args:
    rows: the matrix.
    row_bytes: of the scores of a row of the result.
  """
  step = max(TILE_BYTES // row_bytes, 1)
  return [rows[i : i + step] for i in range(0, len(rows), step)]
