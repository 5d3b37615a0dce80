"""Pixel-wise cross entropy of upsampled logits, in tiles of rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

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

  Columns are upsampled beforehand, a tile's rows on the way. Sums stay apart
  for each image: on a sharded batch nothing is exchanged inside the loop.
  """
  batch, h, w, classes = logits.shape
  height, width = labels.shape[1:]
  rows = max(height // h, 1)
  tiles = -(-height // rows)
  missing = tiles * rows - height
  row_matrix = resize_matrix(height, h, height, h, logits.dtype)
  row_matrix = np.pad(row_matrix, ((0, missing), (0, 0)))
  row_matrix = row_matrix.reshape(tiles, rows, h)
  columns = resize_matrix(width, w, width, w, logits.dtype)
  labels = jnp.pad(
    labels, ((0, 0), (0, missing), (0, 0)), constant_values=IGNORE
  )
  labels = labels.reshape(batch, tiles, rows, width).swapaxes(0, 1)
  einsum = partial(jnp.einsum, precision='highest')
  wide = einsum('bhwc,jw->bhjc', logits, columns)

  def tile(carry, this):
    losses, right, gradient = carry
    matrix, label = this
    z = einsum('ih,bhjc->bijc', matrix, wide)
    largest = jnp.max(z, -1, keepdims=True)
    exponentials = jnp.exp(z - largest)
    total = jnp.sum(exponentials, -1, keepdims=True)
    valid = label != IGNORE
    # A comparison, not a gather: it fuses and stays local.
    chosen = label[..., None] == jnp.arange(classes)
    picked = jnp.sum(jnp.where(chosen, z, 0), -1)
    loss = jnp.log(total[..., 0]) + largest[..., 0] - picked
    losses += jnp.sum(jnp.where(valid, loss, 0), (1, 2))
    hits = valid & (picked == largest[..., 0])
    right += jnp.sum(hits, (1, 2), jnp.int32)
    if with_gradient:
      share = exponentials * jnp.where(valid[..., None], 1 / total, 0)
      dz = share - jnp.where(chosen, 1, 0).astype(z.dtype)
      gradient += einsum('ih,bijc->bhjc', matrix, dz)
    return (losses, right, gradient), None

  start = (
    jnp.zeros(batch, logits.dtype),
    jnp.zeros(batch, jnp.int32),
    jnp.zeros_like(wide) if with_gradient else None,
  )
  (losses, right, gradient), _ = jax.lax.scan(tile, start, (row_matrix, labels))
  if with_gradient:
    gradient = einsum('bhjc,jw->bhwc', gradient, columns)
  return (losses, right), gradient
