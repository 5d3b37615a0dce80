"""Shapes as pixels, each as the tool of its format draws them.

Those that draw return bool (height, width), and raise `Fault` for a shape that
cannot be drawn.
"""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from resnest_jax.data.annotations.sample import Fault, Shape
from resnest_jax.data.images import by_pillow
from resnest_jax.errors import UserError
from resnest_jax.labels import IGNORE
from resnest_jax.text import plural

# How far a point may lie outside, in pictures: beyond, it is no place in it,
# and drawing would take the memory for the way there.
_FAR = 4
_MOST_UNKNOWN = 10  # Numbers of a mask: smoothed colours are thousands.
_OF_ANOTHER = 'has run lengths for another size than that of its picture'
_LONGEST = 2**24  # Pixels of an outline; pycocotools takes 40 bytes for each.


def corners(
  points: Any, height: int, width: int, least: int = 3, hint: str = ''
) -> np.ndarray:
  """Points as float64 (N, 2) of x and y; N is at least `least`."""
  try:
    pairs = np.asarray(points, np.float64).reshape(-1, 2)
  except (TypeError, ValueError) as error:
    raise Fault('has points that are no pairs of numbers') from error
  if len(pairs) < least:
    raise Fault(f'has fewer than {least} points')
  if np.isnan(pairs).any():
    raise Fault('has points that are NaN')
  size = np.array([width, height])
  near = np.abs(pairs) <= _FAR * size + 1
  if not near.all() or (pairs.max(0) < 0).any() or (pairs.min(0) > size).any():
    raise Fault(f'lies outside of its picture{hint}')
  return pairs


def polygons(outlines: Any, height: int, width: int) -> np.ndarray:
  """The union of polygons, or run lengths, as `annToMask` of pycocotools.

  CVAT's and Datumaro's exports of masks are drawn by the same function.
  """
  from pycocotools import mask

  if isinstance(outlines, dict):
    # Turned, they would have the same sum.
    if outlines.get('size', [height, width]) != [height, width]:
      raise Fault(_OF_ANOTHER)
    return runs(outlines.get('counts'), height, width)
  if not isinstance(outlines, list) or not outlines:
    raise Fault('has no outline (the box of an object is none)')
  points = [corners(x, height, width) for x in outlines]
  if sum(np.abs(np.diff(x, axis=0)).sum() for x in points) > _LONGEST:
    raise Fault('has an outline that is too long')
  flat = [x.ravel().tolist() for x in points]
  union = mask.merge(mask.frPyObjects(flat, height, width))
  # Not `mask.decode`, of which NumPy warns.
  return runs(union['counts'].decode(), height, width)


def runs(counts: Any, height: int, width: int) -> np.ndarray:
  """COCO's run lengths, down the columns; a text has them compressed."""
  # Not pycocotools, which writes beyond the picture where they say so.
  if isinstance(counts, str):
    counts = _uncompressed(counts)
  try:
    lengths = np.asarray(counts, np.int64).ravel()
  except (TypeError, ValueError, OverflowError) as error:
    raise Fault('has run lengths that are no numbers') from error
  low, high = lengths.min(initial=0), lengths.max(initial=0)
  if low < 0 or high > height * width or lengths.sum() != height * width:
    raise Fault(_OF_ANOTHER)
  is_object = np.arange(lengths.size) % 2 == 1
  return np.repeat(is_object, lengths).reshape(width, height).T


def _uncompressed(text: str) -> list[int]:
  # Five bits a character, the lowest first; the sixth says that more follow.
  # From the fourth on they are differences to the one before the last.
  counts, value, shift = [], 0, 0
  for character in text:
    bits = ord(character) - 48
    if not 0 <= bits < 64 or shift > 40:
      raise Fault('has run lengths that are damaged')
    value |= (bits & 31) << shift
    shift += 5
    if not bits & 32:
      value -= (bits & 16 and 1) << shift
      counts.append(value + (counts[-2] if len(counts) > 2 else 0))
      value = shift = 0
  return counts


