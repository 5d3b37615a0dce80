"""From pictures to label maps or features, as functions of one shape.

Label maps are those of the protocol `whole` without a resize of the picture.
Pictures have that shape or, on a canvas, any size up to it. That of a free
canvas is not known before it runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export

from resnest_jax.data.preprocess import IMAGENET, Normalization, preprocess
from resnest_jax.inference.label_maps import tempered
from resnest_jax.labels import IGNORE
from resnest_jax.models.classifier import Classifier
from resnest_jax.models.features import Features
from resnest_jax.models.heads import DeepLabV3PlusHead
from resnest_jax.models.layers import (
  apply_matrices,
  resize_matrices,
  strided,
  true_pixels,
)

# Scores of one picture that exist at a time without `probabilities`. Those of
# 150 classes at 2048 x 1024 would take 1.3 GB.
TILE_BYTES = 16 * 2**20

# Inputs of a canvas, besides pictures: true sizes of each, int32 (b,). These
# names and those of the outputs are a contract with programs of others.
SIZES = ('heights', 'widths')
FREE = 'free'  # Instead of a canvas's size.

Program = Callable[..., tuple[jax.Array, ...]]


def make_program(
  model: nn.Module,
  variables: Mapping[str, Any],
  size: tuple[int, int] | None,
  *,
  probabilities: bool = False,
  normalization: Normalization = IMAGENET,
  temperature: float = 1.0,
) -> Program:
  """Makes a function of pictures, with the variables as constants.

  `model` is a network or `Features` in float32, `size` is (height, width) in
  pixels, None of a free canvas, `normalization` and the `temperature` of
  probabilities are those of the weights.

  Returns:
    Of `Features` program(images) -> their values, finest first. Of a classifier
    program(images) -> (probabilities,), float32 (b, classes). Of a segmentor
    program(images) -> (labels,) or (labels, probabilities): uint8 (b, H, W, 3)
    RGB -> uint8 (b, H, W), float32 (b, H, W, C). b may be symbolic. Other bands
    are as `normalization` has them. With true `SIZES` a segmentor takes `size`
    as a canvas: each picture lies in the upper left corner, and around it
    labels are `IGNORE` and probabilities 0.
  """

  def program(images: jax.Array, *sizes: jax.Array) -> tuple[jax.Array, ...]:
    true = jnp.concatenate([x[:, None] for x in sizes], 1) if sizes else None
    within = jnp.asarray([size]) if true is None else true
    canvas = size or images.shape[1:3]
    normalised = preprocess(images, within, normalization=normalization)
    more = {} if true is None else {'size': true}
    found = model.apply(variables, normalised, train=False, **more)
    if isinstance(model, Features):
      return tuple(found.values())
    if isinstance(model, Classifier):
      return (jax.nn.softmax(tempered(found, temperature)),)
    logits, given = found.logits, found.logits.shape[1:3]
    plus = isinstance(model.decode_head, DeepLabV3PlusHead)
    small = strided(true, 4 if plus else model.backbone.output_stride)
    # NumPy constants, (H, h) and (W, w), unless true sizes are data.
    aligned = model.decode_head.align_corners
    lengths = given, canvas, small, true
    rows, columns = resize_matrices(*lengths, jnp.float32, aligned)
    if probabilities or size is None:  # A symbolic length has no tiles.
      scores = apply_matrices(logits, rows, columns)
      outputs = [labels_of(scores)]
      if probabilities:
        outputs.append(jax.nn.softmax(tempered(scores, temperature)))
    else:
      # Rows of the result are independent, so each tile's labels are final.
      step = max(TILE_BYTES // (size[1] * logits.shape[-1] * 4), 1)
      tiles = [
        labels_of(apply_matrices(logits, rows[..., i : i + step, :], columns))
        for i in range(0, size[0], step)
      ]
      outputs = [jnp.concatenate(tiles, 1)]
    return tuple(outputs) if true is None else _outside(true, *outputs)

  return program


def symbolic(
  inputs: Mapping[str, jax.ShapeDtypeStruct],
) -> list[jax.ShapeDtypeStruct]:
  """Inputs whose lengths are numbers or names, with those names as symbols."""
  # In a new scope: what is traced is kept by its symbols, and jax2onnx changes
  # functions while it traces.
  scope = export.SymbolicScope()

  def shape(names: Sequence[int | str]) -> tuple:
    return export.symbolic_shape(', '.join(map(str, names)), scope=scope)

  return [x.update(shape=shape(x.shape)) for x in inputs.values()]


def _outside(
  true: jax.Array, labels: jax.Array, *probabilities: jax.Array
) -> tuple[jax.Array, ...]:
  inside = true_pixels(true, labels.shape[1:])
  labels = jnp.where(inside[..., 0], labels, jnp.uint8(IGNORE))
  return labels, *(jnp.where(inside, x, 0) for x in probabilities)


def labels_of(scores: jax.Array) -> jax.Array:
  """The class with the largest score: (B, H, W, C) -> uint8 (B, H, W)."""
  return jnp.argmax(scores, -1).astype(jnp.uint8)
