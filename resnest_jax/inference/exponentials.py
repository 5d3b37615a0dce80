"""Scores of the protocol `encoding`: exponentials between two resizes.

A window's logits are resized to the window, their exponentials averaged over
the windows that show a pixel of a scaled image, and these means resized to the
original. So a pixel of the original is made of n x n places in windows: of its
neighbours in the scaled image, along each axis two, in each window that shows
them.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from resnest_jax.models.layers import einsum


class Rows(NamedTuple):
  """The n rows of windows of which each row of the original is made."""

  matrix: jax.Array  # (B, Hl, n, h): weights of logits in their logits.
  share: jax.Array  # (B, Hl, n): of their scores, 0: none.


class Columns(NamedTuple):
  """The n columns of windows of which each column of the original is made."""

  index: jax.Array  # int (B, Wl, n): in all windows' columns.
  share: jax.Array  # (B, Wl, n): of their scores, 0: none.
  upsample: jax.Array  # (crop, w): weights of logits in those of a window.


class Exponentials(NamedTuple):
  """Logits of all windows at one scale, and what pixels are made of."""

  logits: jax.Array  # float (B, C, windows, w, h), one below the other.
  rows: Rows
  columns: Columns

  @property
  def canvas(self) -> tuple[int, int]:
    return self.rows.share.shape[1], self.columns.share.shape[1]

  @property
  def numbers(self) -> int:
    """How many `summed` holds for a row of an image, about."""
    _, classes, windows, w, _ = self.logits.shape
    crop = len(self.columns.upsample)
    return classes * (windows * (w + crop) + 3 * self.canvas[1])


def summed(scales: Sequence[Exponentials]) -> jax.Array:
  """Sums of the scales' scores, (B, rows, C, columns).

  Those of a pixel have an unknown common factor, which makes the exponential of
  the largest logit 1: none overflows, and the largest score is no 0.
  """
  batch, classes, *_ = scales[0].logits.shape
  (height, width), dtype = scales[0].canvas, scales[0].logits.dtype
  # Finite: rows beyond an image are made of nothing.
  lowest = jnp.full((batch, height, width), jnp.finfo(dtype).min, dtype)
  found = lowest, jnp.zeros((batch, height, classes, width), dtype)
  for scale in scales:
    rows = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), scale.rows)
    found, _ = jax.lax.scan(functools.partial(_add, scale), found, rows)
  return found[1]


def _add(scale, found, row):
  before, total = found  # (B, rows, columns), (B, rows, C, columns)
  x = einsum('bth,bcjwh->btcjw', row.matrix, scale.logits)
  z = einsum('btcjw,xw->btcjx', x, scale.columns.upsample)
  z = z.reshape(*z.shape[:3], -1)
  highest, places = z.max(2), []
  for i in range(scale.columns.index.shape[2]):
    index = scale.columns.index[:, None, :, i]
    share = row.share[:, :, None] * scale.columns.share[:, None, :, i]
    places.append((index, share))
  take = functools.partial(jnp.take_along_axis, axis=-1, mode='clip')
  # Of what has no share: it may be so large that all others would vanish.
  logits = [jnp.where(s > 0, take(highest, i), -jnp.inf) for i, s in places]
  largest = functools.reduce(jnp.maximum, logits, before)
  total *= jnp.exp(before - largest)[:, :, None]
  for index, share in places:
    z_there = take(z, index[:, None]) - largest[:, :, None]
    total += share[:, :, None] * jnp.exp(jnp.minimum(z_there, 0))
  return (largest, total), None
