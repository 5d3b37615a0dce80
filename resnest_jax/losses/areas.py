"""Losses that stand for the overlap of areas: Dice and Lovasz-softmax.

As in `losses`, logits (B, h, w, classes) are upsampled to the size of the
labels (B, H, W) without ever existing there, 255 is ignored, a batch without a
labelled pixel costs 0, and sums are those of the whole batch.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from resnest_jax.labels import IGNORE
from resnest_jax.losses.tiles import (
  einsum,
  exact,
  exponentials_of,
  one_hot,
  over_tiles,
)
from resnest_jax.models.layers import Array, resize_matrix


def dice_loss(logits: Array, labels: Array) -> Array:
  """One minus the mean soft Dice score of the classes that are present.

  A class' score is 2 sum(p y) / (sum(p) + sum(y)): p its softmax probability,
  y whether it is right, summed over the valid pixels of the whole batch.
  Classes of which the batch has no pixel take no part.

  Args:
    logits: (B, h, w, classes).
    labels: int (B, H, W).

  Returns:
    The scalar loss, in [0, 1].
  """
  logits = exact(logits)
  both, predicted, pixels = (
    jnp.sum(sums, 0) for sums in _class_sums(logits, labels)
  )
  present = pixels > 0
  total = jnp.where(present, predicted + pixels, 1)
  lost = jnp.where(present, 1 - 2 * both / total, 0)
  return jnp.sum(lost) / jnp.maximum(jnp.sum(present), 1)


@jax.custom_vjp
def _class_sums(logits, labels):
  """Each image's sums (B, classes) of p y, p and y; see `dice_loss`."""

  def visit(z, label):
    exponentials, total, _ = exponentials_of(z)
    chosen = one_hot(label, z.shape[-1])
    share = jnp.where((label != IGNORE)[..., None], exponentials / total, 0)
    both = jnp.sum(jnp.where(chosen, share, 0), (0, 2))
    return (both, jnp.sum(share, (0, 2)), jnp.sum(chosen, (0, 2))), (), None

  return over_tiles(visit, logits, labels)[0]


def _class_sums_forward(logits, labels):
  return _class_sums(logits, labels), (logits, labels)


def _class_sums_backward(saved, given):
  """A second pass, because the weights of the sums are known after the first.

  Saves (B, h, w, classes) for each of the sums.
  """
  logits, labels = saved
  both, predicted = given[0][:, None], given[1][:, None]

  def visit(z, label):
    exponentials, total, _ = exponentials_of(z)
    share = exponentials / total
    valid = (label != IGNORE)[..., None]
    slope = jnp.where(one_hot(label, z.shape[-1]), both, 0) + predicted
    slope = jnp.where(valid, slope, 0)
    dz = share * (slope - jnp.sum(share * slope, -1, keepdims=True))
    return (), (), dz

  return over_tiles(visit, logits, labels, with_gradient=True)[2], None


_class_sums.defvjp(_class_sums_forward, _class_sums_backward)


def lovasz_softmax(logits: Array, labels: Array, *, per_image: bool) -> Array:
  """Lovasz-softmax (Berman et al., arXiv 1705.08790), classes present.

  The Lovasz extension of one minus IoU: a class' errors |y - p| are sorted,
  and each is weighted by what it would add to the Jaccard loss, were it the
  next one to be wrong. The mean is taken over the classes that are present.

  It goes class by class, so it holds some maps (B, H, W) and twice the logits
  (B, h, w, classes), not all probabilities. Sorting takes most of the time; a
  class that is nowhere in the batch is passed over.

  Args:
    logits: (B, h, w, classes).
    labels: int (B, H, W).
    per_image: each image has a loss of its own, and they are averaged; an
      image without a labelled pixel has 0. Then no device needs the pixels of
      another. False: one sort over the pixels of the whole batch.

  Returns:
    The scalar loss, in [0, 1].
  """
  return _lovasz(exact(logits), labels, per_image)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lovasz(logits, labels, per_image):
  return _lovasz_parts(logits, labels, per_image)[0]


def _lovasz_forward(logits, labels, per_image):
  """The gradient is what the backward pass keeps.

  The loss is linear in the probabilities once the order is known: let G_c be
  its slope at a pixel's probability of class c. Softmax turns that into
  p_c (G_c - S) with S = sum_c G_c p_c, a map. So the first term is upsampled
  backwards class by class, and the second one in tiles, when S is there.
  """
  loss, own, shared = _lovasz_parts(logits, labels, per_image)

  def visit(z, label, slope):
    del label
    exponentials, total, _ = exponentials_of(z)
    return (), (), exponentials * (slope[..., None] / total)

  _, _, rest = over_tiles(visit, logits, labels, (shared,), with_gradient=True)
  return loss, own - rest


