"""Losses that are sums over pixels: cross entropy, hard pixels, focal.

All take logits (B, h, w, classes), which are upsampled bilinearly to the size
of the labels, and integer labels (B, H, W), of which 255 is ignored: such a
pixel has no gradient. All are finite for every batch, also for one without a
labelled pixel, whose loss is 0. Sums and counts are those of the whole batch,
on however many devices it lies. docs/training.md has the formulas.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from resnest_jax.labels import IGNORE
from resnest_jax.losses.tiles import exact, exponentials_of, one_hot, over_tiles
from resnest_jax.models.layers import Array


def segmentation_loss(
  logits: Array,
  labels: Array,
  *,
  avg_non_ignore: bool,
  class_weights: tuple[float, ...] | None = None,
  label_smoothing: float = 0.0,
) -> tuple[Array, Array]:
  """Cross entropy and pixel accuracy at the labels' resolution.

  Args:
    logits: (B, h, w, classes).
    labels: int (B, H, W).
    avg_non_ignore: the mean runs over valid pixels only. False, as in
      mmsegmentation's published models: over all pixels, where an ignored
      one counts as a loss of zero.
    class_weights: of each class, >= 0; a mean is then divided by the weights
      of its pixels instead of their number (an ignored pixel weighs 1). None:
      all 1.
    label_smoothing: share of the target that is spread over all classes.

  Returns:
    The scalar loss, in nats, and the share of valid pixels, in [0, 1], where
    no class has a larger logit than the right one. Both are finite for a
    batch without valid pixels. Only the loss has a gradient.
  """
  logits = exact(logits)
  losses, right = _cross_entropy_sums(
    logits, labels, None, class_weights, label_smoothing
  )
  num_valid = jnp.maximum(jnp.sum(labels != IGNORE), 1)
  count = _count(labels, avg_non_ignore, class_weights, logits.dtype)
  return jnp.sum(losses) / count, jnp.sum(right) / num_valid


def pixel_accuracy(logits: Array, labels: Array) -> Array:
  """The accuracy of `segmentation_loss` alone."""
  _, _, right = _confidence(logits, labels, None, 0.0)
  return jnp.sum(right) / jnp.maximum(jnp.sum(labels != IGNORE), 1)


def ohem_cross_entropy(
  logits: Array,
  labels: Array,
  *,
  threshold: float | None,
  min_kept: int,
  avg_non_ignore: bool,
  class_weights: tuple[float, ...] | None = None,
  label_smoothing: float = 0.0,
) -> Array:
  """Cross entropy of the hard pixels (online hard example mining).

  The rule is mmsegmentation's `OHEMPixelSampler`. It keeps `min_kept` times B
  pixels of the whole batch, not so many of every image, and the mean is divided
  as if all were kept.

  Args:
    logits: (B, h, w, classes).
    labels: int (B, H, W).
    threshold: in [0, 1]. Pixels whose right class has a smaller probability
      are kept, and in any case those with the smallest ones, `min_kept` an
      image. None: those with the largest losses, `min_kept` an image.
    min_kept: pixels an image, >= 1. Without a threshold those whose loss
      equals the last one's are kept, too.
    avg_non_ignore: see `segmentation_loss`, as for the rest.
    class_weights: likewise.
    label_smoothing: likewise.

  Returns:
    The scalar loss, in nats.
  """
  logits = exact(logits)
  probability, losses, _ = _confidence(
    logits, labels, class_weights, label_smoothing
  )
  valid = labels != IGNORE
  num_valid = jnp.sum(valid)
  wanted = min(min_kept * labels.shape[0], labels.size)
  if threshold is None:
    # The wanted-th largest is the (num_valid - wanted)-th smallest.
    rank = jnp.maximum(num_valid - wanted, 0)
    keep = losses >= order_statistic(losses, valid, rank)
  else:
    rank = jnp.clip(num_valid - 1, 0, wanted)
    smallest = order_statistic(probability, valid, rank)
    keep = probability < jnp.maximum(smallest, threshold)
  sums, _ = _cross_entropy_sums(
    logits, labels, keep, class_weights, label_smoothing
  )
  count = _count(labels, avg_non_ignore, class_weights, logits.dtype)
  return jnp.sum(sums) / count


def focal_loss(
  logits: Array,
  labels: Array,
  *,
  gamma: float,
  alpha: float,
  activation: str,
  avg_non_ignore: bool,
) -> Array:
  """Focal loss (Lin et al., arXiv 1708.02002), less of what is easy.

  Args:
    logits: (B, h, w, classes).
    labels: int (B, H, W).
    gamma: power of one minus the probability of what is right, >= 0.
    alpha: weight of a pixel's own class, and 1 - alpha of the others, in
      [0, 1]. Softmax does not use it.
    activation: 'sigmoid', every class against the rest, averaged over classes
      (the paper, mmsegmentation), or 'softmax', cross entropy times the factor.
    avg_non_ignore: see `segmentation_loss`.

  Returns:
    The scalar loss, in nats.
  """
  logits = exact(logits)
  sums = _focal_sums(logits, labels, (gamma, alpha, activation))
  return jnp.sum(sums) / _count(labels, avg_non_ignore, None, logits.dtype)


def order_statistic(values: Array, valid: Array, rank: Array) -> Array:
  """The value that `rank` valid ones precede in increasing order.

  It is found bit by bit, counting, because the bits of such numbers have their
  order. That takes no sort, no memory, and of a sharded batch each device
  tells a count alone.

  Args:
    values: floats >= 0, any shape.
    valid: bool, likewise.
    rank: int scalar, below the number of valid values, or 0.

  Returns:
    A scalar; infinity or not a number where nothing is valid.
  """
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
  """What the sum of all pixels' losses is divided by."""
  valid = labels != IGNORE
  if class_weights is None:
    num_valid = jnp.maximum(jnp.sum(valid), 1)
    return num_valid if avg_non_ignore else labels.size
  weights = jnp.asarray(class_weights, dtype)[jnp.where(valid, labels, 0)]
  total = jnp.sum(jnp.where(valid, weights, 0 if avg_non_ignore else 1))
  return jnp.where(total > 0, total, 1)


