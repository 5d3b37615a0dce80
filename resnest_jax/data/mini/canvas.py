"""Camera, canvas, noise and colours of all drawn scenes.

A pinhole camera at height `eye` metres looks along Z: a point (X, Y, Z) is
seen at x = cx + f X / Z, y = horizon + f (eye - Y) / Z.
"""

import dataclasses
from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator

from resnest_jax.labels import ADE20K


def _mask_values(names: str) -> dict[str, int]:
  return {name: ADE20K.classes.index(name) + 1 for name in names.split()}


# Mask values as in ADE20K's release: 0 is "other", classes count from 1.
OTHER = 0
ID = _mask_values(
  'sky mountain building tree grass road water car person '
  'wall floor ceiling windowpane painting bed'
)
# Kept apart, because every class of `ID` has to be frequent in the mini ADE20K.
CITY_ID = _mask_values('sidewalk pole signboard')

# Brightness at x, y: 0 to 1 over the visible part of a surface's bounding box.
Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]
Range = tuple[float, float]


def fbm(
  rng: Generator, height: int, width: int, cell: float, octaves=4, stretch=1.0
) -> np.ndarray:
  """Fractal noise, float32 (height, width), mean 0, deviation about 0.6.

  The largest features are `cell` pixels high and `stretch` times as wide; each
  octave halves size and amplitude.
  """
  total = np.zeros((height, width), np.float32)
  for octave in range(octaves):
    size = max(cell / 2**octave, 1.0)
    # At least three cells: features larger than the picture still vary in it.
    rows = max(int(height / size), 1) + 2
    columns = max(int(width / (size * stretch)), 1) + 2
    noise = rng.standard_normal((rows, columns), dtype=np.float32)
    # In float64, because OpenCV 4 and 5 round float32 differently.
    total += 0.5**octave * cv2.resize(
      np.float64(noise), (width, height), interpolation=cv2.INTER_CUBIC
    )
  return total


def colour(
  rng: Generator, hue: Range, saturation: Range, value: Range
) -> np.ndarray:
  """A random colour; hue in degrees, the rest 0-1. Returns RGB, 0-1."""
  # The modulo admits ranges around red, such as (-60, 60).
  hsv = [rng.uniform(*hue) % 360, rng.uniform(*saturation), rng.uniform(*value)]
  return cv2.cvtColor(np.array([[hsv]], np.float32), cv2.COLOR_HSV2RGB)[0, 0]


