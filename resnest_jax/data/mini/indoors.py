"""Bedrooms, drawn by the plane of a box that each pixel sees."""

import dataclasses
import functools

import cv2
import numpy as np

from resnest_jax.data.mini import things
from resnest_jax.data.mini.canvas import ID, Canvas, Pattern, colour, fbm, tiled


@dataclasses.dataclass
class _Room:
  """A box-shaped room, in metres; x is 0 at the camera, floor at y = 0."""

  left: float
  right: float
  top: float
  back: float
  # (H, W), the plane that a pixel sees: 0 floor, 1 ceiling, 2 left, 3 right, 4
  # back wall; and metres along it, horizontally, and up or away.
  surface: np.ndarray
  u: np.ndarray
  v: np.ndarray


def bedroom(canvas: Canvas) -> None:
  rng = canvas.rng
  # The canvas' camera stands in a street; indoors it sees a wider angle.
  canvas.horizon = canvas.height * rng.uniform(0.34, 0.46)
  canvas.eye = rng.uniform(1.4, 1.8)
  canvas.f = canvas.size() * rng.uniform(0.7, 0.95)
  room = _make_room(canvas)
  _surfaces(canvas, room)
  _hangings(canvas, room)
  # (z, function): all are placed first, and the far ones drawn first.
  placed = []
  if rng.random() < 0.85:
    wide = rng.uniform(1.3, 2.0)
    x = rng.uniform(room.left, max(room.right - wide, room.left + 0.1))
    placed.append((room.back - 1.1, lambda: _bed(canvas, room, x, wide)))
  people = [things.person] * int(rng.choice(3, p=[0.55, 0.35, 0.1]))
  for draw in people + [things.clutter] * int(rng.integers(2)):
    z = rng.uniform(2.1, room.back - 0.5)
    place = rng.uniform(room.left + 0.4, room.right - 0.4), z
    placed.append((z, functools.partial(draw, canvas, *place)))
  for _, draw in sorted(placed, key=lambda item: -item[0]):
    draw()


def _make_room(canvas: Canvas) -> _Room:
  rng = canvas.rng
  back = rng.uniform(3.2, 4.5)
  wider = min(canvas.width / canvas.height, 1.5) ** 0.7
  left = -rng.uniform(0.8, 1.7) * wider - 0.3
  right = rng.uniform(0.8, 1.7) * wider + 0.3
  top = rng.uniform(2.3, 2.9)
  # A pixel's ray (dx, dy, 1) ends at the plane that it meets first.
  x, y = canvas.grid()
  dx = (x - canvas.cx) / canvas.f + 0 * y
  dy = (canvas.horizon - y) / canvas.f + 0 * x
  with np.errstate(divide='ignore'):
    depths = [
      np.where(dy < 0, -canvas.eye / dy, np.inf),
      np.where(dy > 0, (top - canvas.eye) / dy, np.inf),
      np.where(dx < 0, left / dx, np.inf),
      np.where(dx > 0, right / dx, np.inf),
      np.full_like(dx, back),
    ]
  surface, z = np.argmin(depths, 0), np.min(depths, 0)
  u = np.where((surface == 2) | (surface == 3), z, dx * z)
  v = np.where(surface < 2, z, canvas.eye + dy * z)
  return _Room(left, right, top, back, surface, u, v)