def _confidence(logits, labels, class_weights, label_smoothing):
  """(B, H, W) of the right class' probability and the loss; right pixels.

  Both are 0 where a pixel is ignored. Nothing has a gradient.
  """

  def visit(z, label):
    loss, picked, log_total, hits, _ = _cross_entropy(
      z, label, None, class_weights, label_smoothing
    )
    probability = jnp.where(label != IGNORE, jnp.exp(picked - log_total), 0)
    return jnp.sum(hits, (0, 2), jnp.int32), (probability, loss), None

  logits = lax.stop_gradient(exact(logits))
  right, (probability, losses), _ = over_tiles(visit, logits, labels)
  return probability, losses, right


def _cross_entropy(z, label, keep, class_weights, label_smoothing):
  """Of a tile: loss, logit of the right class, log of the sum, hits, dz."""
  classes = z.shape[-1]
  exponentials, total, largest = exponentials_of(z)
  valid = label != IGNORE
  if keep is not None:
    valid &= keep
  chosen = one_hot(label, classes)
  picked = jnp.sum(jnp.where(chosen, z, 0), -1)
  hits = valid & (picked == largest[..., 0])
  log_total = jnp.log(total[..., 0]) + largest[..., 0]
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
  # XLA drops it where nobody asks for a gradient.
  dz = exponentials * mass - target
  return jnp.where(valid, loss, 0), picked, log_total, hits, dz


def _visit_cross_entropy(z, label, *keep, class_weights, label_smoothing):
  loss, _, _, hits, dz = _cross_entropy(
    z, label, keep[0] if keep else None, class_weights, label_smoothing
  )
  sums = jnp.sum(loss, (0, 2)), jnp.sum(hits, (0, 2), jnp.int32)
  return sums, (), dz


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cross_entropy_sums(logits, labels, keep, class_weights, label_smoothing):
  """Each image's summed cross entropy and number of right pixels."""
  visit = partial(
    _visit_cross_entropy,
    class_weights=class_weights,
    label_smoothing=label_smoothing,
  )
  maps = () if keep is None else (keep,)
  return over_tiles(visit, logits, labels, maps)[0]


def _cross_entropy_forward(
  logits, labels, keep, class_weights, label_smoothing
):
  # The gradient of the sum costs little more while a tile's exponentials are
  # there, so it is what the backward pass keeps: (B, h, w, classes).
  visit = partial(
    _visit_cross_entropy,
    class_weights=class_weights,
    label_smoothing=label_smoothing,
  )
  maps = () if keep is None else (keep,)
  sums, _, gradient = over_tiles(
    visit, logits, labels, maps, with_gradient=True
  )
  return sums, gradient


def _cross_entropy_backward(class_weights, label_smoothing, gradient, given):
  del class_weights, label_smoothing
  return gradient * given[0][:, None, None, None], None, None


_cross_entropy_sums.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _focal(z, label, gamma, alpha, activation):
  """The focal loss of a tile's pixels, (rows, B, W).

  Everything is written in logarithms of probabilities, so that value and
  gradient are finite whatever the logits are.
  """
  chosen = one_hot(label, z.shape[-1])
  if activation == 'sigmoid':
    margin = jnp.where(chosen, z, -z)
    share = jnp.where(chosen, alpha, 1 - alpha)
    # -log(p) is softplus(-margin), -log(1 - p) is softplus(margin).
    factor = jnp.exp(-gamma * jax.nn.softplus(margin))
    loss = jnp.mean(share * factor * jax.nn.softplus(-margin), -1)
  else:
    log_total = jax.nn.logsumexp(z, -1)
    others = jax.nn.logsumexp(jnp.where(chosen, -jnp.inf, z), -1)
    picked = jnp.sum(jnp.where(chosen, z, 0), -1)
    loss = jnp.exp(gamma * (others - log_total)) * (log_total - picked)
  return jnp.where(label != IGNORE, loss, 0)


def _visit_focal(z, label, *, options):
  loss, pull = jax.vjp(lambda z: _focal(z, label, *options), z)
  return jnp.sum(loss, (0, 2)), (), pull(jnp.ones_like(loss))[0]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _focal_sums(logits, labels, options):
  """Each image's summed focal loss."""
  return over_tiles(partial(_visit_focal, options=options), logits, labels)[0]


def _focal_forward(logits, labels, options):
  visit = partial(_visit_focal, options=options)
  sums, _, gradient = over_tiles(visit, logits, labels, with_gradient=True)
  return sums, gradient


def _focal_backward(options, gradient, given):
  del options
  return gradient * given[:, None, None, None], None


_focal_sums.defvjp(_focal_forward, _focal_backward)
