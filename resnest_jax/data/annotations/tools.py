"""Polygons and run lengths of COCO, labelme, YOLO and CVAT."""

import collections
import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import yaml

from resnest_jax.config_keys import Accepted
from resnest_jax.data import pictures
from resnest_jax.data.annotations import raster
from resnest_jax.data.annotations import sample as s
from resnest_jax.data.images import MAX_PIXELS
from resnest_jax.data.own.classes import Colour
from resnest_jax.data.own.pairing import IMAGE_SUFFIXES, walk
from resnest_jax.data.own.splits import split_of
from resnest_jax.errors import UserError, ending
from resnest_jax.text import listed
from resnest_jax.untrusted import (
  brief,
  check_fields,
  json_object,
  list_of,
  numbers,
)

_OBJECTS = list_of('a list of objects', lambda x: type(x) is dict, 0, 2**31)
_NUMBER = Accepted('a whole number', lambda x: type(x) is int)
_COLOUR = numbers('a colour', 3, int, low=0, high=255)
_TEXT = Accepted('a text', lambda x: type(x) is str)
# Of COCO's files, and of what their lists have.
_COCO = {
  'images': {'id': _NUMBER, 'file_name': _TEXT},
  'categories': {'id': _NUMBER, 'name': _TEXT},
  'annotations': {'image_id': _NUMBER},
}
_WRONG = (AttributeError, LookupError, TypeError, ValueError)


def read_coco(paths: Sequence[Path], find: s.Finder, _) -> s.Source:
  """Reads instances, or panoptic pictures."""
  classes, samples, faults, panoptic = {}, [], [], False
  for path in paths:
    with ending('Export it again.'):
      content = json_object(s.read(path), str(path))
    check_fields(content, dict.fromkeys(_COCO, _OBJECTS), str(path))
    for key, fields in _COCO.items():
      for x in content[key]:
        check_fields(x, fields, f'{path}: one of the {key}')
    # Whatever a number is, its text can be a key.
    order = sorted(content['categories'], key=lambda x: x['id'])
    # Roboflow's first category is the name of all others together.
    above = [x.get('supercategory') for x in order[1:]]
    used = (x.get('category_id') for x in content['annotations'])
    if above and all(x == order[0]['name'] for x in above):
      del order[: order[0]['id'] not in used]
    names = {brief(x['id']): x['name'] for x in order}
    _check_apart(names, path)
    for x in order:
      classes[x['name']] = classes.get(x['name']) or _colour_of(x)
    split, own = split_of(find.inside(path)), collections.defaultdict(list)
    for x in content['annotations']:
      own[x['image_id']].append(x)
      panoptic |= 'segments_info' in x
    for image in content['images']:
      file, size = image['file_name'], (image.get('height'), image.get('width'))
      samples.append(
        s.Sample(
          f'{path.name}, {file}',
          partial(find, file, path, split),
          partial(_coco_shapes, own.pop(image['id'], []), names, path, find),
          split,
          None if None in size else size,
        )
      )
    what = 'belongs to no image of the file'
    rest = (x for of in own.values() for x in of)
    faults += [(what, _where(path, x)) for x in rest]
  rest = 'ignore' if panoptic else ''
  return s.Source(classes, len(samples), samples, 'small', rest, faults)


def _check_apart(names: Mapping[str, str], path: Path) -> None:
  count = collections.Counter(names.values())
  if twice := [name for name, number in count.items() if number > 1]:
    raise UserError(
      f'{path} has several classes of the name {listed(twice)}, whose objects '
      'nothing would tell apart. Rename them.'
    )


def _colour_of(category: Mapping[str, Any]) -> Colour | None:
  # Panoptic files have them.
  colour = category.get('color')
  return tuple(colour) if _COLOUR.holds(colour) else None


def _where(path: Path, annotation: Mapping[str, Any]) -> str:
  name = annotation.get('id', annotation.get('file_name'))
  return f'{path.name}, annotation {brief(name)}'


def _coco_shapes(
  own: Sequence[Mapping[str, Any]],
  names: Mapping[str, str],
  path: Path,
  find: s.Finder,
) -> list[s.Shape]:
  def label(about: Mapping[str, Any]) -> str:
    number = brief(about.get('category_id'))
    return names.get(number, f'category {number}')

  shapes = []
  for x in own:
    where = _where(path, x)
    if 'segments_info' not in x:
      draw = partial(raster.polygons, x.get('segmentation'))
      shapes.append(s.Shape(label(x), where, draw))
      continue
    check_fields(x, {'segments_info': _OBJECTS}, where)
    labels = {0: ''}
    for segment in x['segments_info']:
      check_fields(segment, {'id': _NUMBER}, where)
      labels[segment['id']] = label(segment)
    # Next to the file lies a folder of its name, with pictures that may be
    # called as the photographs are; their colours are the numbers.
    mask = f'{path.stem}/{x.get("file_name")}'
    try:
      file = find(mask, path)
    except s.Fault as error:
      raise s.Fault(f'has no mask {mask}') from error
    options = cv2.IMREAD_COLOR_RGB, MAX_PIXELS, 'Export it again.'
    colours, _ = pictures.decode_file(file, *options)
    numbers = colours.astype(np.int64) @ [1, 256, 256**2]
    unlisted = 'segment {} without segments_info'.format
    shapes += raster.numbered(numbers, labels, where, unlisted)
  return shapes


