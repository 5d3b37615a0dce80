"""Losses that are sums over pixels: cross entropy, hard pixels, focal.

Logits (B, h, w, classes) are upsampled bilinearly to the size of the labels,
int (B, H, W), corners not aligned unless a `Logits` says so; 255 is ignored and
gives no gradient. Losses are scalars in nats over the whole batch, on any
number of devices; they are finite, and 0 without a labelled pixel.
docs/training.md has the formulas.
"""

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
from resnest_jax.models.layers import Array


def segmentation_loss(
  logits: Array | Logits,
  labels: Array,
  *,
  avg_non_ignore: bool,
  class_weights: tuple[float, ...] | None = None,
  label_smoothing: float = 0.0,
) -> tuple[Array, Array]:
  """Cross entropy and pixel accuracy at the labels' resolution.

  Args:
    avg_non_ignore: averages over valid pixels. False, as in mmsegmentation's
      published models: over all pixels, ignored ones as 0.
    class_weights: one >= 0 for each class; the mean is weighted, ignored pixels
      weigh 1. None: all 1.
    label_smoothing: share of the target that is spread over all classes.

  Returns:
    The loss, and the share in [0, 1] of valid pixels where no logit exceeds the
    right class's. Only the loss has a gradient.
  """
  logits = exact(logits)
  target = class_weights, label_smoothing
  visit = partial(_visit_cross_entropy, target=target)
  losses, right = _sums(visit, logits, labels)
  num_valid = jnp.maximum(jnp.sum(labels != IGNORE), 1)
  count = _count(labels, avg_non_ignore, class_weights, losses.dtype)
  return jnp.sum(losses) / count, jnp.sum(right) / num_valid


def pixel_accuracy(logits: Array | Logits, labels: Array) -> Array:
  """Accuracy as in `segmentation_loss`, without the loss."""
  _, _, right = _confidence(logits, labels)
  return jnp.sum(right) / jnp.maximum(jnp.sum(labels != IGNORE), 1)


def ohem_cross_entropy(
  logits: Array | Logits,
  labels: Array,
  *,
  threshold: float | None,
  min_kept: int,
  avg_non_ignore: bool,
  class_weights: tuple[float, ...] | None = None,
  label_smoothing: float = 0.0,
) -> Array:
  """Cross entropy of the hard pixels (online hard example mining).

  The rule is mmsegmentation's `OHEMPixelSampler`; other arguments are those of
  `segmentation_loss`.

  Args:
    threshold: in [0, 1]; keeps pixels whose right class is less probable, and
      at least the `min_kept` * B least probable ones. None: keeps the
      `min_kept` * B largest losses of the batch, and those equal to the last.
    min_kept: pixels per image, >= 1, counted over the whole batch.
  """
  logits = exact(logits)
  target = class_weights, label_smoothing
  probability, losses, _ = _confidence(logits, labels, target)
  valid = labels != IGNORE
  num_valid = jnp.sum(valid)
  wanted = min(min_kept * labels.shape[0], labels.size)
  if threshold is None:
    rank = jnp.maximum(num_valid - wanted, 0)
    keep = losses >= order_statistic(losses, valid, rank)
  else:
    rank = jnp.clip(num_valid - 1, 0, wanted)
    smallest = order_statistic(probability, valid, rank)
    keep = probability < jnp.maximum(smallest, threshold)
  visit = partial(_visit_cross_entropy, target=target)
  sums, _ = _sums(visit, logits, labels, (keep,))
  # Divided as if all pixels were kept, as in mmsegmentation.
  count = _count(labels, avg_non_ignore, class_weights, losses.dtype)
  return jnp.sum(sums) / count


def focal_loss(
  logits: Array | Logits,
  labels: Array,
  *,
  gamma: float,
  alpha: float,
  activation: str,
  avg_non_ignore: bool,
) -> Array:
  """Focal loss (Lin et al., arXiv 1708.02002); cf. `segmentation_loss`.

  Args:
    gamma: power of one minus the probability of the right answer, >= 0.
    alpha: weight in [0, 1] of a pixel's own class; 1 - alpha is the others'.
      Softmax ignores it.
    activation: 'sigmoid', each class against the rest, averaged over classes
      (the paper, mmsegmentation), or 'softmax', cross entropy times the factor.
  """
  logits = exact(logits)
  visit = partial(_visit_focal, options=(gamma, alpha, activation))
  (sums,) = _sums(visit, logits, labels)
  return jnp.sum(sums) / _count(labels, avg_non_ignore, None, sums.dtype)


def order_statistic(values: Array, valid: Array, rank: Array) -> Array:
  """The valid value, >= 0, that `rank` valid ones precede in increasing order.

  Without any valid value the result is infinity or not a number.
  """
  # Floats >= 0 are ordered as their bits are, so the value is found bit by bit.
  # That needs no sort, and devices exchange one count for each bit.
  bits = jnp.finfo(values.dtype).bits
  kind = {32: jnp.uint32, 64: jnp.uint64}[bits]
  # A zero may carry a sign, which would make it the largest.
  codes = lax.bitcast_convert_type(jnp.abs(values), kind)

  def decide(index, code):
    larger = code | (kind(1) << (bits - 2 - index).astype(kind))
    below = jnp.sum(valid & (codes < larger))
    return jnp.where(below <= rank, larger, code)

  code = lax.fori_loop(0, bits - 1, decide, kind(0))
  return lax.bitcast_convert_type(code, values.dtype)


