"""Things that stand outdoors: trees, cars, people, houses, signs, clutter.

Each is a function (canvas, x, z) that draws one with random looks and its foot
at X = x, Y = 0, Z = z.
"""

import numpy as np

from resnest_jax.data.mini.canvas import (
  CITY_ID,
  ID,
  OTHER,
  Canvas,
  Figure,
  Pattern,
  colour,
  fbm,
)


def _figure(
  canvas: Canvas, x: float, z: float, unit: float, label: int, facing: int = 1
) -> Figure:
  """A figure at X = x, Z = z whose unit is `unit` metres."""
  u, v = canvas.project(x, 0, z)
  return Figure(canvas, u, v, unit * canvas.f / z, label, facing)


def _stripes(count: float, strength: float) -> Pattern:
  return lambda x, y: 1 + strength * np.sign(np.sin(y * count * 2 * np.pi))


def _rounded(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  # Bright at the top, as metal that turns away from the sky further down.
  return 1.15 - 0.5 * y


def building(canvas: Canvas, x: float, z: float) -> None:
  """A box with rows of windows under a flat or a pitched roof."""
  rng = canvas.rng
  z = max(z, 9.0)  # A nearer house would fill the picture.
  width, depth = rng.uniform(4.5, 8.5), rng.uniform(3, 7)
  tall = rng.uniform(4, 13)
  base = colour(rng, (0, 360), (0.02, 0.4), (0.35, 0.85))
  if rng.random() < 0.7:
    base = colour(rng, (5, 45), (0.2, 0.55), (0.4, 0.85))
  half = width / 2
  bricks = _stripes(rng.integers(18, 40), 0.06)
  front = _figure(canvas, x, z, 1, ID['building'])
  front.shadow(0.6 * width, 1)
  # The side towards the camera's axis is visible. The front covers its edge.
  if abs(x) > half:
    edge = x - half if x > 0 else x + half
    dark = 0.75 + 0.3 * canvas.light * np.sign(edge - x)
    corners = (0, tall, tall, 0), (z, z, z + depth, z + depth)
    side = canvas.project(edge, *corners)
    canvas.fill(side, base * dark, ID['building'], pattern=bricks)
  front.box((-half, half), (0, tall), base, shade=0.1, pattern=bricks)
  if rng.random() < 0.5:
    roof = colour(rng, (0, 40), (0.1, 0.6), (0.25, 0.55))
    peak = tall + rng.uniform(1, 3)
    ridge = half * rng.uniform(0.2, 1)
    corners = (-half - 0.4, -ridge, ridge, half + 0.4)
    tiles = _stripes(10, 0.15)
    front.polygon(corners, (tall, peak, peak, tall), roof, pattern=tiles)
  _windows(front, half, tall)


def _windows(front: Figure, half: float, tall: float) -> None:
  # ADE20K counts windows seen from outside as building, so the label stays.
  rng = front.canvas.rng
  columns = max(int(2 * half / rng.uniform(1.3, 2.2)), 1)
  floors = max(int(tall / rng.uniform(2.4, 3.2)), 1)
  glass = colour(rng, (190, 240), (0.1, 0.4), (0.15, 0.5))
  frame = rng.uniform(0.5, 1.0, 3)
  wide, high = 2 * half / columns, tall / floors
  for row in range(floors):
    for column in range(columns):
      x, y = wide * (column + 0.27) - half, high * (row + 0.3)
      lit = rng.uniform(0.6, 1.7)
      for grow, paint in ((0.08, frame), (0, glass * lit)):
        across = x - grow, x + 0.46 * wide + grow
        up = y - grow, y + 0.45 * high + grow
        front.box(across, up, paint, grain=0.05)


def tree(canvas: Canvas, x: float, z: float) -> None:
  """A trunk and a crown: round, slender or conifer."""
  rng = canvas.rng
  tall = rng.uniform(3, 7)
  kind = int(rng.choice(3, p=[0.55, 0.2, 0.25]))
  half = (0.42, 0.2, 0.28)[kind] * rng.uniform(0.8, 1.2)
  low = rng.uniform(0.15, 0.3)
  bark = colour(rng, (15, 40), (0.2, 0.5), (0.15, 0.4))
  figure = _figure(canvas, x, z, tall, ID['tree'])
  figure.shadow(half, 0.25 * half)
  x, up = (-0.045, -0.027, 0.027, 0.045), low + 0.3 * half
  figure.polygon(x, (0, up, up, 0), bark, grain=0.3, shade=0.6)
  _crown(figure, half, low, conifer=kind == 2)


def _crown(figure: Figure, half: float, low: float, conifer: bool) -> None:
  """Leaves from `low` to 1, `half` wide to both sides."""
  canvas, rng = figure.canvas, figure.canvas.rng
  green = colour(rng, (75, 150), (0.35, 0.7), (0.2, 0.45))
  if rng.random() < 0.15:  # Autumn.
    green = colour(rng, (10, 60), (0.5, 0.85), (0.35, 0.75))
  # From here on in pixels. The margin is for leaves that noise pushes outwards.
  half, tall = half * figure.scale, (1 - low) * figure.scale
  top = figure.y - figure.scale
  box, x, y = canvas.around(
    figure.x, top, half, tall, columns=(-1.3, 1.3), rows=(-0.15, 1.15)
  )
  if not x.size or not y.size:
    return
  if conifer:
    tiers = 0.12 * np.mod(y * rng.uniform(4, 7), 1)
    field = np.minimum(0.9 * y + 0.06 + tiers - np.abs(x), (1 - y) * 4)
  else:
    field = 1 - np.sqrt(x * x + (2 * y - 1) ** 2)
  clumps = fbm(rng, y.size, x.size, max(half / 2.2, 3), 3)
  leaves = fbm(rng, y.size, x.size, max(half / 7, 2.5), 2)
  inside = field + 0.22 * clumps + 0.08 * leaves > 0.05
  bright = 1 + 0.3 * canvas.light * x - 0.35 * (y - 0.5)
  bright = np.clip(bright + 0.25 * clumps + 0.25 * leaves, 0.25, 2)
  canvas.cover(box, inside, bright[..., None] * green, figure.label)


def side_car(canvas: Canvas, x: float, z: float) -> None:
  """A saloon, estate or van from its side, headed left or right."""
  rng = canvas.rng
  facing = int(rng.choice([-1, 1]))
  car = _figure(canvas, x, z, rng.uniform(0.9, 1.15), ID['car'], facing)
  paint = colour(rng, (0, 360), (0, 0.9), (0.15, 0.9))
  glass = colour(rng, (190, 230), (0.05, 0.3), (0.12, 0.45))
  roof, hood = rng.uniform(1.35, 1.65), rng.uniform(0.75, 0.95)
  tail = rng.uniform(-2.0, -1.2)
  car.shadow(2.2, 0.35)
  height = (hood, roof, roof, hood)
  car.polygon((-2, tail, 0.5, 1.15), height, paint * 0.95, grain=0.04)
  height = (hood, roof - 0.12, roof - 0.12, hood)
  for pane in (tail + 0.05, tail + 0.2, -0.45, -0.45), (-0.3, -0.3, 0.4, 0.95):
    car.polygon(pane, height, glass, grain=0.05, shade=0.8)
  height = (0.3, hood, hood + 0.05, hood - 0.15, 0.6, 0.3)
  body = (-2.1, -2.1, 1.15, 2, 2.15, 2.1)
  car.polygon(body, height, paint, grain=0.04, pattern=_rounded)
  car.ellipse(1.95, 0.62, 0.12, 0.09, (1, 0.95, 0.7))
  car.ellipse(-1.98, 0.62, 0.1, 0.1, (0.7, 0.08, 0.05))
  for axle in (-1.3, 1.3):
    car.ellipse(axle, 0.33, 0.36, 0.36, (rng.uniform(0.07, 0.12),) * 3)
    car.ellipse(axle, 0.33, 0.2, 0.2, (0.55,) * 3)


def rear_car(canvas: Canvas, x: float, z: float) -> None:
  """A car from behind or from the front."""
  rng = canvas.rng
  car = _figure(canvas, x, z, rng.uniform(1, 1.2), ID['car'])
  paint = colour(rng, (0, 360), (0, 0.9), (0.15, 0.9))
  glass = colour(rng, (190, 230), (0.05, 0.3), (0.12, 0.45))
  roof, waist = rng.uniform(1.4, 1.8), rng.uniform(0.85, 1.0)
  car.shadow(1.1, 0.3)
  for side in (-1, 1):
    car.box((side * 0.55, side * 0.85), (0, 0.5), (0.07, 0.07, 0.08))
  height = (waist, roof, roof, waist)
  car.polygon((-0.88, -0.68, 0.68, 0.88), height, paint * 0.95, grain=0.04)
  height = (waist + 0.04, roof - 0.12, roof - 0.12, waist + 0.04)
  car.polygon((-0.72, -0.58, 0.58, 0.72), height, glass, grain=0.05, shade=0.8)
  height = (0.25, 0.6, waist, waist, 0.6, 0.25)
  body = (-0.9, -0.95, -0.88, 0.88, 0.95, 0.9)
  car.polygon(body, height, paint, grain=0.04, pattern=_rounded)
  lamp = (0.75, 0.1, 0.05) if rng.random() < 0.6 else (1, 0.95, 0.75)
  for side in (-1, 1):
    car.ellipse(side * 0.74, 0.72, 0.14, 0.1, lamp)
  car.box((-0.25, 0.25), (0.42, 0.56), (0.85, 0.85, 0.75))
  car.box((-0.9, 0.9), (0.22, 0.36), paint * 0.4)


def person(canvas: Canvas, x: float, z: float) -> None:
  """Somebody who stands or walks, in warm colours."""
  rng = canvas.rng
  body = _figure(canvas, x, z, rng.uniform(1.55, 1.9), ID['person'])
  skin = colour(rng, (12, 28), (0.25, 0.6), (0.3, 0.95))
  coat = colour(rng, (-60, 60), (0.45, 0.9), (0.4, 0.95))
  trousers = colour(rng, (200, 260), (0.1, 0.6), (0.1, 0.45))
  hair = colour(rng, (10, 45), (0.1, 0.7), (0.05, 0.6))
  skirt = rng.random() < 0.25
  broad = rng.uniform(1.1, 1.4)
  foot, hand = rng.uniform(0.05, 0.11), rng.uniform(0.17, 0.22) * broad
  body.shadow(0.25, 0.06)
  leg = skin if skirt else trousers
  for side in (-1, 1):
    x = side * foot
    hip = side * 0.11 * broad
    corners = (side * 0.005, hip, x + 0.05, x - 0.05)
    body.polygon(corners, (0.5, 0.5, 0.03, 0.03), leg, shade=0.4)
    body.ellipse(x + 0.02, 0.03, 0.075, 0.03, trousers * 0.5)
  for side in (-1, 1):
    x = side * hand
    shoulder = side * 0.15 * broad
    corners = (shoulder * 0.6, shoulder, x + 0.035, x - 0.04)
    body.polygon(corners, (0.83, 0.8, 0.47, 0.47), coat * 0.85)
    body.ellipse(x, 0.45, 0.035, 0.04, skin)
  hem, wide = (0.3, 0.19) if skirt else (0.47, 0.14)
  knit = _stripes(rng.integers(2, 9), rng.choice([0, 0, 0.35]))
  x = np.array((-wide, -0.1, -0.145, -0.05, 0.05, 0.145, 0.1, wide)) * broad
  y = (hem, 0.62, 0.82, 0.86, 0.86, 0.82, 0.62, hem)
  body.polygon(x, y, coat, shade=0.5, pattern=knit)
  body.box((-0.035, 0.035), (0.84, 0.9), skin * 0.85)
  body.ellipse(0, 0.945, 0.068, 0.085, hair)
  if rng.random() < 0.75:  # Seen from the front.
    body.ellipse(rng.uniform(-0.03, 0.03), 0.925, 0.052, 0.066, skin)


def clutter(canvas: Canvas, x: float, z: float) -> None:
  """A sign on a post, a boulder or a box, all of no class."""
  # "Other" looks like things, or a network could take all things for classes.
  rng = canvas.rng
  thing = _figure(canvas, x, z, 1, OTHER)
  paint = colour(rng, (0, 360), (0, 0.7), (0.15, 0.9))
  kind = rng.integers(3)
  thing.shadow(0.4, 0.1)
  if kind == 0:
    tall = rng.uniform(1.5, 3.5)
    thing.box((-0.06, 0.06), (0, tall), paint * 0.6, shade=0.6)
    thing.ellipse(0, tall, 0.3, 0.3, paint)
  elif kind == 1:
    rx, ry = rng.uniform(0.3, 0.6, 2)
    stone = colour(rng, (20, 60), (0, 0.2), (0.3, 0.6))
    thing.ellipse(0, 0.5 * ry, rx, ry, stone, grain=0.3, shade=0.7)
  else:
    half, tall = rng.uniform(0.25, 0.5), rng.uniform(0.4, 0.9)
    thing.box((-half, half), (0, tall), paint, shade=0.4)


def _post(canvas: Canvas, x: float, z: float, tall: float) -> Figure:
  """A round post `tall` metres high, in units of metres."""
  rng = canvas.rng
  post = _figure(canvas, x, z, 1, CITY_ID['pole'], int(rng.choice([-1, 1])))
  half = rng.uniform(0.07, 0.12)
  paint = colour(rng, (0, 360), (0, 0.3), (0.2, 0.7))
  post.shadow(0.3, 0.08)
  post.box((-half, half), (0, tall), paint, shade=0.9)
  return post


def lamp_post(canvas: Canvas, x: float, z: float) -> None:
  """A street lamp: a post with an arm."""
  tall = canvas.rng.uniform(4, 7)
  post = _post(canvas, x, z, tall)
  reach = canvas.rng.uniform(0.4, 1.2)
  post.box((0, reach), (tall - 0.12, tall), (0.35,) * 3)
  post.ellipse(reach, tall - 0.1, 0.35, 0.12, (0.8, 0.8, 0.75))


def traffic_sign(canvas: Canvas, x: float, z: float) -> None:
  """A round, triangular or rectangular sign with a border, on a post."""
  rng = canvas.rng
  tall = rng.uniform(1.9, 2.8)
  post = _post(canvas, x, z, tall)
  # The sign is a class of its own, in its own units, at the top of the post.
  sign = _figure(canvas, x, z, rng.uniform(0.35, 0.5), CITY_ID['signboard'])
  sign.y -= tall * post.scale
  border = colour(rng, (-15, 10), (0.75, 0.95), (0.5, 0.85))
  inside = np.array([0.9, 0.9, 0.85])
  kind = rng.integers(4)
  if kind == 0:
    border, inside = colour(rng, (200, 230), (0.7, 0.95), (0.4, 0.8)), border
  for size, paint in ((1, border), (0.72, inside)):
    if kind < 2:
      sign.ellipse(0, 0, size, size, paint, grain=0.04)
    elif kind == 2:
      corners = (-size, 0, size), (-0.7 * size, size, -0.7 * size)
      sign.polygon(*corners, paint, grain=0.04)
    else:
      sign.box((-size, size), (-0.7 * size, 0.7 * size), paint, grain=0.04)
