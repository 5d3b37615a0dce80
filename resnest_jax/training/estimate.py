"""How much memory a training step takes, from shapes alone.

Nothing is compiled or computed. Every part of the network, the stem, blocks
and heads, is traced on its own, alike ones once, which gives the bytes that its
backward pass keeps for an image. What a step keeps in all follows from what is
kept at the same time; docs/memory.md says how near that comes to XLA's figures.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnest_jax.models import forms
from resnest_jax.models.heads import place_variables
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.normalization import COUNTS, MOMENTS
from resnest_jax.models.remat import in_groups
from resnest_jax.models.resnest import Bottleneck, ResNeSt, Stem
from resnest_jax.models.segmentor import Segmentor
from resnest_jax.training import exact

# What XLA keeps, as a share of what differentiation asks for. On accelerators
# it computes elementwise results again where they are used; on the CPU its
# convolutions have copies of their own. Measured, see docs/memory.md.
KEPT = {'cpu': 1.2, 'gpu': 0.8, 'tpu': 0.8}

# Exact accumulation takes this many times what it has to keep: its loops over
# the micro-batches copy what they stack. Measured once on each.
EXACT = {'cpu': 1.8, 'gpu': 2.8, 'tpu': 2.8}


class PartBytes(NamedTuple):
  """Bytes that one part of the network takes for one image.

  Attributes:
    group: parts of the same number are computed again together ('stages').
    inputs: what goes in and no other part has.
    outputs: what comes out.
    kept: what its backward pass needs of its forward pass.
    kept_exact: likewise, where it normalises by given statistics.
  """

  group: int
  inputs: float
  outputs: float
  kept: float
  kept_exact: float


class Estimate(NamedTuple):
  """Bytes of a step on one device, by what they are for."""

  parameters: int
  optimizer: int
  gradients: int
  activations: float
  workspace: float

  @property
  def total(self) -> float:
    """All of them."""
    return sum(self)


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays or `jax.ShapeDtypeStruct`s of a tree."""
  return sum(
    int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


class _Piece(NamedTuple):
  """A part as it is trained, and as exact accumulation computes it."""

  group: int
  trained: nn.Module
  exact: nn.Module
  run: Callable
  stages: tuple[int, ...] = ()  # What it takes; (): the piece before it.


def _backbone_pieces(backbone: ResNeSt) -> Iterator[list[_Piece]]:
  """The stem, then the blocks of each stage."""
  width, dtype = backbone.stem_width, backbone.dtype
  yield [
    _Piece(
      0, Stem(width, True, dtype), Stem(width, False, dtype), exact.run_stem
    )
  ]
  group = 0
  for blocks in backbone.blocks(train=True):
    pieces = []
    for names in in_groups(list(blocks)):
      group += 1
      for name in names:
        trained = Bottleneck(**blocks[name])
        given = Bottleneck(**blocks[name] | {'train': False})
        pieces.append(_Piece(group, trained, given, exact.run_block))
    yield pieces


def _head_pieces(model: Segmentor) -> Iterator[_Piece]:
  for group, (name, run) in enumerate(exact.HEADS.items(), 1000):
    head = getattr(model, name)
    trained = exact.alone(name, head)
    given = exact.alone(name, head.clone(frozen_bn=True))
    yield _Piece(group, trained, given, run, head.stages)


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def _measure(
  piece: _Piece, shapes: tuple, chosen: tuple
) -> tuple[PartBytes, tuple]:
  """Bytes for an image, and the shape of the outputs without the batch.

  Args:
    piece: of the network; its `group` is passed on.
    shapes: of its inputs for one image, one for each of its `stages`.
    chosen: `forms.current()`, on which the bytes depend.
  """
  del chosen
  dtype = getattr(piece.trained, 'dtype', None)
  if dtype is None:  # A segmentor of one head.
    head = piece.trained.decode_head or piece.trained.auxiliary_head
    dtype = head.dtype

  def inputs(batch: int) -> Any:
    given = [_struct((batch, *shape), dtype) for shape in shapes]
    if not piece.stages:
      return given[0]
    return dict(zip(piece.stages, given, strict=True))

  def residuals(module, params, stats, x):
    def apply(params, x):
      batch = jax.tree.leaves(x)[0].shape[0]
      return module.apply(
        {'params': params, 'batch_stats': stats}
        | place_variables(jnp.arange(batch)),
        x,
        mutable=['batch_stats']
        if module is piece.trained
        else [MOMENTS, COUNTS],
        rngs={'dropout': jax.random.key(0)},
        method=piece.run,
      )

    if module is piece.trained:
      y, pull_back, _ = jax.vjp(apply, params, x, has_aux=True)
    else:
      y, pull_back = jax.vjp(apply, params, x)
    return y, pull_back

  key = jax.random.key(0)
  variables = jax.eval_shape(
    partial(piece.trained.init, method=piece.run),
    {'params': key, 'dropout': key},
    inputs(2),
  )
  slopes = []
  for module in (piece.trained, piece.exact):
    run = partial(residuals, module)
    sizes = []
    for batch in (2, 4):
      y, kept = jax.eval_shape(
        run, variables['params'], variables['batch_stats'], inputs(batch)
      )
      sizes.append(tree_bytes(kept))
    slopes.append((sizes[1] - sizes[0]) / 2)
  output = jax.tree.leaves(y)[0]
  part = PartBytes(
    piece.group,
    tree_bytes(inputs(1)),
    output.size // 4 * output.dtype.itemsize,
    *slopes,
  )
  return part, output.shape[1:]


def measure_parts(model: Segmentor, crop: tuple[int, int]) -> list[PartBytes]:
  """The bytes of every part of a segmentor for one image of a size."""
  shape: tuple[int, ...] = (*crop, 3)
  parts, features = [], []
  for pieces in _backbone_pieces(model.backbone):
    for piece in pieces:
      alike, shape = _measure(
        piece._replace(group=0), (shape,), forms.current()
      )
      parts.append(alike._replace(group=piece.group))
    features.append(shape)
  for piece in _head_pieces(model):
    taken = tuple(features[1 + stage] for stage in piece.stages)
    part, _ = _measure(piece, taken, forms.current())
    # Other stages than the last are kept as inputs of blocks already.
    if 3 not in piece.stages:
      part = part._replace(inputs=0)
    parts.append(part)
  return parts


def loss_bytes(
  model: Segmentor, parts: list[PartBytes], crop: tuple[int, int]
) -> float:
  """What the loss takes for one image: logits with wide rows, and gradients."""
  classes = model.decode_head.num_classes
  # The logits' own bytes are classes * h * w times those of a number; the loss
  # upsamples their columns first.
  logits = parts[-2].outputs
  pixels = logits / (classes * 4)
  height = (pixels * crop[0] / crop[1]) ** 0.5
  return 2 * logits + 2 * height * crop[1] * classes * 4


def estimate(
  model: Segmentor,
  optimizer: optax.GradientTransformation,
  parts: list[PartBytes],
  crop: tuple[int, int],
  *,
  images: int,
  micro_images: int,
  exact: bool,
  remat: str,
  ema: bool,
  platform: str = 'gpu',
) -> Estimate:
  """Bytes of a step on one device.

  Args:
    model: a `Segmentor`.
    optimizer: of its parameters.
    parts: of `measure_parts`, for the model's type of activations.
    crop: height and width.
    images: of a batch, on this device.
    micro_images: that are computed together.
    exact: accumulation with the statistics of the whole batch.
    remat: 'none', 'blocks' or 'stages'.
    ema: averages are kept.
    platform: 'cpu', 'gpu' or 'tpu'.
  """
  share = KEPT[platform]
  variables = variable_shapes(model)
  params = tree_bytes(variables['params'])
  state = tree_bytes(variables) * (2 if ema else 1)
  moments = tree_bytes(jax.eval_shape(optimizer.init, variables['params']))
  split = micro_images < images
  loss = loss_bytes(model, parts, crop)
  if exact and split:

    def inside(part: PartBytes) -> float:
      whole = images * (part.inputs + part.outputs)  # The flow of gradients.
      return whole + share * micro_images * part.kept_exact

    kept, least = _peak(parts, remat, images, images * loss, inside)
    peak = kept, EXACT[platform] * (kept + least) - kept
  elif remat == 'none':
    everything = sum(part.kept for part in parts)
    peak = share * micro_images * everything, micro_images * loss
  else:

    def inside(part: PartBytes) -> float:
      return micro_images * (share * part.kept + part.outputs)

    peak = _peak(parts, remat, micro_images, micro_images * loss, inside)
  activations, workspace = peak
  batch = images * crop[0] * crop[1] * 4  # Of uint8: RGB and label.
  return Estimate(
    state, moments, params * (2 if split else 1), activations + batch, workspace
  )


def _peak(
  parts: list[PartBytes],
  remat: str,
  images: int,
  loss: float,
  inside: Callable[[PartBytes], float],
) -> tuple[float, float]:
  """Where inputs are kept alone: those, and what one part takes, at the worst.

  The backward pass goes from the last part to the first; inputs of the parts
  behind it are gone. Blocks of a group have theirs while it is computed again.
  """
  groups: dict[int, list[PartBytes]] = {}
  for number, part in enumerate(parts):
    key = part.group if remat == 'stages' else number
    groups.setdefault(key, []).append(part)
  kept, moments = 0.0, []
  for group in groups.values():
    kept += images * group[0].inputs
    within = images * sum(part.inputs for part in group[1:])
    moments.append((kept + within, max(map(inside, group))))
  moments.append((kept, loss))
  return max(moments, key=sum)
