"""Pixel-wise cross entropy of upsampled logits, in tiles of rows."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnest_jax.models.layers import Array, at_least_float32, resize_matrix

IGNORE = 255


def segmentation_loss(
  logits: Array, labels: Array, *, avg_non_ignore: bool
) -> tuple[Array, Array]:
  """Cross entropy and pixel accuracy at the labels' resolution.

  Args:
    logits: (B, h, w, classes); upsampled bilinearly to the labels' size.
    labels: int (B, H, W); 255 is ignored, 0 .. classes - 1 are classes.
    avg_non_ignore: the mean runs over valid pixels only. False, as in
      mmsegmentation's published models: over all pixels, where an ignored
      one counts as a loss of zero.

  Returns:
    The scalar loss, in nats, and the share of valid pixels, in [0, 1], where
    no class has a larger logit than the right one. Both are finite for a
    batch without valid pixels. Only the loss has a gradient.
  """
  logits = logits.astype(at_least_float32(logits.dtype))
  losses, right = _image_sums(logits, labels)
  num_valid = jnp.maximum(jnp.sum(labels != IGNORE), 1)
  count = num_valid if avg_non_ignore else labels.size
  return jnp.sum(losses) / count, jnp.sum(right) / num_valid


@jax.custom_vjp
def _image_sums(logits: Array, labels: Array) -> tuple[Array, Array]:
  """Each image's summed cross entropy and number of right pixels."""
  return _in_tiles(logits, labels, with_gradient=False)[0]


def _image_sums_forward(logits, labels):
  # The gradient of the sum costs little more while a tile's exponentials are
  # there, so it is what the backward pass keeps: (B, h, w, classes).
  return _in_tiles(logits, labels, with_gradient=True)


def _image_sums_backward(gradient, cotangents):
  return gradient * cotangents[0][:, None, None, None], None


_image_sums.defvjp(_image_sums_forward, _image_sums_backward)


def _in_tiles(logits, labels, *, with_gradient):
  """Goes over tiles of rows, so that the upsampled logits never exist.

  Columns are upsampled beforehand, a tile's rows on the way, from the few rows
  of logits that they lie between. Rows come first, so that these products need
  no transposition; sums stay apart for each image, so that on a sharded batch
  nothing is exchanged inside the loop.
  """
  batch, h, w, classes = logits.shape
  height, width = labels.shape[1:]
  rows = max(height // h, 1)
  bands, starts = row_bands(height, h, rows, logits.dtype)
  tiles, _, taps = bands.shape
  missing = tiles * rows - height
  labels = jnp.pad(
    labels, ((0, 0), (0, missing), (0, 0)), constant_values=IGNORE
  )
  labels = labels.reshape(batch, tiles, rows, width).transpose(1, 2, 0, 3)
  einsum = partial(jnp.einsum, precision='highest')
  columns = resize_matrix(width, w, width, w, logits.dtype)
  wide = einsum('bhwc,jw->hbjc', logits, columns)

  def tile(carry, this):
    losses, right, gradient = carry
    band, start, label = this
    source = lax.dynamic_slice_in_dim(wide, start, taps)
    z = einsum('ik,kbjc->ibjc', band, source)
    largest = jnp.max(z, -1, keepdims=True)
    exponentials = jnp.exp(z - largest)
    total = jnp.sum(exponentials, -1, keepdims=True)
    valid = label != IGNORE
    # A comparison, not a gather: it fuses and stays local.
    chosen = label[..., None] == jnp.arange(classes)
    picked = jnp.sum(jnp.where(chosen, z, 0), -1)
    loss = jnp.log(total[..., 0]) + largest[..., 0] - picked
    losses += jnp.sum(jnp.where(valid, loss, 0), (0, 2))
    hits = valid & (picked == largest[..., 0])
    right += jnp.sum(hits, (0, 2), jnp.int32)
    if with_gradient:
      share = exponentials * jnp.where(valid[..., None], 1 / total, 0)
      dz = share - jnp.where(chosen, 1, 0).astype(z.dtype)
      before = lax.dynamic_slice_in_dim(gradient, start, taps)
      gradient = lax.dynamic_update_slice_in_dim(
        gradient, before + einsum('ik,ibjc->kbjc', band, dz), start, 0
      )
    return (losses, right, gradient), None

  begin = (
    jnp.zeros(batch, logits.dtype),
    jnp.zeros(batch, jnp.int32),
    jnp.zeros_like(wide) if with_gradient else None,
  )
  (losses, right, gradient), _ = lax.scan(tile, begin, (bands, starts, labels))
  if with_gradient:
    gradient = einsum('hbjc,jw->bhwc', gradient, columns)
  return (losses, right), gradient


def row_bands(
  height: int, h: int, rows: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
  """The rows of a bilinear upsampling matrix, cut to what is not zero.

  Args:
    height: outputs.
    h: inputs.
    rows: outputs of a tile.
    dtype: of the weights.

  Returns:
    Weights (tiles, rows, taps), zero for outputs beyond `height`, and the
    first input (tiles,) that each tile takes.
  """
  tiles = -(-height // rows)
  matrix = resize_matrix(height, h, tiles * rows, h, dtype)
  matrix = matrix.reshape(tiles, rows, h)
  used = [np.flatnonzero(tile.any(0)) for tile in matrix]
  taps = max(inputs[-1] - inputs[0] + 1 for inputs in used)
  starts = np.asarray([min(inputs[0], h - taps) for inputs in used], np.int32)
  bands = [
    tile[:, start : start + taps]
    for tile, start in zip(matrix, starts, strict=True)
  ]
  return np.stack(bands), starts
