"""Writes a mini ImageNet: drawn things in the release's own layout.

ILSVRC2012_img_train.tar holds an archive for each of 12 kinds of things, and
ILSVRC2012_img_val.tar pictures whose classes take turns (`data/imagenet.py`).
They are a function of the seed and the numbers of pictures alone.
"""

import argparse
import io
import itertools
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.random import Generator

from resnest_jax.data import imagenet
from resnest_jax.data.mini import ade20k_mini, outdoors, things
from resnest_jax.data.mini.ade20k_mini import Counts
from resnest_jax.data.mini.canvas import OTHER, Canvas, Figure, colour, fbm
from resnest_jax.data.mini.scene import photograph
from resnest_jax.errors import UserError
from resnest_jax.files import explain_refusal, whole_file
from resnest_jax.progress import progress_bar
from resnest_jax.threads import map_in_threads

DEFAULT_COUNTS = {'train': 1440, 'validation': 240}

Entries = Iterator[tuple[str, bytes]]  # Names and contents.

# Raise it when the same seed draws other pictures than before.
VERSION = 1


def arguments(args: argparse.Namespace) -> tuple[dict[str, int], int]:
  return ade20k_mini.arguments(args, DEFAULT_COUNTS)


def archive_comment(counts: Counts, seed: int) -> str:
  return ade20k_mini.archive_comment(counts, seed, 'mini.imagenet', VERSION)


def write_archives(folder: Path, counts: Counts, seed: int) -> None:
  """Writes both archives unless they exist with the same arguments."""
  comment = archive_comment(counts, seed)
  paths = [folder / name for name in (imagenet.TRAIN, imagenet.VALIDATION)]
  if all(path.exists() for path in paths):
    with imagenet.opened(paths[0]) as archive:
      if archive.next() and archive.pax_headers.get('comment') == comment:
        return
    raise UserError(
      f'{folder} has archives that were not written for these --images and '
      'this --seed. Nothing was changed; give another folder or delete it.'
    )
  synsets, done = list(imagenet.MINI.classes), itertools.count(1)
  kinds, (train, validation) = len(synsets), counts.values()
  with (
    explain_refusal(f'to {folder}', 'give another folder'),
    whole_file(paths[0]) as of_train,
    whole_file(paths[1]) as of_validation,
    progress_bar('drawing things') as report,
  ):

    def draw(split: int, numbers: range, name: str) -> Entries:
      """The pictures of these numbers; the kinds take turns."""
      seeds = [(seed, split, i) for i in numbers]
      jpegs = map_in_threads(lambda x: draw_jpeg(x[-1] % kinds, x), seeds)
      for i, jpeg in zip(numbers, jpegs, strict=True):
        yield name.format(i + 1), jpeg
        report(next(done), train + validation)

    def of_classes() -> Entries:
      for kind, synset in enumerate(synsets):
        inner, numbers = io.BytesIO(), range(kind, train, kinds)
        _write(inner, draw(0, numbers, synset + '_{}.JPEG'))
        yield f'{synset}.tar', inner.getvalue()

    with of_train.open('wb') as file:
      _write(file, of_classes(), comment)
    with of_validation.open('wb') as file:
      name = 'ILSVRC2012_val_{:08d}.JPEG'
      _write(file, draw(1, range(validation), name), comment)


def _write(file: IO[bytes], entries: Entries, comment: str = '') -> None:
  options = {'format': tarfile.PAX_FORMAT, 'pax_headers': {'comment': comment}}
  with tarfile.open(fileobj=file, mode='w', **options) as archive:
    for name, content in entries:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))


def draw_jpeg(kind: int, seed: tuple[int, ...]) -> bytes:
  """The picture of a seed that shows the thing `imagenet.DRAWN[kind]`."""
  rng = np.random.default_rng(seed)
  short = int(rng.integers(96, 150))
  long = int(short * rng.choice([1, 5 / 4, 4 / 3, 3 / 2]))
  size = (short, long) if rng.random() < 0.7 else (long, short)

  def paint(canvas: Canvas) -> None:
    _background(canvas)
    what = imagenet.DRAWN[kind]
    if what in _FIGURES:
      _draw_figure(canvas, _FIGURES[what])
    else:
      _draw_thing(canvas, *_THINGS[what])

  image, _ = photograph(rng, *size, paint)
  return ade20k_mini.jpeg(rng, image)


def _background(canvas: Canvas) -> None:
  rng = canvas.rng
  if rng.random() < 0.6:
    outdoors.sky(canvas)
    outdoors.grass(canvas)
  else:  # A wall.
    paint = colour(rng, (0, 360), (0, 0.5), (0.3, 0.95))
    noise = fbm(rng, canvas.height, canvas.width, rng.uniform(4, 60), 3)
    canvas.image[:] = (1 + rng.uniform(0, 0.25) * noise[..., None]) * paint


def _draw_thing(
  canvas: Canvas, draw: Callable, near: float, far: float
) -> None:
  """A thing `near` to `far` metres away, about in the middle."""
  z = canvas.rng.uniform(near, far)
  column = canvas.width * canvas.rng.uniform(0.4, 0.6)
  draw(canvas, (column - canvas.cx) * z / canvas.f, z)