def labelme(shape: Mapping[str, Any], height: int, width: int) -> np.ndarray:
  """As labelme's `shapes_to_label`: by Pillow, with the outline."""
  kind = shape.get('shape_type') or 'polygon'
  areas = ('polygon', 'oriented_rectangle')
  least = 3 if kind in areas else 2
  points = corners(shape.get('points'), height, width, least)
  picture = Image.new('L', (width, height))
  draw, places = ImageDraw.Draw(picture), list(map(tuple, points.tolist()))
  if kind in areas:
    draw.polygon(places, 1, 1)
  elif kind == 'rectangle':
    draw.rectangle([*points.min(0).tolist(), *points.max(0).tolist()], 1, 1)
  elif kind == 'circle':
    radius = math.dist(*places[:2])
    low, high = points[0] - radius, points[0] + radius
    draw.ellipse([*low.tolist(), *high.tolist()], 1, 1)
  elif kind == 'mask':
    try:
      file = io.BytesIO(base64.b64decode(shape.get('mask')))
    except (TypeError, ValueError) as error:
      raise Fault('has a mask that is damaged') from error
    part = by_pillow(file, lambda x: np.array(x) > 0, np.zeros(0))
    (left, top), (right, low) = points[:2].round().astype(int).tolist()
    # Of corners between pixels labelme keeps the mask's own size.
    if part.ndim == 2 and (points == points.round()).all():
      part = part[: max(low - top + 1, 0), : max(right - left + 1, 0)]
    if part.ndim != 2 or not part.size:
      raise Fault('has a mask that cannot be read')
    picture.paste(1, (left, top), Image.fromarray(part))
  else:
    raise Fault(f'is of the kind {kind}, which is not drawn')
  return np.asarray(picture).astype(bool)


def numbered(
  numbers: np.ndarray,
  labels: Mapping[int, str],
  where: str,
  words: Callable[[int], str] = str,
) -> list[Shape]:
  """The pixels of each number in (H, W) as a shape; labels '' are not counted.

  Numbers without a label are shapes of a class that is none.
  """

  def draw(some: int | list[int], *size: int) -> np.ndarray:
    if numbers.shape != size:  # Of all shapes, which no fault is.
      raise UserError('has a mask of another size than its picture')
    return np.isin(numbers, some)

  found, counts = (x.tolist() for x in np.unique(numbers, return_counts=True))
  shapes = [
    Shape(labels[x], where, partial(draw, x)) for x in found if labels.get(x)
  ]
  unknown = [
    (words(x), f'{plural(count, "pixel")} in {where}', x)
    for x, count in zip(found, counts, strict=True)
    if x not in labels
  ]
  if rest := [x for *_, x in unknown[_MOST_UNKNOWN:]]:
    more = f'{len(rest)} more, as JPEG or smoothed edges leave them'
    unknown[_MOST_UNKNOWN:] = [(more, where, rest)]
  return [*shapes, *(Shape(*x, partial(draw, k)) for *x, k in unknown)]


def paint(
  shapes: Sequence[Shape],
  size: tuple[int, int],
  values: Mapping[str, int],
  rest: int,
  small: bool,
) -> tuple[np.ndarray, list[tuple[str, str]]]:
  """Draws shapes, whose labels have `values`, into (H, W) of `rest`.

  It is uint8, or uint16 for values above 255. A later shape covers an earlier
  one; if `small`, no smaller one. Returns also (what, where) of each that is
  bad; of a label without a value the pixels are 255, as far as they are known.
  """
  most = max(*values.values(), rest, IGNORE)
  canvas, faults = np.full(size, rest, np.min_scalar_type(most)), []
  # Pixels of the shape that each belongs to: no mask has to wait for another.
  area = np.full(size, canvas.size) if small else 0
  for shape in shapes:
    try:
      mask = shape.draw(*size)
      if small:
        number = np.count_nonzero(mask)
        mask = mask & (number <= area)
        area[mask] = number
      canvas[mask] = values.get(shape.label, IGNORE)
      if shape.label not in values:
        raise Fault(f'is of the class {shape.label!r}, which is not listed')
    except Fault as error:
      faults.append((str(error), shape.where))
  return canvas, faults