def _surfaces(canvas: Canvas, room: _Room) -> None:
  rng = canvas.rng
  wall = colour(rng, (0, 360), (0.02, 0.3), (0.55, 0.95))
  bright = _wallpaper(rng, room.u, room.v)
  for plane, facing in ((2, -1), (3, 1), (4, 0)):
    light = 0.95 - 0.2 * canvas.light * facing
    paint = (bright * light)[..., None] * wall
    canvas.paint(room.surface == plane, paint, ID['wall'])
  floor = _flooring(rng, room.u, room.v)
  canvas.paint(room.surface == 0, floor, ID['floor'])
  ceiling = colour(rng, (20, 60), (0, 0.15), (0.7, 1))
  bright = np.ones_like(room.u)
  if rng.random() < 0.25:  # Boards.
    ceiling = colour(rng, (20, 40), (0.2, 0.5), (0.4, 0.75))
    bright = 1 - 0.25 * (np.mod(room.u * 4, 1) < 0.08)
  falloff = 1 - 0.06 * (room.back - room.v)
  paint = (bright * falloff)[..., None] * ceiling
  canvas.paint(room.surface == 1, paint, ID['ceiling'])
  # Less light reaches the corners. `corner`: metres to the nearest edge of the
  # plane; of floor and ceiling only the edge at the back wall counts.
  walls = room.surface >= 2
  up = np.minimum(np.abs(room.v), np.abs(room.top - room.v))
  across = np.minimum(np.abs(room.u - room.left), np.abs(room.u - room.right))
  across = np.where(room.surface == 4, across, np.abs(room.u - room.back))
  away = np.abs(room.back - room.v)
  corner = np.where(walls, np.minimum(up, across), away)
  x, _ = canvas.grid()
  side = 1 + 0.25 * canvas.light * (x / canvas.width - 0.5)
  shade = (1 - 0.3 * np.exp(-corner / 0.25)) * side + 0.02 * canvas.grain
  canvas.image *= shade[..., None].astype(np.float32)
  # A skirting board is part of the wall, so the mask stays.
  skirting = walls & (room.v < 0.09) & (rng.random() < 0.6)
  canvas.image[skirting] *= rng.uniform(0.6, 1.2)


