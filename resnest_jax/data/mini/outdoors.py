"""Streets, country roads, lakes and parks."""

import dataclasses

import cv2
import numpy as np
from numpy.random import Generator

from resnest_jax.data.mini import things
from resnest_jax.data.mini.canvas import ID, Canvas, colour, fbm, remap, tiled

# Nearest and farthest distance of things, in metres: near enough to be large,
# as no class may be tiny, and far enough to be whole.
_RANGES = {
  things.tree: (5.0, 14.0),
  things.building: (10.0, 20.0),
  things.side_car: (5.0, 7.5),
  things.rear_car: (4.0, 7.5),
  things.person: (2.3, 3.8),
  things.clutter: (3.5, 10.0),
  things.lamp_post: (3.0, 9.0),
  things.traffic_sign: (3.0, 7.0),
}
_GRASS, _ROAD = ID['grass'], ID['road']

# Metres to the right of a road's middle, and along the road, (H, W).
Lane = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass
class Ground:
  """The point of the plane Y = 0 that each pixel sees, (H, W), in metres."""

  below: np.ndarray  # Bool: below the horizon; `x` and `z` are void elsewhere.
  x: np.ndarray
  z: np.ndarray
  fade: np.ndarray  # 1 near, 0 far: hides detail finer than a pixel.


# All is painted from back to front: whatever comes later covers the rest.


def street(canvas: Canvas) -> None:
  """Houses, cars and people along a road or across one."""
  ground = _landscape(canvas, 0.3)
  along = canvas.rng.random() < 0.5
  car = _road(canvas, ground, along)
  _building_row(canvas, along)
  stand(
    canvas,
    (car, _ROAD, 1, 3),
    (things.tree, _GRASS, 0, 3),
    (things.person, None, 0, 2),
    (things.clutter, None, 0, 2),
  )


def country(canvas: Canvas) -> None:
  """A road through meadows, or a lonely house."""
  ground = _landscape(canvas, 0.8)
  main = things.building, _GRASS, 1, 1
  if canvas.rng.random() < 0.75:
    main = _road(canvas, ground, canvas.rng.random() < 0.7), _ROAD, 0, 2
  stand(
    canvas,
    main,
    (things.tree, _GRASS, 1, 5),
    (things.person, None, 0, 1),
    (things.clutter, None, 0, 1),
  )


def lake(canvas: Canvas) -> None:
  """Water, mostly below mountains, with trees and people on the bank."""
  _water(canvas, _landscape(canvas, 0.85))
  stand(
    canvas,
    (things.tree, _GRASS, 1, 3),
    (things.person, _GRASS, 0, 2),
    (things.clutter, _GRASS, 0, 1),
  )


def park(canvas: Canvas) -> None:
  """Trees and people on a meadow, some houses, sometimes a pond."""
  sky(canvas)
  ground = grass(canvas)
  if canvas.rng.random() < 0.4:
    _water(canvas, ground)
  stand(
    canvas,
    (things.building, _GRASS, 0, 2),
    (things.tree, _GRASS, 2, 5),
    (things.person, _GRASS, 1, 3),
    (things.clutter, _GRASS, 0, 2),
  )


def _landscape(canvas: Canvas, mountains: float) -> Ground:
  sky(canvas)
  if canvas.rng.random() < mountains:
    _mountains(canvas)
  return grass(canvas)


def sky(canvas: Canvas) -> None:
  """Blue, overcast or evening sky with clouds, over the whole picture."""
  # All three moods are drawn: the number of draws does not depend on the mood.
  rng = canvas.rng
  mood = rng.choice(3, p=[0.6, 0.25, 0.15])
  top = (
    colour(rng, (200, 225), (0.35, 0.7), (0.65, 0.95)),
    colour(rng, (190, 250), (0.02, 0.12), (0.55, 0.85)),
    colour(rng, (215, 300), (0.2, 0.5), (0.4, 0.7)),
  )[mood]
  low = (
    colour(rng, (195, 215), (0.05, 0.25), (0.85, 1)),
    colour(rng, (190, 250), (0.0, 0.08), (0.7, 0.95)),
    colour(rng, (10, 45), (0.3, 0.7), (0.8, 1)),
  )[mood]
  _, y = canvas.grid()
  t = np.clip(y / canvas.horizon, 0, 1)[..., None]
  image = top * (1 - t) + low * t
  clouds = fbm(rng, canvas.height, canvas.width, canvas.height / 4, 5, 2.2)
  cover = rng.uniform(-0.4, 1.2)
  clouds = np.clip((clouds - cover) * 1.2, 0, 0.85)[..., None]
  white = 0.35 * low + rng.uniform(0.5, 0.66)
  canvas.image[:] = image * (1 - clouds) + white * clouds
  canvas.mask[:] = ID['sky']


