"""Scenes of polygons in two classes, as annotation tools write them.

Datumaro writes here what it has a writer for. The files in `GOLDEN` are of
labelme 7.9.1, of the converter of Ultralytics 8.4.190 (from Datumaro's COCO of
these scenes), and of Hugging Face's datasets 5.2.0, each with its own masks.
"""

import base64
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from data.garden import COLOURS, rgb
from data.small_archives import encode
from datumaro import Dataset, DatasetItem
from datumaro.components.annotation import (
  AnnotationType,
  LabelCategories,
  MaskCategories,
  Polygon,
)
from datumaro.components.media import Image
from pycocotools import mask as coco

GOLDEN = Path(__file__).parents[1] / 'golden'
YOLO = json.loads((GOLDEN / 'ultralytics_8.4.190.json').read_text())
NAMES = ('leaf', 'flower')
SIZE = 60, 80
SAMPLES = ('train/0', 'train/bed/1', 'train/2', 'val/3', 'val/bed/4')


def draw(points):
  """As `annToMask` of pycocotools."""
  return coco.decode(coco.frPyObjects([points], *SIZE)[0]).astype(bool)


def scenes():
  """The shapes of each sample: class, layer and points."""
  rng, shapes = np.random.default_rng(0), {}
  for name in SAMPLES:
    shapes[name] = []
    for k in range(4):
      angle, radius = np.sort(rng.uniform(0, 6.28, 7)), rng.uniform(4, 25, 7)
      x = rng.uniform(10, 60) + radius * np.cos(angle)
      y = rng.uniform(10, 50) + radius * np.sin(angle)
      # As exact as CVAT and Datumaro keep them.
      points = np.float32(np.stack([x, y], -1).round(2)).ravel().tolist()
      shapes[name].append((k % 2, k // 2, points))
  return shapes


SCENES = scenes()


def expected(name, form=''):
  """Class numbers with 0 for the background, as a format has the shapes."""
  # Ultralytics keeps six digits.
  shapes = yolo_shapes(name) if form == 'yolo' else SCENES[name]
  small = form in ('coco', 'yolo')
  masks = [(label, layer, draw(x)) for label, layer, x in shapes]
  masks.sort(key=lambda x: -x[2].sum() if small else x[1])
  result = np.zeros(SIZE, np.uint8)
  for label, _, mask in masks:
    result[mask] = label + 1
  return result


def image_of(name):
  return np.random.default_rng(len(name)).integers(0, 255, (*SIZE, 3), np.uint8)


def by_datumaro(form):
  def write(folder):
    items = []
    for name, shapes in SCENES.items():
      split, _, stem = name.partition('/')
      items += [
        DatasetItem(
          stem,
          subset=split,
          media=Image.from_numpy(data=image_of(name)),
          annotations=[
            Polygon(x, label=label, z_order=layer, id=i, group=i)
            for i, (label, layer, x) in enumerate(shapes, 1)
          ],
        )
      ]
    colours = {i: tuple(c) for i, c in enumerate(COLOURS[1:].tolist())}
    categories = {
      AnnotationType.label: LabelCategories.from_iterable(NAMES),
      AnnotationType.mask: MaskCategories(colours),
    }
    data = Dataset.from_iterable(items, categories=categories)
    if form in ('voc_segmentation', 'coco_panoptic'):
      data.transform('polygons_to_masks')
    data.export(str(folder), form, save_media=True)

  return write


def write_pictures(folder, place='images/{}.jpg'):
  for name in SAMPLES:
    path = folder / place.format(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(image_of(name), '.jpg'))


def yolo_shapes(name):
  rows = (line.split() for line in YOLO[name].splitlines())
  for label, *shares in rows:
    points = np.reshape(np.float64(shares), (-1, 2)) * SIZE[::-1]
    yield int(label), 0, points.ravel().tolist()


def yolo(folder):
  write_pictures(folder)
  for name, lines in YOLO.items():
    path = folder / f'labels/{name}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines)
    path.with_name('classes.txt').write_text('leaf\nflower\n')
  about = (
    'train: ../images/train\nval: images/val\nnc: 2\nnames: [leaf, flower]\n'
    'test: [../test/images, images/test]\n'  # Neither has to be there.
  )
  (folder / 'data.yaml').write_text(about)


def drawn_by_ultralytics():
  """Class numbers of each sample by its `polygons2masks_overlap`."""
  file = str(GOLDEN / 'ultralytics_8.4.190.png')
  masks = cv2.imread(file, cv2.IMREAD_UNCHANGED)
  return dict(zip(SAMPLES, masks.reshape(-1, *SIZE), strict=True))


def roboflow(folder):
  write_pictures(folder, '{}.jpg')
  for name in SAMPLES:
    (folder / f'{name}_mask.png').write_bytes(encode(expected(name)))
  for split in ('train', 'val'):
    table = 'Pixel Value, Class\n0, background\n1, leaf\n2, flower\n'
    (folder / split / '_classes.csv').write_text(table)


def coloured(folder):
  write_pictures(folder)
  for name in SAMPLES:
    path = folder / f'masks/{name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(rgb(expected(name)))
  lines = zip(('background', *NAMES), COLOURS.tolist(), strict=True)
  text = ''.join(f'{x} {" ".join(map(str, c))}\n' for x, c in lines)
  (folder / 'classes.txt').write_text(text)


def parquet(folder):
  folder.mkdir(parents=True, exist_ok=True)
  for split in ('train', 'val'):
    file = folder / f'{split}-00000-of-00001.parquet'
    shutil.copy(GOLDEN / f'datasets_5.2.0_{split}.parquet', file)


def labelme(folder):
  """A picture alone, of which `labelme_7.9.1.png` is the tool's own mask."""
  folder.mkdir(parents=True, exist_ok=True)
  about = GOLDEN / 'labelme_7.9.1.json'
  shutil.copy(about, folder / 'a.json')
  picture = base64.b64decode(json.loads(about.read_text())['imageData'])
  (folder / 'a.jpg').write_bytes(picture)


WRITERS = {
  'coco': by_datumaro('coco_instances'),
  'panoptic': by_datumaro('coco_panoptic'),
  'cvat': by_datumaro('cvat'),
  'voc': by_datumaro('voc_segmentation'),
  'yolo': yolo,
  'roboflow': roboflow,
  'coloured': coloured,
  'parquet': parquet,
}
