"""The pictures on which exports are compared with their checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from resnest_jax import drawing
from resnest_jax.data.mini.scene import draw_scene
from resnest_jax.data.pictures import read_picture
from resnest_jax.errors import UserError
from resnest_jax.prediction.sources import find_sources

# At most so many of those given are looked at, spread evenly.
NUMBER = 20


def gather_pictures(given: Sequence[str | Path]) -> list[np.ndarray]:
  """Up to `NUMBER` pictures, uint8 (h, w, 3) RGB, of any sizes.

  Args:
    given: files, folders and patterns; none: scenes are drawn.

  Raises:
    UserError: there is none, or one cannot be read.
  """
  if not given:
    return [_drawn(index) for index in range(NUMBER)]
  paths = [each.path for each in find_sources(given) if not each.is_video]
  if not paths:
    raise UserError(
      f'there is no picture in {", ".join(map(str, given))}, only videos; '
      'give pictures to compare the exports on, or leave --pictures out.'
    )
  places = drawing.spread(len(paths), NUMBER)
  return [read_picture(paths[place]) for place in places]


def _drawn(index: int) -> np.ndarray:
  rng = np.random.default_rng(index)
  height, width = rng.integers(96, 224, 2).tolist()
  return draw_scene((index,), height, width)[0]


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """A picture, stretched to height and width of `size`."""
  if image.shape[:2] == size:
    return image
  return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
