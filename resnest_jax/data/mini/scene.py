"""Draws scenes with 15 of ADE20K's classes, a stand-in for photographs.

Hue, texture, light, place and occlusion of a class differ in every picture,
and the colours of classes overlap: a network has to use texture, shape and
context. No class is rare or tiny.
"""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator

from resnest_jax.data.mini import indoors, outdoors
from resnest_jax.data.mini.canvas import OTHER, Canvas, fbm

# Scenes are drawn this much larger and then reduced for smooth edges: polygons
# are filled without anti-aliasing, so that picture and mask agree.
OVERSAMPLING = 1.5

# Name in ADE20K: function, and a share that makes all classes frequent.
KINDS = {
  'street': (outdoors.street, 0.24),
  'highway': (outdoors.country, 0.14),
  'lake': (outdoors.lake, 0.14),
  'park': (outdoors.park, 0.12),
  'bedroom': (indoors.bedroom, 0.36),
}


def draw_scene(
  seed: tuple[int, ...], height: int, width: int
) -> tuple[np.ndarray, np.ndarray, str]:
  """Draws the scene of a seed (non-negative integers).

  Returns the picture, uint8 (height, width, 3) RGB; the mask, uint8 (height,
  width), values of `canvas.ID` and `canvas.OTHER`; and the kind of scene.
  """
  rng = np.random.default_rng(seed)
  kind = str(rng.choice(list(KINDS), p=[share for _, share in KINDS.values()]))
  return *photograph(rng, height, width, KINDS[kind][0]), kind


def photograph(
  rng: Generator, height: int, width: int, paint: Callable[[Canvas], None]
) -> tuple[np.ndarray, np.ndarray]:
  """Picture and mask of what `paint` leaves on an oversampled canvas."""
  canvas = Canvas(
    rng, round(height * OVERSAMPLING), round(width * OVERSAMPLING)
  )
  paint(canvas)
  size = width, height
  image = cv2.resize(canvas.image, size, interpolation=cv2.INTER_AREA)
  # INTER_NEAREST: a mean of class numbers is another class.
  mask = cv2.resize(canvas.mask, size, interpolation=cv2.INTER_NEAREST)
  return _developed(rng, image), _annotated(rng, mask)


def _developed(rng: Generator, image: np.ndarray) -> np.ndarray:
  """Adds a camera's exposure, colour cast, blur and noise; returns uint8."""
  # Clipping comes after the exposure, and noise after the blur, as in a camera.
  height, width = image.shape[:2]
  x = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
  y = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
  cast = rng.uniform(0.93, 1.07, 3).astype(np.float32)
  image = image * (1 - rng.uniform(0, 0.18) * (x * x + y * y))
  image = image * (rng.uniform(0.95, 1.2) * cast)
  image = np.clip(image, 0, 1) ** rng.uniform(0.8, 1.05)
  grey = image.mean(-1, keepdims=True)
  image = grey + (image - grey) * rng.uniform(0.75, 1.15)
  if rng.random() < 0.3:
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.8))
  noise = rng.standard_normal(image.shape, dtype=np.float32)
  image = image + rng.uniform(0.004, 0.015) * noise
  return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _annotated(rng: Generator, mask: np.ndarray) -> np.ndarray:
  """Leaves some borders "other", as annotators do."""
  if rng.random() < 0.4:
    kernel = np.ones((2, 2), np.uint8)
    border = cv2.dilate(mask, kernel) != cv2.erode(mask, kernel)
    mask[border & (fbm(rng, *mask.shape, 24, 2) > 0.2)] = OTHER
  if rng.random() < 0.2:
    margin = int(rng.integers(1, 4))
    mask[:, :margin] = mask[-margin:] = OTHER
  return mask