def _car(canvas: Canvas, x: float, z: float) -> None:
  side = canvas.rng.random() < 0.5
  (things.side_car if side else things.rear_car)(canvas, x, z)


def _draw_figure(canvas: Canvas, draw: Callable) -> None:
  """A figure that is one unit high and as wide at most, half of it or more."""
  rng = canvas.rng
  tall = rng.uniform(0.65, 0.95) * min(canvas.height, canvas.width)
  x = canvas.width * rng.uniform(0.42, 0.58)
  y = (canvas.height + tall) / 2 + rng.uniform(-0.05, 0.05) * canvas.height
  facing = int(rng.choice([-1, 1]))
  draw(Figure(canvas, x, y, tall, OTHER, facing), rng)


def _bright(rng: Generator) -> np.ndarray:
  return colour(rng, (0, 360), (0.5, 0.95), (0.5, 0.95))


def _balloon(figure: Figure, rng: Generator) -> None:
  for wide, shade in (0.36, 0.6), (0.2, 0.25), (0.07, 0.25):
    figure.ellipse(0, 0.62, wide, 0.38, _bright(rng), shade=shade)
  figure.polygon((-0.2, -0.06, 0.06, 0.2), (0.32, 0.12, 0.12, 0.32), (0.6,) * 3)
  basket = colour(rng, (20, 40), (0.4, 0.7), (0.3, 0.6))
  figure.box((-0.08, 0.08), (0, 0.12), basket)


def _mushroom(figure: Figure, rng: Generator) -> None:
  white = colour(rng, (30, 60), (0, 0.2), (0.8, 1))
  figure.polygon((-0.15, -0.1, 0.1, 0.15), (0, 0.6, 0.6, 0), white, shade=0.5)
  t = np.linspace(0, np.pi, 24)
  cap = colour(rng, (-15, 40), (0.6, 0.95), (0.4, 0.85))
  figure.polygon(0.45 * np.cos(t), 0.5 + 0.45 * np.sin(t), cap, shade=0.5)
  for x in rng.uniform(-0.3, 0.3, 5):
    figure.ellipse(x, rng.uniform(0.58, 0.8), 0.05, 0.04, white)


def _sailing_boat(figure: Figure, rng: Generator) -> None:
  white = colour(rng, (0, 360), (0, 0.4), (0.8, 1))
  figure.polygon((-0.45, -0.33, 0.3, 0.48), (0.18, 0, 0, 0.2), _bright(rng))
  figure.box((-0.015, 0.015), (0.15, 1), (0.3, 0.2, 0.1))
  figure.polygon((0.03, 0.03, 0.4), (0.25, 0.95, 0.25), white)
  figure.polygon((-0.03, -0.03, -0.3), (0.25, 0.85, 0.25), white * 0.9)


def _table(figure: Figure, rng: Generator) -> None:
  wood = colour(rng, (10, 45), (0.2, 0.7), (0.25, 0.8))
  for x in (-0.36, -0.24, 0.24, 0.36):
    figure.box((x - 0.03, x + 0.03), (0, 0.55), wood * 0.7)
  figure.polygon((-0.5, -0.38, 0.38, 0.5), (0.5, 0.72, 0.72, 0.5), wood)
  figure.box((-0.5, 0.5), (0.45, 0.5), wood * 0.85)


def _bottle(figure: Figure, rng: Generator) -> None:
  glass = colour(rng, (20, 200), (0.4, 0.9), (0.2, 0.6))
  x = np.array((-0.15, -0.15, -0.05, -0.05, 0.05, 0.05, 0.15, 0.15))
  figure.polygon(x, (0, 0.6, 0.75, 0.98, 0.98, 0.75, 0.6, 0), glass, shade=0.9)
  paper = colour(rng, (30, 60), (0, 0.3), (0.8, 1))
  figure.box((-0.15, 0.15), (0.2, 0.45), paper)
  figure.box((-0.06, 0.06), (0.93, 1), _bright(rng))


def _umbrella(figure: Figure, rng: Generator) -> None:
  paints = _bright(rng), _bright(rng)
  figure.box((-0.015, 0.015), (0.05, 0.95), (0.2,) * 3)
  figure.box((-0.015, 0.12), (0.03, 0.06), (0.2,) * 3)
  for i, (low, high) in enumerate(itertools.pairwise(np.linspace(-1, 1, 7))):
    t = np.linspace(low, high, 6)
    x, y = np.append(0.48 * t, 0), 0.55 + 0.1 * np.sqrt(1 - t * t)
    figure.polygon(x, np.append(y, 0.97), paints[i % 2])


# With the least and the greatest distance, in metres.
_THINGS = {
  'house': (things.building, 10, 16),
  'tree': (things.tree, 4.5, 7),
  'car': (_car, 3.5, 6),
  'person': (things.person, 2.2, 3.2),
  'street lamp': (things.lamp_post, 6, 9),
  'traffic sign': (things.traffic_sign, 2.6, 3.6),
}
_FIGURES = {
  'balloon': _balloon,
  'mushroom': _mushroom,
  'sailing boat': _sailing_boat,
  'table': _table,
  'bottle': _bottle,
  'umbrella': _umbrella,
}