def _mountains(canvas: Canvas) -> None:
  rng = canvas.rng
  height, width = canvas.mask.shape
  layers = int(rng.integers(1, 4))
  base = colour(rng, (180, 290), (0.1, 0.35), (0.3, 0.55))
  # Distant ridges fade into the sky at the horizon, which is painted already.
  haze_colour = canvas.image[int(canvas.horizon) - 1].mean(0)
  _, y = canvas.grid()
  for i in range(layers):
    near = (i + 1) / layers
    ridge = fbm(rng, 1, width, width / rng.uniform(1.2, 3), 6)[0]
    top = canvas.horizon * rng.uniform(0.3, 0.5) * (1.25 - 0.6 * near)
    ridge = canvas.horizon - top * (1 + 0.55 * ridge)
    # Light comes from the side, so the horizontal slope decides the shading.
    relief = fbm(rng, height, width, height / 4, 4)
    slope = cv2.Sobel(relief, cv2.CV_32F, 1, 0, ksize=3)
    bright = 1 - canvas.light * slope * 1.6 + 0.12 * canvas.grain
    rock = np.clip(bright, 0.35, 1.9)[..., None] * base
    if i == 0 and rng.random() < 0.4:  # Snow on the farthest.
      snow = (y < ridge + 0.3 * top + 0.12 * top * relief)[..., None]
      rock = np.where(snow, 0.9 * np.clip(bright, 0.7, 1.2)[..., None], rock)
    haze = rng.uniform(0.15, 0.55) * (1 - near) + 0.08
    rock = rock * (1 - haze) + haze_colour * haze
    # The ground covers the two rows below the horizon; they close the gap.
    canvas.paint((y > ridge) & (y < canvas.horizon + 2), rock, ID['mountain'])


def grass(canvas: Canvas) -> Ground:
  """Paints a meadow, green to dry, on all the ground."""
  rng = canvas.rng
  x, y = canvas.grid()
  below = np.broadcast_to(y > canvas.horizon, canvas.mask.shape)
  # At least half a pixel below the horizon, where z would be infinite.
  z = canvas.f * canvas.eye / np.maximum(y - canvas.horizon, 0.5)
  z = np.broadcast_to(z, canvas.mask.shape)
  fade = np.clip(1.4 - z / 25, 0, 1)
  ground = Ground(below, (x - canvas.cx) * z / canvas.f, z, fade)
  base = colour(rng, (70, 125), (0.35, 0.65), (0.4, 0.7))
  dry = colour(rng, (45, 75), (0.3, 0.55), (0.45, 0.75))
  blades = fbm(rng, 256, 256, 6, 3, 0.5)
  blades = tiled(blades, ground.x * 48, ground.z * 24) * ground.fade
  patches = fbm(rng, canvas.height, canvas.width, canvas.height / 5, 4, 3)
  mix = np.clip(0.4 * patches + rng.uniform(0, 0.6), 0, 1)[..., None]
  bright = 1 + 0.22 * blades + 0.06 * patches
  paint = (base * (1 - mix) + dry * mix) * bright[..., None]
  canvas.paint(ground.below, paint, ID['grass'])
  return ground


def _road(canvas: Canvas, ground: Ground, along: bool):
  """Paints a road; returns the function that draws a car on it."""
  rng = canvas.rng
  half = rng.uniform(2.4, 4)
  lane = lane_of(rng, ground, 0.012 if along else None, (5, 7), half * 0.6)
  asphalt(canvas, ground, lane, half)
  return things.rear_car if along else things.side_car


def lane_of(
  rng: Generator, ground: Ground, bend: float | None, near: tuple, half: float
) -> Lane:
  """A road away from the camera that bends at most so much, or one across.

  The latter, for `bend` None, begins `near` metres away; `half` is from there
  to its middle.
  """
  if bend is None:
    return ground.z - rng.uniform(*near) - half, ground.x
  bend = rng.uniform(-bend, bend)
  side = ground.x - rng.uniform(-1.5, 1.5) - bend * ground.z**2
  return side, ground.z


