"""The loss of classifiers, one number for each image."""

import jax
import jax.numpy as jnp

from resnest_jax.models.layers import Array, at_least_float32


def image_loss(
  logits: Array, targets: Array, label_smoothing: float = 0.0
) -> tuple[Array, Array, dict[str, Array]]:
  """Cross entropy against shares of classes, the mean of the images.

  Logits and targets are (B, classes), and targets add up to 1 for each image;
  `label_smoothing` is the share that is spread over all classes. Gives the loss
  in nats, at least float32; the accuracy in [0, 1], the share that the class
  with the largest logit has of the target; and no terms.
  """
  logits = logits.astype(at_least_float32(logits.dtype))
  targets = targets.astype(logits.dtype)
  classes = logits.shape[-1]
  smooth = (1 - label_smoothing) * targets + label_smoothing / classes
  loss = -jnp.mean(jnp.sum(smooth * jax.nn.log_softmax(logits), -1))
  # Not taken by index: XLA would gather the targets of all devices.
  best = jax.nn.one_hot(jnp.argmax(logits, -1), classes, dtype=logits.dtype)
  return loss, jnp.mean(jnp.sum(targets * best, -1)), {}