def tiled(noise: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Looks up `noise` at texture coordinates in pixels; it repeats endlessly."""
  # Reduced before float32, which resolves large coordinates coarsely.
  rows, columns = noise.shape
  u, v = np.mod(u, columns), np.mod(v, rows)
  return remap(noise, u, v, cv2.BORDER_WRAP)


def remap(
  image: np.ndarray, x: np.ndarray, y: np.ndarray, border: int
) -> np.ndarray:
  """Looks up `image` bilinearly at pixel positions x, y, as float32."""
  # In float64 OpenCV 4.13 and 5.0 agree to the bit. In float32 they differ by
  # up to 0.03 on a wave between -1 and 1.
  image, x, y = np.float64(image), np.float32(x), np.float32(y)
  found = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=border)
  return np.float32(found)


@dataclasses.dataclass
class Canvas:
  """A picture and its mask, painted from back to front.

  Attributes:
    image: float32 (height, width, 3), RGB, 1 is white.
    mask: uint8 (height, width).
    light: direction of the light, -1 (left) to 1 (right).
    grain: float32 (height, width), fine noise for surfaces.
  """

  rng: Generator
  height: int  # Oversampled pixels, as `width`.
  width: int

  def __post_init__(self):
    # Here and in all scenes the order of the draws is part of the data set: a
    # draw that moves changes every scene, and `VERSION` has to be raised.
    shape = self.height, self.width
    self.image = np.zeros((*shape, 3), np.float32)
    self.mask = np.zeros(shape, np.uint8)
    self.light = float(self.rng.choice([-1, 1]) * self.rng.uniform(0.4, 1))
    self.grain = 0.6 * fbm(self.rng, *shape, 3, 1) + 0.6 * fbm(
      self.rng, *shape, 24, 3
    )
    self.f = self.size() * self.rng.uniform(0.95, 1.25)
    self.eye = self.rng.uniform(1.4, 2.2)
    self.horizon = self.height * self.rng.uniform(0.34, 0.56)
    self.cx = self.width * self.rng.uniform(0.3, 0.7)

  def size(self) -> float:
    # In portraits the width decides, or things would be cut off.
    return min(self.height, 1.2 * self.width)

  def grid(self) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x (1, width) and y (height, 1), float32."""
    x = np.arange(self.width, dtype=np.float32)[None] + 0.5
    y = np.arange(self.height, dtype=np.float32)[:, None] + 0.5
    return x, y

  def project(self, x, y, z) -> np.ndarray:
    """Pixel positions (..., 2) of points in metres, floats or sequences."""
    x, y, z = np.broadcast_arrays(x, y, z)
    u = self.cx + x * self.f / z
    v = self.horizon + (self.eye - y) * self.f / z
    return np.stack([u, v], -1)

  def paint(self, where: np.ndarray, paint: np.ndarray, label: int) -> None:
    """Covers the pixels `where` (bool) with `paint` (height, width, 3)."""
    # Several times as fast as assigning to `image[where]`.
    paint = paint.astype(np.float32, copy=False)
    cv2.copyTo(paint, where.astype(np.uint8), self.image)
    self.mask[where] = label

  def fill(self, points, paint, label, grain=0.12, shade=0.25, pattern=None):
    """Fills a polygon, given as (N, 2) pixel positions x, y.

    `grain` is the strength of the surface's noise, `shade` the contrast between
    the sides towards and away from the light; a `Pattern` multiplies both.
    """
    points = np.round(points).astype(np.int32)
    x0, y0 = np.maximum(points.min(0), 0)
    x1, y1 = np.minimum(points.max(0) + 1, (self.width, self.height))
    if x0 >= x1 or y0 >= y1:
      return
    local = np.zeros((y1 - y0, x1 - x0), np.uint8)
    cv2.fillPoly(local, [points - (x0, y0)], 1)
    inside = local.astype(bool)
    box = slice(y0, y1), slice(x0, x1)
    u = np.linspace(0, 1, x1 - x0, dtype=np.float32)[None]
    bright = 1 + grain * self.grain[box] + shade * self.light * (u - 0.5)
    if pattern is not None:
      v = np.linspace(0, 1, y1 - y0, dtype=np.float32)[:, None]
      bright = bright * pattern(u, v)
    surface = bright[..., None] * np.asarray(paint, np.float32)
    self.cover(box, inside, surface, label)

  def cover(self, box, inside: np.ndarray, paint: np.ndarray, label: int):
    """Covers the pixels `inside` (bool) of slices of the canvas."""
    self.image[box][inside] = paint[inside]
    self.mask[box][inside] = label

  def around(self, x, y, rx, ry, columns: Range, rows: Range):
    """The visible part of a rectangle around a pixel position.

    `columns` and `rows` are its ends in units of `rx` and `ry` from x, y.
    Returns slices of the canvas, and the distances from x (1, w) and y (h, 1)
    in those units; h or w is 0 where nothing is visible.
    """
    x0, x1 = np.clip(x + rx * np.array(columns), 0, self.width).astype(int)
    y0, y1 = np.clip(y + ry * np.array(rows), 0, self.height).astype(int)
    u = (np.arange(x0, x1, dtype=np.float32)[None] - x) / rx
    v = (np.arange(y0, y1, dtype=np.float32)[:, None] - y) / ry
    return (slice(y0, y1), slice(x0, x1)), u, v

  def shadow(self, x: float, y: float, rx: float, ry: float) -> None:
    """Darkens the ground around a pixel position; the mask is unchanged."""
    x = x - 0.5 * rx * self.light  # Shadows fall away from the light.
    box, u, v = self.around(x, y, rx, ry, (-2, 2), (-2, 2))
    self.image[box] *= (1 - 0.55 * np.exp(-u * u - v * v))[..., None]


@dataclasses.dataclass
class Figure:
  """Draws flat shapes of one thing that stands on the ground.

  Shapes have the figure's units: x from its middle, y up from its foot.
  """

  canvas: Canvas
  x: float  # Its middle and its foot `y`, in pixels.
  y: float
  scale: float  # Pixels per unit.
  label: int
  facing: int = 1  # -1: mirrored.

  def polygon(self, x, y, paint, **kwargs) -> None:
    u = self.x + self.facing * self.scale * np.asarray(x)
    v = self.y - self.scale * np.asarray(y)
    self.canvas.fill(np.stack([u, v], -1), paint, self.label, **kwargs)

  def box(self, x, y, paint, **kwargs) -> None:
    (x0, x1), (y0, y1) = x, y
    self.polygon((x0, x0, x1, x1), (y0, y1, y1, y0), paint, **kwargs)

  def ellipse(self, x, y, rx, ry, paint, **kwargs) -> None:
    t = np.linspace(0, 2 * np.pi, 32)
    self.polygon(x + rx * np.cos(t), y + ry * np.sin(t), paint, **kwargs)

  def shadow(self, rx: float, ry: float) -> None:
    self.canvas.shadow(self.x, self.y, rx * self.scale, ry * self.scale)
