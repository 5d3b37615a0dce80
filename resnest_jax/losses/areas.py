"""Losses on the overlap of areas: Dice and Lovasz-softmax; see `pixels`."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from resnest_jax.labels import IGNORE
from resnest_jax.losses.tiles import (
  Logits,
  exact,
  exponentials_of,
  one_hot,
  over_tiles,
)
from resnest_jax.models.layers import Array, einsum, resize_matrix


def dice_loss(logits: Array | Logits, labels: Array) -> Array:
  """One minus the mean soft Dice score of the classes that are present.

  A class scores 2 sum(p y) / (sum(p) + sum(y)) over the valid pixels of the
  batch, p being its softmax probability and y whether it is right. In [0, 1].
  """
  logits = exact(logits)
  sums = _class_sums(logits, labels)
  both, predicted, pixels = (jnp.sum(each, 0) for each in sums)
  present = pixels > 0
  total = jnp.where(present, predicted + pixels, 1)
  lost = jnp.where(present, 1 - 2 * both / total, 0)
  return jnp.sum(lost) / jnp.maximum(jnp.sum(present), 1)


# Of p y, p and y, each (B, classes); see `dice_loss`.
@jax.custom_vjp
def _class_sums(logits, labels):
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
  # A second pass: keeping the gradient of each sum would take twice the logits.
  logits, labels = saved
  slopes = given[0][:, None], given[1][:, None]

  def visit(z, label, both, predicted):
    exponentials, total, _ = exponentials_of(z)
    share = exponentials / total
    valid = (label != IGNORE)[..., None]
    slope = jnp.where(one_hot(label, z.shape[-1]), both, 0) + predicted
    slope = jnp.where(valid, slope, 0)
    dz = share * (slope - jnp.sum(share * slope, -1, keepdims=True))
    return (), (), dz

  tiles = over_tiles(visit, logits, labels, known=slopes, with_gradient=True)
  return tiles[2], None


_class_sums.defvjp(_class_sums_forward, _class_sums_backward)


def lovasz_softmax(
  logits: Array | Logits, labels: Array, *, per_image: bool
) -> Array:
  """Lovasz-softmax (Berman et al., arXiv 1705.08790) of classes present.

  `per_image` averages the losses of the images, 0 for one without labelled
  pixels; otherwise the whole batch is sorted together.
  """
  return _lovasz(exact(logits), labels, per_image)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lovasz(logits, labels, per_image):
  return _lovasz_parts(logits, labels, per_image)[0]


def _lovasz_forward(logits, labels, per_image):
  # With slope G_c at a pixel's probability p_c, softmax gives p_c (G_c - S),
  # where the map S = sum_c G_c p_c needs all classes, and so a later pass.
  loss, own, shared = _lovasz_parts(logits, labels, per_image)

  def visit(z, label, slope):
    del label
    exponentials, total, _ = exponentials_of(z)
    return (), (), exponentials * (slope[..., None] / total)

  _, _, rest = over_tiles(visit, logits, labels, (shared,), with_gradient=True)
  return loss, jax.tree.map(jnp.subtract, own, rest)


def _lovasz_backward(per_image, gradient, given):
  del per_image
  return jax.tree.map(lambda x: x * given, gradient), None


_lovasz.defvjp(_lovasz_forward, _lovasz_backward)


def _lovasz_parts(logits, labels, per_image):
  # Returns the loss, p_c G_c at the logits, and S (B, H, W).
  values, aligned = logits.values, logits.align_corners
  batch, h, w, classes = values.shape
  height, width = labels.shape[1:]
  pixels, log_total = _counts_and_log_totals(logits, labels)
  groups = batch if per_image else 1
  present = (pixels if per_image else jnp.sum(pixels, 0, keepdims=True)) > 0
  weights = present / jnp.maximum(jnp.sum(present, 1, keepdims=True), 1)
  dtype = values.dtype
  weights = (weights / groups).astype(dtype)
  rows = resize_matrix(height, h, height, h, dtype, aligned)
  columns = resize_matrix(width, w, width, w, dtype, aligned)
  valid = labels != IGNORE

  def visit(z, index, weight):
    z = einsum('ih,bhw,jw->bij', rows, z, columns)
    share = jnp.exp(z - log_total)
    right = labels == index
    # -1 sorts ignored pixels behind all others, where they change no slope.
    errors = jnp.where(valid, jnp.where(right, 1 - share, share), -1)
    together = errors.reshape(groups, -1), right.reshape(groups, -1)
    slope = jaccard_slopes(*together)
    slope = (slope * weight[:, None]).reshape(labels.shape)
    slope = jnp.where(valid, slope, 0)
    loss = jnp.sum(errors * slope)
    term = share * jnp.where(right, -slope, slope)
    return loss, term, einsum('ih,bij,jw->bhw', rows, term, columns)

  def nothing(z, index, weight):
    del index, weight
    shapes = ((), labels.shape, z.shape)
    return tuple(jnp.zeros(shape, z.dtype) for shape in shapes)

  def add(carry, this):
    z, index, weight = this
    # Sorting takes most of the time; a class that is nowhere skips it.
    present = jnp.any(weight > 0)
    loss, term, own = lax.cond(present, visit, nothing, z, index, weight)
    return (carry[0] + loss, carry[1] + term), own

  begin = jnp.zeros((), dtype), jnp.zeros(labels.shape, dtype)
  each = values.transpose(3, 0, 1, 2), jnp.arange(classes), weights.T
  (loss, shared), own = lax.scan(add, begin, each)
  return loss, Logits(own.transpose(1, 2, 3, 0), aligned), shared


def _counts_and_log_totals(logits, labels):
  # Of each class (B, classes), and log(sum(exp(z))) of each pixel (B, H, W).

  def visit(z, label):
    _, total, largest = exponentials_of(z)
    pixels = jnp.sum(one_hot(label, z.shape[-1]), (0, 2), jnp.int32)
    return pixels, (jnp.log(total) + largest)[..., 0], None

  pixels, log_total, _ = over_tiles(visit, logits, labels)
  return pixels, log_total


def jaccard_slopes(errors: Array, right: Array) -> Array:
  """Each pixel's increment of the Jaccard loss, by decreasing errors.

  `errors` (groups, pixels) are in [0, 1], or -1 for ignored pixels.
  """
  # One int32 carries a pixel's number and its bit through the sort.
  payload = 2 * lax.broadcasted_iota(jnp.int32, errors.shape, 1) + right
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
