"""Pictures on which exports are compared with their checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resnest_jax import drawing
from resnest_jax.data.mini.scene import draw_scene
from resnest_jax.data.preprocess import IMAGENET, MEAN, STD, Normalization
from resnest_jax.data.rasters import as_image
from resnest_jax.errors import UserError
from resnest_jax.prediction.sources import find_sources

NUMBER = 20  # Compared at most, spread evenly over the list.


def find_pictures(given: Sequence[str | Path]) -> list[Path]:
  """Up to `NUMBER` of files, folders and patterns, or a `UserError`."""
  if not given:
    return []
  paths = [each.path for each in find_sources(given, True) if not each.is_video]
  if not paths:
    raise UserError(
      f'there is no picture in {", ".join(map(str, given))}, only videos; '
      'give pictures to compare the exports on, or leave --pictures out.'
    )
  return [paths[place] for place in drawing.spread(len(paths), NUMBER)]


def gather_pictures(
  paths: Sequence[Path], how: Normalization = IMAGENET
) -> list[np.ndarray]:
  """Pictures as of `as_image`, or a `UserError`; drawn scenes without paths."""
  if paths:
    return [as_image(path, how) for path in paths]
  return [_drawn(index, how) for index in range(NUMBER)]


def _drawn(index: int, how: Normalization) -> np.ndarray:
  # Seeded by the index: every export is compared on the same scenes.
  rng = np.random.default_rng(index)
  height, width = rng.integers(96, 224, 2).tolist()
  image = draw_scene((index,), height, width)[0]
  if not how.bands:
    return image
  # Bands take the colours in turn, with the mean and deviation that they have.
  turns = np.arange(len(how.bands)) % 3
  levels = ((image - MEAN) / STD)[..., turns] * how.std + how.mean
  if how.dtype != 'float32':
    levels = levels.clip(0, np.iinfo(how.dtype).max)
  return levels.astype(how.dtype)
