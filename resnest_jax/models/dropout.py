"""Dropout and DropBlock.

Draws depend on the key and an image's place in the batch alone, so that neither
devices nor micro-batches change one.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnest_jax.models.layers import Array, at_least_float32
from resnest_jax.models.pooling import max_pool

# Variable collection with the images' places in the batch.
SLOTS = 'slots'
BLOCK = 3  # Rows and columns that DropBlock leaves out together.


def place_variables(places: Array, share: Array | None = None) -> dict:
  """Variables that tell a network the places of its images, int (B,).

  `share` is the one that DropBlock leaves out, None: there is no DropBlock.
  """
  given = {'places': places}
  head = {'classifier': {'channels': given}, 'project_dropout': given}
  slots = {'decode_head': head, 'auxiliary_head': head, 'dropout': given}
  if share is not None:
    slots['backbone'] = given | {'share': share}
  return {SLOTS: slots}


class Dropout(nn.Module):
  """Dropout of whole channels or of each value, by the key and image's place.

  Places are 0, 1, ... unless the collection 'slots' holds 'places', int (B,).
  """

  rate: float
  train: bool
  elementwise: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    if not self.train or self.rate == 0:
      return x
    places = self.get_variable(SLOTS, 'places', jnp.arange(x.shape[0]))
    key = self.make_rng('dropout')

    # A key for each image: cutting a batch into micro-batches changes no draw.
    def draw(place: Array) -> Array:
      key_of_one = jax.random.fold_in(key, place)
      shape = x.shape[1:] if self.elementwise else (1, 1, x.shape[-1])
      return jax.random.bernoulli(key_of_one, 1 - self.rate, shape)

    keep = jax.vmap(draw)(places)
    return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))


def _fold_in(keys: Array, number: int | Array) -> Array:
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


class DropBlock(NamedTuple):
  """DropBlock (Ghiasi et al., arXiv 1810.12890) as the authors' GluonCV has it.

  The images of a group share a mask, which is another for each channel.
  """

  share: Array  # Scalar, about the share of values that is left out.
  keys: Array  # (G,), one for each group of consecutive images.

  def at(self, number: int | Array) -> 'DropBlock':
    """The one of a part of the network, which draws by itself."""
    return self._replace(keys=_fold_in(self.keys, number))

  def __call__(self, x: Array, number: int) -> Array:
    """Leaves out squares of x (B, H, W, C), at the given place of a part."""
    dtype = at_least_float32(x.dtype)
    draws = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], dtype))
    return leave_out(x, draws(_fold_in(self.keys, number)), self.share)


def drop_of(
  module: nn.Module, batch: int, group: int, train: bool
) -> DropBlock | None:
  """The DropBlock of a backbone by its variables 'slots', if there is any."""
  share = module.get_variable(SLOTS, 'share', None)
  if share is None or not train:
    return None
  places = module.get_variable(SLOTS, 'places')[:: group or batch]
  draw = partial(jax.random.fold_in, module.make_rng('dropout'))
  return DropBlock(share, jax.vmap(draw)(places))


def centre_chance(share: Array, height: int, width: int) -> Array:
  """How likely a pixel is the centre of a square that is left out."""
  # There are such maps: of 32 x 32 pixels one is left in the last stage.
  inner = max(height - BLOCK + 1, 1) * max(width - BLOCK + 1, 1)
  return share * (height * width / BLOCK**2 / inner)


def leave_out(x: Array, draws: Array, share: Array) -> Array:
  """DropBlock of x (B, H, W, C) by uniform draws (G, H, W, C), G groups."""
  centres = draws < centre_chance(share, *x.shape[1:3])
  keep = 1 - max_pool(centres.astype(draws.dtype), None, stride=1)
  kept = jnp.sum(keep, (1, 2, 3), keepdims=True)
  keep = (keep * (keep[0].size / jnp.maximum(kept, 1))).astype(x.dtype)
  groups = x.reshape(len(keep), -1, *x.shape[1:])
  return (groups * keep[:, None]).reshape(x.shape)