def read_labelme(paths: Sequence[Path], find: s.Finder, _) -> s.Source:
  """Reads a JSON file a picture, which has its name."""
  labels: set[str] = set()
  sizes = {}
  for path in paths:
    with contextlib.suppress(UserError):  # Told when its turn comes.
      shapes, sizes[path] = _labelme_of(path)
      labels |= {x.label for x in shapes}
  samples = [
    s.Sample(
      find.inside(x),
      partial(find, find.inside(x.with_suffix('')), x, split),
      lambda x=x: _labelme_of(x)[0],
      split,
      sizes.get(x),
    )
    for x in paths
    for split in [split_of(find.inside(x.parent))]
  ]
  return s.Source(dict.fromkeys(sorted(labels)), len(paths), samples)


def _labelme_of(path: Path) -> tuple[list[s.Shape], tuple | None]:
  about = json_object(s.read(path), str(path))
  shapes = about.get('shapes')
  if not _OBJECTS.holds(shapes) or not all(
    isinstance(x.get('label'), str) and x['label'].strip() for x in shapes
  ):
    raise s.Fault('has no list of shapes with labels')
  size = about.get('imageHeight'), about.get('imageWidth')
  return [
    s.Shape(x['label'], f'{path.name}, shape {i}', partial(raster.labelme, x))
    for i, x in enumerate(shapes)
  ], None if None in size else size


def read_yolo(paths: Sequence[Path], find: s.Finder, _) -> s.Source:
  """Reads the folders, or lists of pictures, that a data.yaml names."""
  if len(paths) > 1:
    raise UserError(f'there are several: {listed(paths)}. Give one of them.')
  try:
    about = yaml.safe_load(s.text_of(paths[0]))
    names = about['names']
    names = dict(enumerate(names)) if isinstance(names, list) else names
    # Not `str`: of nested lists it may be endless.
    names = {str(number): ''.join(name) for number, name in names.items()}
  # Those of PyYAML, and of what is no such list.
  except (yaml.YAMLError, RecursionError, *_WRONG) as error:
    raise UserError(
      f'{paths[0]} has no list "names" of the classes ({error}).'
    ) from error
  _check_apart(names, paths[0])
  samples = [
    s.Sample(str(picture), found, partial(_yolo_shapes, found, names), split)
    for split in ('train', 'val', 'test')
    for entry in np.ravel(np.array(about.get(split) or [], object))
    for picture in _yolo_pictures(str(entry), paths[0], split)
    for found in [partial(find, picture, picture, split)]
  ]
  # A picture without a file has no objects; those of a split are misplaced.
  bare: dict[str, Path | None] = {}  # None: one file is there, which is enough.
  for x in samples:
    if bare.get(x.split, x):
      with contextlib.suppress(UserError):  # Told when its turn comes.
        labels = _labels_of(x.picture())
        bare[x.split] = None if labels.exists() else labels
  what = 'no picture of a split has labels'
  faults = [(what, f'{k}, such as {x}') for k, x in bare.items() if x]
  classes = dict.fromkeys(names.values())
  return s.Source(classes, len(samples), samples, 'small', faults=faults)


def _yolo_pictures(entry: str, path: Path, split: str) -> list[Path]:
  # Roboflow's begin with a ".." too many, and "path" is of another computer.
  tail = [x for x in re.split(r'[/\\]', entry) if x not in ('', '..', '.')]
  tails = ['/'.join(tail[i:]) for i in range(len(tail))]
  if len({*map(split_of, tails[-2:])}) > 1:
    tails.pop()  # The "images" of a "test/images" that is missing.
  places = (path.parent / x for x in tails)
  if not (place := next((x for x in places if x.exists()), None)):
    if split == 'test':  # Named by many that have none.
      print(f'{path}: there is no {entry}, which is left out')
      return []
    raise UserError(f'{path}: there is no {entry} next to it; correct that.')
  if place.is_dir():
    found = [x for x in walk(place) if x.suffix.lower() in IMAGE_SUFFIXES]
    # Labels of no picture are samples whose picture is missing. Some tools
    # write classes.txt among them.
    labels = _labels_of(place / 'any').parent
    there = walk(labels) if labels.is_dir() else []
    texts = {x for x in there if re.search(r'(?<!/classes)\.txt$', str(x))}
    return found + sorted(texts - {*map(_labels_of, found)})
  return [place.parent / x for x in s.read_lines(place) if x]