def asphalt(canvas: Canvas, ground: Ground, lane: Lane, half: float) -> None:
  """Paints a road of twice `half` metres, mostly with lines."""
  rng, (side, forward) = canvas.rng, lane
  # Beyond 150 m only a few rows are left below the horizon.
  where = ground.below & (np.abs(side) < half) & (ground.z < 150)
  base = colour(rng, (0, 360), (0, 0.12), (0.22, 0.55))
  if rng.random() < 0.2:  # Unpaved.
    base = colour(rng, (20, 45), (0.2, 0.4), (0.4, 0.65))
  stones = tiled(fbm(rng, 256, 256, 3, 2), forward * 40, side * 40)
  worn = np.cos(side / half * np.pi * 2) * 0.05
  bright = 1 + 0.1 * stones * ground.fade + worn + 0.05 * canvas.grain
  paint = bright[..., None] * base
  if rng.random() < 0.75:
    dashes = (np.abs(side) < 0.1) & (np.mod(forward, 3) < 1.6)
    edges = np.abs(np.abs(side) - half + 0.3) < 0.08
    lines = dashes | edges if rng.random() < 0.6 else dashes
    white = colour(rng, (40, 55), (0, 0.5), (0.75, 0.95))
    paint = np.where(lines[..., None], white * bright[..., None], paint)
  canvas.paint(where, paint, ID['road'])


def _water(canvas: Canvas, ground: Ground) -> None:
  # After the mountains, which it mirrors, and before things, which it does not.
  rng = canvas.rng
  height, width = canvas.mask.shape
  shore = fbm(rng, 1, width, width / 2, 4)[0] * 1.2
  if rng.random() < 0.6:  # Behind the near bank, up to the horizon.
    where = ground.z > rng.uniform(2.8, 5.5) + shore
  else:
    side = rng.choice([-1, 1])
    where = side * (ground.x - 0.5 * shore) > rng.uniform(-0.8, 0.6)
  where &= ground.below
  ripples = fbm(rng, height, width, 12, 3, 6)
  x, y = canvas.grid()
  # Each pixel mirrors a row about as far above the horizon as it lies below;
  # ripples shift that row. Two rows keep it away from the painted ground.
  depth = np.maximum(y - canvas.horizon, 0)
  source = canvas.horizon - depth * rng.uniform(0.8, 1.1) - 2
  source = source + ripples * (2 + 0.06 * depth)
  source = np.clip(source, 0, canvas.horizon - 2)
  x = np.broadcast_to(x, source.shape)
  mirrored = remap(canvas.image, x, source, cv2.BORDER_CONSTANT)
  tint = colour(rng, (150, 230), (0.2, 0.6), (0.25, 0.6))
  clear = rng.uniform(0.35, 0.7)
  paint = mirrored * clear + tint * (1 - clear)
  paint = paint * (1 + 0.14 * ripples[..., None])
  canvas.paint(where, paint, ID['water'])


def _building_row(canvas: Canvas, along: bool) -> None:
  rng = canvas.rng
  if along:
    for side in (-1, 1):
      z = rng.uniform(26, 34)
      while z > 9:
        gap = rng.uniform(4.5, 8)
        things.building(canvas, side * (gap + rng.uniform(3, 6)), z)
        z -= rng.uniform(7, 12)
  else:
    house_row(canvas, rng.uniform(13, 20), 0.8, 0.8)


def house_row(canvas: Canvas, z: float, wide: float, dense: float) -> None:
  """Houses `z` metres away, as far to both sides as `wide` times that."""
  rng, x = canvas.rng, -z * wide
  while x < z * wide:
    step = rng.uniform(5, 9)
    if rng.random() < dense:
      things.building(canvas, x + step / 2, z + rng.uniform(0, 2))
    x += step


def stand(canvas: Canvas, *groups: tuple) -> None:
  """Places things on the painted ground and draws them, the far ones first.

  A group is a function of (canvas, x, z), the mask value of the ground to stand
  on or None for grass and road, the least and the greatest number.
  """
  # All are placed before the first is drawn, so they may hide each other.
  placed = []
  for draw, on, least, most in groups:
    allowed = (_GRASS, _ROAD) if on is None else (on,)
    for _ in range(int(canvas.rng.integers(least, most + 1))):
      if (place := _find_place(canvas, draw, allowed)) is not None:
        placed.append((*place, draw))
  for x, z, draw in sorted(placed, key=lambda item: -item[1]):
    draw(canvas, x, z)


def _find_place(
  canvas: Canvas, draw, allowed: tuple[int, ...]
) -> tuple[float, float] | None:
  """Looks for x, z where the ground is allowed; None if in vain."""
  near, far = _RANGES[draw]
  for _ in range(12):
    # Evenly over the rows of the picture, which are proportional to 1 / z.
    z = 1 / canvas.rng.uniform(1 / far, 1 / near)
    x = canvas.rng.uniform(-canvas.cx, canvas.width - canvas.cx) * z / canvas.f
    u, v = canvas.project(x, 0, z)
    row = min(int(v), canvas.height - 1)
    column = min(max(int(u), 0), canvas.width - 1)
    if canvas.mask[row, column] in allowed:
      return x, z
  return None
