"""From pictures to label maps or features, as functions of fixed size.

Label maps are those of the protocol `whole` without a resize of the picture.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnest_jax.data.preprocess import IMAGENET, Normalization, preprocess
from resnest_jax.inference.label_maps import tempered
from resnest_jax.models.classifier import Classifier
from resnest_jax.models.features import Features
from resnest_jax.models.layers import apply_matrices, resize_matrix

# Scores of one picture that exist at a time without `probabilities`. Those of
# 150 classes at 2048 x 1024 would take 1.3 GB.
TILE_BYTES = 16 * 2**20

Program = Callable[[jax.Array], tuple[jax.Array, ...]]


def make_program(
  model: nn.Module,
  variables: Mapping[str, Any],
  size: tuple[int, int],
  *,
  probabilities: bool = False,
  normalization: Normalization = IMAGENET,
  temperature: float = 1.0,
) -> Program:
  """Makes a function of pictures, with the variables as constants.

  `model` is a network or `Features` in float32, `size` is (height, width) in
  pixels, `normalization` and the `temperature` of probabilities are those of
  the weights.

  Returns:
    Of `Features` program(images) -> their values, finest first. Of a classifier
    program(images) -> (probabilities,), float32 (b, classes). Of a segmentor
    program(images) -> (labels,) or (labels, probabilities): uint8 (b, H, W, 3)
    RGB -> uint8 (b, H, W), float32 (b, H, W, C). b may be symbolic. Other bands
    are as `normalization` has them.
  """

  def program(images: jax.Array) -> tuple[jax.Array, ...]:
    normalised = preprocess(
      images, jnp.asarray([size]), normalization=normalization
    )
    found = model.apply(variables, normalised, train=False)
    if isinstance(model, Features):
      return tuple(found.values())
    if isinstance(model, Classifier):
      return (jax.nn.softmax(tempered(found, temperature)),)
    logits = found.logits
    # NumPy constants, (H, h) and (W, w).
    aligned = model.decode_head.align_corners
    rows, columns = (
      resize_matrix(to, now, to, now, align_corners=aligned)
      for to, now in zip(size, logits.shape[1:3], strict=True)
    )
    if probabilities:
      scores = apply_matrices(logits, rows, columns)
      return labels_of(scores), jax.nn.softmax(tempered(scores, temperature))
    # Rows of the result are independent, so each tile's labels are final.
    step = max(TILE_BYTES // (size[1] * logits.shape[-1] * 4), 1)
    tiles = [
      labels_of(apply_matrices(logits, rows[i : i + step], columns))
      for i in range(0, size[0], step)
    ]
    return (jnp.concatenate(tiles, 1),)

  return program


def labels_of(scores: jax.Array) -> jax.Array:
  """The class with the largest score: (B, H, W, C) -> uint8 (B, H, W)."""
  return jnp.argmax(scores, -1).astype(jnp.uint8)