def _yolo_shapes(
  picture: Callable[[], Path], names: Mapping[str, str]
) -> list[s.Shape]:
  labels = _labels_of(picture())
  # A picture without objects has no file.
  lines = s.read_lines(labels) if labels.exists() else []
  rows = [(i, *x.split()) for i, x in enumerate(lines, 1) if x]
  return [
    s.Shape(
      names.get(number, f'number {number}'),
      f'{labels.name}, line {i}',
      partial(_draw_row, row),
    )
    for i, number, *row in rows
  ]


def _labels_of(picture: Path) -> Path:
  # For the last folder "images", as Ultralytics does.
  parts = picture.as_posix().rsplit('/images/', 1)
  return Path('/labels/'.join(parts)).with_suffix('.txt')


def _draw_row(row: Sequence[str], height: int, width: int) -> np.ndarray:
  if len(row) == 4:
    raise s.Fault('is a box and no outline: export for segmentation')
  shares = raster.corners(row, 1, 1, hint=': fractions, 0 to 1, are expected')
  return raster.polygons([shares * [width, height]], height, width)


def read_cvat(paths: Sequence[Path], find: s.Finder, _) -> s.Source:
  """Reads files of CVAT for images 1.1."""
  classes: dict[str, Colour | None] = {}
  samples = []
  for path in paths:
    try:
      root = ElementTree.fromstring(s.read(path))
      for x in root.iter('label'):
        colour = tuple(bytes.fromhex(x.findtext('color', '')[1:]))
        classes.setdefault(x.findtext('name', ''), colour or None)
      samples += [_cvat_sample(x, path, find) for x in root.iter('image')]
    except (ElementTree.ParseError, TypeError, ValueError) as error:
      raise UserError(
        f'{path} cannot be read as XML of CVAT ({error}). Export it again.'
      ) from error
    if root.find('track') is not None:
      raise UserError(
        f'{path} is of CVAT for video, whose shapes are interpolated. Export '
        'the task as "CVAT for images 1.1".'
      )
  return s.Source(classes, len(samples), samples)


def _cvat_sample(
  image: ElementTree.Element, path: Path, find: s.Finder
) -> s.Sample:
  name = image.get('name', '')
  where = f'{path.name}, {name}'
  split = split_of(f'{find.inside(path)}/{image.get("subset", "")}')
  size = tuple(int(image.get(x)) for x in ('height', 'width'))
  shapes = [
    s.Shape(
      x.get('label', ''),
      f'{where}, {x.tag}',
      partial(_draw_cvat, x.tag, x.attrib),
    )
    for x in sorted(image, key=lambda x: int(x.get('z_order', 0)))
    if x.tag != 'tag'  # Of the whole picture.
  ]
  found = partial(find, name, path, split)
  return s.Sample(where, found, lambda: shapes, split, size)


def _draw_cvat(
  kind: str, about: Mapping[str, str], height: int, width: int
) -> np.ndarray:
  try:
    if kind == 'mask':
      # Run lengths along the rows of a box; those of COCO run down columns.
      keys = 'left', 'top', 'width', 'height'
      left, top, across, down = (int(about[x]) for x in keys)
      whole = np.zeros((height, width), bool)
      box = whole[top : top + down, left : left + across]
      counts = [int(x) for x in about['rle'].split(',')]
      box[:] = raster.runs(counts, *box.shape[::-1]).T
      return whole
    if kind == 'polygon':
      outline = [x.split(',') for x in about['points'].split(';')]
    elif kind == 'box':
      x, y, right, low = (about[x] for x in ('xtl', 'ytl', 'xbr', 'ybr'))
      outline = [(x, y), (right, y), (right, low), (x, low)]
    else:
      raise s.Fault(f'is of the kind {kind}, which is not drawn')
    # CVAT's own masks are of points in single precision.
    outline = np.array(outline, np.float32)
    if turn := math.radians(float(about.get('rotation', 0))):
      centre, (c, d) = outline.mean(0), (math.cos(turn), math.sin(turn))
      outline = (outline - centre) @ [[c, d], [-d, c]] + centre
  except (LookupError, ValueError) as error:
    raise s.Fault('has numbers that are missing or damaged') from error
  return raster.polygons([outline], height, width)