def _lovasz_backward(per_image, gradient, given):
  del per_image
  return gradient * given, None


_lovasz.defvjp(_lovasz_forward, _lovasz_backward)


def _lovasz_parts(logits, labels, per_image):
  """The loss, sum over pixels of p_c G_c (B, h, w, classes), and S."""
  batch, h, w, classes = logits.shape
  height, width = labels.shape[1:]
  pixels, log_total = _counts_and_log_totals(logits, labels)
  groups = batch if per_image else 1
  present = (pixels if per_image else jnp.sum(pixels, 0, keepdims=True)) > 0
  weights = present / jnp.maximum(jnp.sum(present, 1, keepdims=True), 1)
  weights = (weights / groups).astype(logits.dtype)
  rows = resize_matrix(height, h, height, h, logits.dtype)
  columns = resize_matrix(width, w, width, w, logits.dtype)
  valid = labels != IGNORE

  def visit(z, index, weight):
    """Of one class: its loss, its term of S, its p_c G_c at (B, h, w)."""
    z = einsum('ih,bhw,jw->bij', rows, z, columns)
    share = jnp.exp(z - log_total)
    right = labels == index
    errors = jnp.where(valid, jnp.where(right, 1 - share, share), -1)
    slope = jaccard_slopes(
      errors.reshape(groups, -1), right.reshape(groups, -1)
    )
    slope = (slope * weight[:, None]).reshape(labels.shape)
    slope = jnp.where(valid, slope, 0)
    loss = jnp.sum(errors * slope)
    term = share * jnp.where(right, -slope, slope)
    return loss, term, einsum('ih,bij,jw->bhw', rows, term, columns)

  def nothing(z, index, weight):
    del index, weight
    return (
      jnp.zeros((), z.dtype),
      jnp.zeros(labels.shape, z.dtype),
      jnp.zeros_like(z),
    )

  def add(carry, this):
    z, index, weight = this
    loss, term, own = lax.cond(
      jnp.any(weight > 0), visit, nothing, z, index, weight
    )
    return (carry[0] + loss, carry[1] + term), own

  begin = jnp.zeros((), logits.dtype), jnp.zeros(labels.shape, logits.dtype)
  (loss, shared), own = lax.scan(
    add,
    begin,
    (logits.transpose(3, 0, 1, 2), jnp.arange(classes), weights.T),
  )
  return loss, own.transpose(1, 2, 3, 0), shared


def _counts_and_log_totals(logits, labels):
  """Pixels (B, classes), and log(sum(exp(z))) of each pixel (B, H, W)."""

  def visit(z, label):
    _, total, largest = exponentials_of(z)
    pixels = jnp.sum(one_hot(label, z.shape[-1]), (0, 2), jnp.int32)
    return pixels, (jnp.log(total) + largest)[..., 0], None

  pixels, log_total, _ = over_tiles(visit, logits, labels)
  return pixels, log_total


def jaccard_slopes(errors: Array, right: Array) -> Array:
  """What each pixel adds to the Jaccard loss, in the order of the errors.

  Args:
    errors: (groups, pixels) in [0, 1], or -1 for a pixel that does not exist.
    right: bool, likewise: pixels of the class.

  Returns:
    (groups, pixels); of a pixel that does not exist nothing in particular.
  """
  numbers = lax.broadcasted_iota(jnp.int32, errors.shape, 1)
  payload = 2 * numbers + right
  _, payload = lax.sort((-errors, payload), num_keys=1, is_stable=True)
  own = payload % 2
  total = jnp.sum(own, 1, keepdims=True)
  intersection = (total - jnp.cumsum(own, 1)).astype(errors.dtype)
  union = (total + jnp.cumsum(1 - own, 1)).astype(errors.dtype)
  # The differences of 1 - intersection / union, without its cancellation.
  others = intersection / union / jnp.maximum(union - 1, 1)
  slopes = jnp.where(own == 1, 1 / union, others)

  def back(places: Array, slopes: Array) -> Array:
    return jnp.zeros_like(slopes).at[places].set(slopes, unique_indices=True)

  return jax.vmap(back)(payload // 2, slopes)
