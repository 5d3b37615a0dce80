"""Label maps as polygons, which annotation tools read as pre-annotations.

Each connected region of a class is one polygon: the centres of its pixels are
inside, and no others. Formats of polygons have no holes; a cut of no width
leads from the outline to a hole, which programs fill rightly. Corners are in
pixels from the upper left corner of the picture.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from contourpy import FillType, contour_generator

from resnest_jax.files import whole_file, write_json
from resnest_jax.inference.predictions import Prediction

# Where outlines run: 0 is at the centres of pixels outside, 1 at those inside.
# labelme rounds corners down and draws the outline as well.
COCO, LABELME = 0.5, 0.75
Region = dict[str, Any]  # As COCO's annotation; its numbers may be an array.


def regions(prediction: Prediction, level: float = COCO) -> list[Region]:
  """The regions of a label map with (H, W) probabilities, largest first."""
  labels, found = prediction.labels, []
  for label in np.unique(labels).tolist():
    mask = np.uint8(labels == label)
    # Pixels that meet at a corner do not connect: each has one outline.
    parts = cv2.connectedComponentsWithStats(mask, connectivity=4)
    for number, (*box, area) in enumerate(parts[2].tolist()[1:], 1):
      x, y, width, height = box
      place = np.s_[y : y + height, x : x + width]
      inside = parts[1][place] == number
      score = float(prediction.probabilities[place][inside].mean())
      ring = np.add(outline(inside, level), (x, y)).round(2).ravel()
      facts = {'category_id': label + 1, 'bbox': box, 'area': area}
      facts |= {'score': round(score, 4), 'segmentation': [ring], 'iscrowd': 0}
      found.append(facts)
  return sorted(found, key=lambda region: -region['area'])


def outline(inside: np.ndarray, level: float) -> np.ndarray:
  """The corners, (N, 2) of x and y, around a connected mask, bool (H, W)."""
  field = np.pad(inside, 1).astype(np.float64)
  lines = contour_generator(z=field, fill_type=FillType.OuterOffset)
  (corners,), (ends,) = lines.filled(level, 2.0)
  rings = []
  for ring in np.split(corners, ends[1:-1]):
    # From where the padding begins to the corner of the first pixel.
    ring = np.float32(ring[:-1, None] - 0.5)
    # Less than the distance from the nearest centre inside.
    simple = cv2.approxPolyDP(ring, 0.7 * (1 - level), closed=True)
    rings.append((simple if len(simple) > 2 else ring)[:, 0])
  ring, *holes = rings
  # From left to right: so to the left of a hole there is nothing but the region
  # before what has been joined.
  for hole in sorted(holes, key=lambda hole: hole[:, 0].min()):
    hole = np.roll(hole, -hole[:, 0].argmin(), 0)
    (x, y), (x0, y0), (x1, y1) = hole[0], ring.T, np.roll(ring, -1, 0).T
    sides = np.flatnonzero((y0 <= y) != (y1 <= y))
    slope = (x1 - x0)[sides] / (y1 - y0)[sides]
    meets = x0[sides] + (y - y0[sides]) * slope
    best = np.where(meets < x, meets, -np.inf).argmax()
    cut = [[meets[best], y]]
    joined = np.concatenate([cut, hole, hole[:1], cut])
    ring = np.insert(ring, sides[best] + 1, joined, 0)
  return ring


def write_labelme(prediction: Prediction, source: Path, file: Path) -> None:
  """Writes a picture's file; later shapes lie over earlier ones there."""
  shapes = [
    {
      'label': prediction.classes[region['category_id'] - 1],
      'points': region['segmentation'][0].reshape(-1, 2).tolist(),
      'shape_type': 'polygon',
      'description': f'confidence {region["score"]}',
      'score': region['score'],
    }
    for region in regions(prediction, LABELME)
  ]
  height, width = prediction.labels.shape
  about = {'version': '5.5.0', 'shapes': shapes, 'imageData': None}
  about['imagePath'] = os.path.relpath(source, file.parent)
  write_json(file, about | {'imageHeight': height, 'imageWidth': width})


def write_coco(
  file: Path,
  pictures: Sequence[tuple[str, tuple[int, int], list[Region]]],
  classes: Sequence[str],
) -> None:
  """Writes one file for all pictures: the name, size and regions of each."""
  images, annotations = [], []
  for number, (name, (height, width), found) in enumerate(pictures, 1):
    image = {'id': number, 'file_name': name, 'width': width, 'height': height}
    images.append(image)
    for region in found:
      ids = {'id': len(annotations) + 1, 'image_id': number}
      annotations.append(ids | region)
  names = [{'id': k, 'name': x} for k, x in enumerate(classes, 1)]
  about = {'images': images, 'annotations': annotations, 'categories': names}
  with whole_file(file) as temporary, temporary.open('w') as stream:
    # To the file at once: as Python's, numbers take several times the memory.
    json.dump(about, stream, default=np.ndarray.tolist)
