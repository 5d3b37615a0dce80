"""Pictures on which exports are compared with their checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from resnest_jax import drawing
from resnest_jax.data.mini.scene import draw_scene
from resnest_jax.data.pictures import read_picture
from resnest_jax.errors import UserError
from resnest_jax.prediction.sources import find_sources

NUMBER = 20  # Compared at most, spread evenly over the list.


def gather_pictures(given: Sequence[str | Path]) -> list[np.ndarray]:
  """Reads up to `NUMBER` pictures, uint8 (h, w, 3) RGB of any sizes.

  `given` are files, folders and patterns; without any, scenes are drawn. Raises
  `UserError` if no picture was found, or one cannot be read.
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
  # Seeded by the index: every export is compared on the same scenes.
  rng = np.random.default_rng(index)
  height, width = rng.integers(96, 224, 2).tolist()
  return draw_scene((index,), height, width)[0]


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Stretches a picture to `size`, its height and width in pixels."""
  if image.shape[:2] == size:
    return image
  # OpenCV takes (width, height).
  return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
