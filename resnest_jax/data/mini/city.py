"""City streets seen by a car's camera, with 10 of Cityscapes' classes."""

import numpy as np

from resnest_jax.data.mini import outdoors, things
from resnest_jax.data.mini.canvas import CITY_ID, ID, Canvas, colour, fbm, tiled
from resnest_jax.data.mini.scene import photograph

# Canvas values beyond all of ADE20K's, for areas that are not evaluated.
EGO_VEHICLE = 254
OUT_OF_ROI = 255

# Canvas value -> Cityscapes' label id; others become 0, unlabelled.
LABEL_IDS = {
  EGO_VEHICLE: 1,
  OUT_OF_ROI: 3,
  ID['road']: 7,
  CITY_ID['sidewalk']: 8,
  ID['building']: 11,
  CITY_ID['pole']: 17,
  CITY_ID['signboard']: 20,
  ID['tree']: 21,
  ID['grass']: 22,
  ID['sky']: 23,
  ID['person']: 24,
  ID['car']: 26,
}


def draw_scene(
  seed: tuple[int, ...], height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """The street of a seed: RGB, uint8 (H, W, 3); label ids, uint8 (H, W)."""
  rng = np.random.default_rng(seed)
  image, mask = photograph(rng, height, width, _street)
  margin = max(round(width / 400), 1)
  mask[:margin] = mask[-margin:] = OUT_OF_ROI
  mask[:, :margin] = mask[:, -margin:] = OUT_OF_ROI
  table = np.zeros(256, np.uint8)
  table[list(LABEL_IDS)] = list(LABEL_IDS.values())
  return image, table[mask]


def _street(canvas: Canvas) -> None:
  """A road between pavements, houses, verges; along the view or across it."""
  rng = canvas.rng
  outdoors.sky(canvas)
  ground = outdoors.grass(canvas)
  along = rng.random() < 0.7
  half, pavement = rng.uniform(2.2, 3.6), rng.uniform(1.2, 2.4)
  lane = outdoors.lane_of(rng, ground, 0.008 if along else None, (4.5, 6), half)
  # The pavement is as wide as the whole street; asphalt then covers its middle.
  _pavement(canvas, ground, lane, half + pavement)
  outdoors.asphalt(canvas, ground, lane, half)
  _houses(canvas, along, half + pavement)
  outdoors.stand(
    canvas,
    (things.rear_car if along else things.side_car, ID['road'], 1, 3),
    (things.tree, ID['grass'], 0, 3),
    (things.tree, CITY_ID['sidewalk'], 0, 1),
    (things.person, CITY_ID['sidewalk'], 0, 3),
    (things.person, ID['road'], 0, 1),
    (things.lamp_post, CITY_ID['sidewalk'], 0, 2),
    (things.traffic_sign, CITY_ID['sidewalk'], 1, 2),
    (things.clutter, CITY_ID['sidewalk'], 0, 1),
  )
  if rng.random() < 0.7:
    _bonnet(canvas)


def _pavement(
  canvas: Canvas, ground: outdoors.Ground, lane: outdoors.Lane, half: float
) -> None:
  """Paints slabs; see `asphalt` for the arguments."""
  rng, (side, forward) = canvas.rng, lane
  where = ground.below & (np.abs(side) < half) & (ground.z < 150)
  base = colour(rng, (0, 60), (0, 0.25), (0.35, 0.75))
  stones = tiled(fbm(rng, 256, 256, 4, 2), forward * 30, side * 30)
  length, wide = rng.uniform(0.4, 1, 2)
  joints = (np.mod(forward, length) < 0.08) | (np.mod(side, wide) < 0.06)
  bright = 1 + 0.07 * stones * ground.fade + 0.05 * canvas.grain
  bright = bright * (1 - rng.uniform(0.2, 0.4) * joints * ground.fade)
  canvas.paint(where, bright[..., None] * base, CITY_ID['sidewalk'])


def _houses(canvas: Canvas, along: bool, free: float) -> None:
  # At least `free` metres from the road's middle.
  rng = canvas.rng
  if along:
    for side in (-1, 1):
      verge = rng.uniform(0, 3)
      z = rng.uniform(34, 44)
      while z > 9:  # The far ones first, as nearer ones cover them.
        things.building(canvas, side * (free + verge + rng.uniform(4, 5)), z)
        z -= rng.uniform(5, 9)
  else:
    outdoors.house_row(canvas, rng.uniform(6, 9) + 2 * free, 1.3, 0.85)


def _bonnet(canvas: Canvas) -> None:
  rng = canvas.rng
  paint = colour(rng, (0, 360), (0, 0.3), (0.1, 0.5))
  middle = canvas.width * rng.uniform(0.4, 0.6)
  half, high = canvas.width * rng.uniform(0.4, 0.6), canvas.height * 0.1
  t = np.linspace(0, np.pi, 48)
  x, y = middle + half * np.cos(t), canvas.height - high * np.sin(t)
  canvas.fill(np.stack([x, y], -1), paint, EGO_VEHICLE, grain=0.03)
