"""Mixup (Zhang et al., arXiv 1710.09412) of images and targets."""

from typing import NamedTuple

import jax

from resnest_jax.models.layers import Array

# Folded into the key of a step, which is also that of its dropout.
_DRAW = 1


def mix(x: Array, weights: Array) -> Array:
  """Adds each of x (B, ...) to its partner, by its group's weight, (G,).

  A partner is the one at the same place of the group from its end. This one
  weighs `weights`, the partner the rest.
  """
  groups = x.reshape(len(weights), -1, *x.shape[1:])
  weights = weights.astype(x.dtype).reshape(-1, *(1,) * x.ndim)
  mixed = weights * groups + (1 - weights) * groups[:, ::-1]
  return mixed.reshape(x.shape)


class Mixing(NamedTuple):
  """What a classifier's step does with a normalised batch."""

  num_classes: int
  alpha: float  # Of both parameters of the Beta distribution; 0: not mixed.
  group: int  # Consecutive images with the same weight, as in `mix`; 0: all.

  def __call__(
    self, images: Array, labels: Array, key: Array
  ) -> tuple[Array, Array]:
    """Images (B, ...), and targets (B, classes) of labels int (B,)."""
    targets = jax.nn.one_hot(labels, self.num_classes, dtype=images.dtype)
    if not self.alpha:
      return images, targets
    groups = len(images) // (self.group or len(images))
    key = jax.random.fold_in(key, _DRAW)
    weights = jax.random.beta(key, self.alpha, self.alpha, (groups,))
    return mix(images, weights), mix(targets, weights)