def _count(labels, avg_non_ignore, class_weights, dtype):
  valid = labels != IGNORE
  if class_weights is None:
    num_valid = jnp.maximum(jnp.sum(valid), 1)
    return num_valid if avg_non_ignore else labels.size
  weights = jnp.asarray(class_weights, dtype)[jnp.where(valid, labels, 0)]
  total = jnp.sum(jnp.where(valid, weights, 0 if avg_non_ignore else 1))
  return jnp.where(total > 0, total, 1)


def _confidence(logits, labels, target=(None, 0.0)):
  # Maps (B, H, W) of the right class's probability and of the loss, and each
  # image's number of right pixels; no gradients.

  def visit(z, label):
    loss, picked, log_total, hits, _ = _cross_entropy(z, label, *target)
    probability = jnp.where(label != IGNORE, jnp.exp(picked - log_total), 0)
    return jnp.sum(hits, (0, 2), jnp.int32), (probability, loss), None

  logits = lax.stop_gradient(exact(logits))
  right, (probability, losses), _ = over_tiles(visit, logits, labels)
  return probability, losses, right


def _cross_entropy(z, label, class_weights, label_smoothing, keep=None):
  # A tile's loss, logit of the right class, log(sum(exp(z))), hits, gradient.
  classes = z.shape[-1]
  exponentials, total, largest = exponentials_of(z)
  valid = label != IGNORE
  if keep is not None:
    valid &= keep
  chosen = one_hot(label, classes)
  picked = jnp.sum(jnp.where(chosen, z, 0), -1)
  hits = valid & (picked == largest[..., 0])
  log_total = jnp.log(total[..., 0]) + largest[..., 0]
  # The plain loss needs neither a sum over classes nor targets' weights.
  if class_weights is None and not label_smoothing:
    loss = log_total - picked
    mass = jnp.where(valid[..., None], 1 / total, 0)
    chosen = chosen if keep is None else chosen & keep[..., None]
    target = jnp.where(chosen, 1, 0).astype(z.dtype)
  else:
    weights = jnp.asarray(class_weights or (1.0,) * classes, z.dtype)
    target = jnp.where(chosen, (1 - label_smoothing) * weights, 0)
    target += label_smoothing / classes * weights
    target = jnp.where(valid[..., None], target, 0)
    loss = jnp.sum(target * (log_total[..., None] - z), -1)
    mass = jnp.sum(target, -1, keepdims=True) / total
  dz = exponentials * mass - target
  return jnp.where(valid, loss, 0), picked, log_total, hits, dz


def _visit_cross_entropy(z, label, *keep, target):
  loss, _, _, hits, dz = _cross_entropy(z, label, *target, *keep)
  sums = jnp.sum(loss, (0, 2)), jnp.sum(hits, (0, 2), jnp.int32)
  return sums, (), dz


def _focal(z, label, gamma, alpha, activation):
  # In logarithms: finite for logits of any size.
  chosen = one_hot(label, z.shape[-1])
  if activation == 'sigmoid':
    margin = jnp.where(chosen, z, -z)
    share = jnp.where(chosen, alpha, 1 - alpha)
    # -log(p) is softplus(-margin).
    factor = jnp.exp(-gamma * jax.nn.softplus(margin))
    loss = jnp.mean(share * factor * jax.nn.softplus(-margin), -1)
  else:
    log_total = jax.nn.logsumexp(z, -1)
    others = jax.nn.logsumexp(jnp.where(chosen, -jnp.inf, z), -1)
    picked = jnp.sum(jnp.where(chosen, z, 0), -1)
    loss = jnp.exp(gamma * (others - log_total)) * (log_total - picked)
  return jnp.where(label != IGNORE, loss, 0)


def _visit_focal(z, label, *, options):
  # Differentiated by JAX, within a tile, where the intermediates are small.
  loss, pull = jax.vjp(lambda z: _focal(z, label, *options), z)
  return (jnp.sum(loss, (0, 2)),), (), pull(jnp.ones_like(loss))[0]


# Each image's sums over its pixels, of which the first has a gradient.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(visit, logits, labels, maps=()):
  return over_tiles(visit, logits, labels, maps)[0]


def _sums_forward(visit, logits, labels, maps):
  # While a tile's exponentials exist, the sum's gradient costs little more.
  sums, _, gradient = over_tiles(
    visit, logits, labels, maps, with_gradient=True
  )
  return sums, gradient


def _sums_backward(visit, gradient, given):
  del visit
  slopes = given[0][:, None, None, None]
  return jax.tree.map(lambda x: x * slopes, gradient), None, None


_sums.defvjp(_sums_forward, _sums_backward)