def _wallpaper(rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  # Brightness of a plain, striped, brick or patterned wall, (H, W).
  plaster = 0.03 * tiled(fbm(rng, 256, 256, 12, 4), u * 60, v * 60)
  kind = rng.choice(4, p=[0.45, 0.2, 0.15, 0.2])
  if kind == 1:
    return 1 + plaster + 0.07 * np.sign(np.sin(u * rng.uniform(12, 40)))
  if kind == 2:
    row = np.floor(v / 0.14)
    joint = np.mod(v / 0.14, 1) < 0.16
    joint |= np.mod(u / 0.3 + 0.5 * np.mod(row, 2), 1) < 0.08
    brick = tiled(fbm(rng, 64, 64, 2, 1), np.floor(u / 0.3) * 7, row * 5)
    return 1 + plaster + 0.07 * brick - 0.22 * joint
  if kind == 3:
    per = rng.uniform(12, 30)
    return 1 + plaster + 0.09 * (np.sin(u * per) * np.sin(v * per) > 0.35)
  return 1 + plaster


def _flooring(rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  # Colours of boards, tiles or a carpet, (H, W, 3).
  kind = rng.choice(3, p=[0.7, 0.15, 0.15])
  if kind == 0:
    base = colour(rng, (15, 40), (0.25, 0.65), (0.3, 0.75))
    board = np.floor(u / 0.16)
    # Multiples of the golden ratio: ends of neighbouring boards rarely meet.
    shift = np.mod(board * 0.618, 1) * 1.7
    plank = np.floor((v + shift) / 1.3)
    tone = tiled(fbm(rng, 64, 64, 1, 1), board * 5, plank * 11)
    veins = tiled(fbm(rng, 256, 256, 8, 3), u * 220, v * 18)
    gap = np.mod(u / 0.16, 1) < 0.07
    gap |= np.mod((v + shift) / 1.3, 1) < 0.02
    bright = 1 + 0.1 * tone + 0.1 * veins - 0.3 * gap
  elif kind == 1:
    base = colour(rng, (0, 360), (0, 0.25), (0.4, 0.9))
    size = rng.uniform(0.3, 0.5)
    joint = (np.mod(u / size, 1) < 0.06) | (np.mod(v / size, 1) < 0.06)
    checks = np.mod(np.floor(u / size) + np.floor(v / size), 2)
    stone = tiled(fbm(rng, 256, 256, 20, 4), u * 80, v * 80)
    bright = 1 - 0.25 * joint + 0.06 * stone
    bright = bright - rng.choice([0, 0.35]) * checks
  else:
    base = colour(rng, (0, 360), (0.1, 0.4), (0.25, 0.6))
    pile = tiled(fbm(rng, 256, 256, 3, 2), u * 70, v * 70)
    bright = 1 + 0.14 * pile
  return bright[..., None] * base


def _hangings(canvas: Canvas, room: _Room) -> None:
  rng = canvas.rng
  for plane in (2, 3, 4):
    on = room.surface == plane
    if on.sum() < 0.04 * on.size:  # The wall is hardly in view.
      continue
    # Side walls begin at the camera; their first metres are out of view.
    begin, end = (1.8, room.back) if plane < 4 else (room.left, room.right)
    at = begin + rng.uniform(0.1, 0.4)
    while at < end - 0.6:
      kind = rng.choice(3, p=[0.45, 0.4, 0.15])
      width = min(rng.uniform(1.0, 1.8), end - at - 0.1)
      if kind < 2:
        low = rng.uniform(0.75, 1.05)
        high = min(low + rng.uniform(1.0, 1.6), room.top - 0.1)
        frame = _Frame(canvas, on, room, (at, at + width), (low, high))
        # No class may be tiny.
        if frame.inside.sum() > 0.004 * on.size:
          (_window, _painting)[kind](rng, frame)
      at += width + rng.uniform(0.25, 0.8)


class _Frame:
  """A rectangle on a wall, cut out of the canvas; sizes are in metres.

  `inside`, bool (h, w), are its pixels within the smallest box around them; `a`
  and `b`, (h, w), go from 0 to 1 along its width and height.
  """

  def __init__(self, canvas: Canvas, on, room: _Room, across, up):
    self.width, self.height = across[1] - across[0], up[1] - up[0]
    a = (room.u - across[0]) / self.width
    b = (room.v - up[0]) / self.height
    inside = on & (a > 0) & (a < 1) & (b > 0) & (b < 1)
    x, y, w, h = cv2.boundingRect(inside.astype(np.uint8))
    box = slice(y, y + h), slice(x, x + w)
    self.inside, self.a, self.b = inside[box], a[box], b[box]
    self.grain = canvas.grain[box]
    self.cover = functools.partial(canvas.cover, box, self.inside)


def _window(rng: np.random.Generator, at: _Frame) -> None:
  # ADE20K labels what is seen through the panes as window, too.
  sky = colour(rng, (190, 230), (0.05, 0.45), (0.95, 1.2))
  green = colour(rng, (60, 140), (0.15, 0.5), (0.5, 0.85))
  hills = 0.06 * np.sin(at.a * rng.uniform(3, 9)) + rng.uniform(0.1, 0.6)
  view = np.where((at.b > hills)[..., None], sky, green)
  view = view * (0.75 + 0.4 * at.b + 0.04 * at.grain)[..., None]
  bars = np.zeros_like(at.inside)
  for t, size in ((at.a, at.width), (at.b, at.height)):
    count = int(rng.integers(1, 4))
    half = 0.035 * count / size
    t = np.mod(t * count, 1)
    bars |= (t < half) | (t > 1 - half)
  frame = colour(rng, (20, 60), (0, 0.15), (0.7, 1))
  at.cover(np.where(bars[..., None], frame, view), ID['windowpane'])


def _painting(rng: np.random.Generator, at: _Frame) -> None:
  border = rng.uniform(0.07, 0.12)
  # Metres to the nearest edge of the frame, (h, w).
  edge, up = np.minimum(at.a, 1 - at.a), np.minimum(at.b, 1 - at.b)
  edge = np.minimum(edge * at.width, up * at.height)
  inks = [colour(rng, (0, 360), (0.4, 0.9), (0.15, 0.8)) for _ in range(4)]
  waves = np.sin(at.a * rng.uniform(4, 14) + rng.uniform(0, 6))
  blots = waves * np.sin(at.b * rng.uniform(4, 14) + rng.uniform(0, 6))
  bands = rng.random() < 0.5  # Like a landscape; blots otherwise.
  level = at.b * 3 + 0.5 * waves if bands else 1.5 + 1.8 * blots
  ink = np.stack(inks)[np.clip(np.floor(level), 0, 3).astype(int)]
  art = ink * (1 + 0.22 * at.grain)[..., None]
  frame = colour(rng, (25, 50), (0.3, 0.7), (0.08, 0.55))
  ridge = frame * (0.8 + 4 * np.minimum(edge, border))[..., None]
  if rng.random() < 0.4:  # A white mount.
    art = np.where((edge < border * 2)[..., None], 0.9, art)
  art = np.where((edge < border)[..., None], ridge, art)
  at.cover(art, ID['painting'])


def _bed(canvas: Canvas, room: _Room, x: float, width: float) -> None:
  rng = canvas.rng
  head = room.back - 0.05
  foot = max(head - rng.uniform(1.7, 2.0), 1.9)
  wood = colour(rng, (10, 40), (0.05, 0.6), (0.15, 0.75))
  sheet = colour(rng, (0, 360), (0, 0.15), (0.7, 1))
  cover = colour(rng, (0, 360), (0.3, 0.8), (0.3, 0.95))
  high = rng.uniform(0.45, 0.6)
  u, v = canvas.project(x + width / 2, 0, foot)
  canvas.shadow(u, v, 0.65 * width * canvas.f / foot, 0.1 * canvas.f)
  board = rng.uniform(0.8, 1.25)
  _box(canvas, (x, x + width), (0, board), (head - 0.06, head), wood)
  _box(canvas, (x, x + width), (0.08, high), (foot, head - 0.06), sheet)
  for i in range(2):
    left = x + width * (0.06 + 0.48 * i)
    across, up = (left, left + width * 0.4), (high, high + 0.13)
    z = head - 0.5, head - 0.12
    _box(canvas, across, up, z, sheet * 0.95, contrast=0.1)
  end = foot + (head - foot) * rng.uniform(0.55, 0.75)
  count, strength = rng.integers(2, 8), rng.choice([0, 0.2, 0.35])
  direction = rng.random() < 0.5
  fold = rng.uniform(2, 6)

  def quilt(a, b):
    stripes = np.sign(np.sin((a if direction else b) * count * 6.28))
    return 1 + strength * stripes + 0.06 * np.sin(a * fold * 3 + b * 9)

  over = x - 0.03, x + width + 0.03
  up = rng.uniform(0.1, 0.3), high + 0.04
  _box(canvas, over, up, (foot - 0.03, end), cover, pattern=quilt)


def _box(
  canvas: Canvas, x, y, z, paint, contrast=0.3, pattern: Pattern | None = None
) -> None:
  """Draws the visible faces of a bed's part; x, y and z are from and to."""
  kwargs = {'label': ID['bed'], 'grain': 0.1, 'shade': 0.12, 'pattern': pattern}
  (x0, x1), (y0, y1), (z0, z1) = x, y, z
  if y1 < canvas.eye:
    top = canvas.project((x0, x0, x1, x1), y1, (z0, z1, z1, z0))
    canvas.fill(top, paint, **kwargs)
  for edge, sign in ((x0, -1), (x1, 1)):
    if edge * sign < 0:
      side = canvas.project(edge, (y0, y1, y1, y0), (z0, z0, z1, z1))
      dark = 1 - contrast * (1 - 0.5 * sign * canvas.light)
      canvas.fill(side, paint * dark, **kwargs)
  front = canvas.project((x0, x0, x1, x1), (y0, y1, y1, y0), z0)
  canvas.fill(front, paint * (1 - contrast), **kwargs)
