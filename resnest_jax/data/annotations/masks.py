"""Sources that have masks: Pascal VOC, Roboflow, coloured masks, parquet."""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from resnest_jax.data.annotations import raster
from resnest_jax.data.annotations import sample as s
from resnest_jax.data.images import read_file
from resnest_jax.data.own import palette2id
from resnest_jax.data.own.classes import Classes, parse_classes, read_classes
from resnest_jax.data.own.splits import split_of
from resnest_jax.errors import UserError
from resnest_jax.labels import IGNORE
from resnest_jax.text import listed

_VOC = (
  'background aeroplane bicycle bird boat bottle bus car cat chair cow '
  'diningtable dog horse motorbike person pottedplant sheep sofa train '
  'tvmonitor'
).replace(' ', '\n')
_IMAGES = ('image', 'images', 'img', 'pixel_values', 'photo', 'picture')
_Shapes = Callable[[Callable[[], bytes], str], list[s.Shape]]


def _reader(classes: Classes, file: Path | None = None) -> _Shapes:
  """Reads masks of the classes' values, or of the colours in their `file`."""
  names, known = classes.labels.classes, classes.known()
  if file:
    colours = palette2id.colours_of(classes, file)
    labels = dict(zip(colours, names, strict=True))
    read, words = palette2id.read_colours, palette2id.colour_name
  else:
    found = {IGNORE: ''} | dict(enumerate(names))
    ids = classes.labels.to_train_id
    labels = {x: found[ids[x]] for x in np.flatnonzero(known).tolist()}
    read, words = partial(palette2id.read_indices, known=known), str

  def shapes(encoded: Callable[[], bytes], where: str) -> list[s.Shape]:
    return raster.numbered(read(encoded(), where), labels, where, words)

  return shapes


def _source(
  classes: Classes,
  read: _Shapes,
  masks: Iterable[tuple[str, Path, str]],
  find: s.Finder,
) -> s.Source:
  """Of masks with the names and splits of their pictures."""
  samples = [
    s.Sample(
      find.inside(mask),
      partial(find, picture, mask, split),
      partial(read, partial(read_file, mask), find.inside(mask)),
      split,
    )
    for picture, mask, split in masks
  ]
  return s.Source(classes.colours(), len(samples), samples, unlabelled='ignore')


def read_voc(
  paths: Sequence[Path], find: s.Finder, args: argparse.Namespace
) -> s.Source:
  """Reads masks in folders SegmentationClass, by colours or by indices."""
  file = args.classes or find.named('labelmap.txt')
  known = read_classes(file) if file else parse_classes(_VOC, 'VOC')
  read = _reader(known, None if known.chosen else file)
  masks = {
    find.inside(x.with_suffix('')).rpartition('SegmentationClass/')[2]: x
    for x in paths
  }
  # trainval.txt repeats the others.
  splits = {
    line: split
    for x in find.files
    if x.parent.name == 'Segmentation' and (split := split_of(x.name))
    for line in filter(None, s.read_lines(x))
  }
  lost = [('has no mask', x) for x in splits if x not in masks]
  masks = [
    (f'JPEGImages/{name}', mask, splits.get(name, ''))
    for name, mask in masks.items()
    if not splits or name in splits
  ]
  return _source(known, read, masks, find)._replace(faults=lost)


def read_roboflow(paths: Sequence[Path], find: s.Finder, _) -> s.Source:
  """Reads a.jpg and a_mask.png next to each _classes.csv."""
  classes = [read_classes(x) for x in paths]
  if len({(x.labels.classes, x.values) for x in classes}) > 1:
    raise UserError(
      f'the classes differ between {listed(paths)}. Export all splits of one '
      'version.'
    )
  end = '_mask.png'
  masks = [
    (find.inside(x).removesuffix(end), x, '')
    for x in find.files
    if x.name.endswith(end)
  ]
  return _source(classes[0], _reader(classes[0]), masks, find)


def read_coloured(
  paths: Sequence[Path], find: s.Finder, args: argparse.Namespace
) -> s.Source:
  """Reads the folder masks, whose colours are the classes."""
  file = args.classes or find.folder / 'classes.txt'
  known = read_classes(file)
  masks = [
    (find.inside(x.with_suffix('')).replace('masks', 'images', 1), x, '')
    for x in paths
  ]
  return _source(known, _reader(known, file), masks, find)


def read_parquet(
  paths: Sequence[Path], find: s.Finder, args: argparse.Namespace
) -> s.Source:
  """Reads rows of a Hugging Face data set: an image and its mask in each."""
  from pyarrow import parquet

  try:
    files = [(path, parquet.ParquetFile(path)) for path in paths]
  # pyarrow's own errors are these.
  except (OSError, ValueError) as error:
    raise UserError(
      f'one of {listed(paths)} is damaged or no parquet file ({error}). '
      'Download it again.'
    ) from error
  schema = files[0][1].schema_arrow
  found = [x.name for x in schema if 'binary' in str(x.type)]
  columns = args.columns or sorted(found, key=lambda x: x not in _IMAGES)
  if len(columns) != 2 or not {*columns} <= {*schema.names}:
    raise UserError(
      f'{paths[0]} has the columns {listed(schema.names, 20)}. Name those of '
      'images and masks with --columns IMAGE MASK.'
    )
  file = args.classes or find.named('id2label.json')
  known = read_classes(file) if file else _named_in(schema, paths[0])
  read = _reader(known)

  def samples() -> Iterator[s.Sample]:
    for path, table in files:
      # Few at a time: a row has a whole photograph.
      batches = table.iter_batches(4, columns=columns)
      rows = (row for batch in batches for row in batch.to_pylist())
      split = split_of(find.inside(path))
      for number, row in enumerate(rows):
        name = f'{path.stem}-{number}'
        image, mask = (partial(_cell, row[x]) for x in columns)
        yield s.Sample(name, image, partial(read, mask, name), split, name=name)

  total = sum(table.metadata.num_rows for _, table in files)
  return s.Source(known.colours(), total, samples(), unlabelled='ignore')


def _cell(cell: Any) -> bytes:
  encoded = cell.get('bytes') if isinstance(cell, dict) else cell
  if not isinstance(encoded, bytes):
    raise s.Fault('has a cell without a picture')
  return encoded


def _named_in(schema: Any, path: Path) -> Classes:
  """The classes that the only list of names in the features has."""
  about = (schema.metadata or {}).get(b'huggingface', b'')
  found = {*re.findall(rb'"names": *(\[[^]]+\])', about)}
  if len(found) != 1:
    raise UserError(
      f'{path} does not name the classes of its masks. Write them into a file, '
      'a name in each line (docs/own-data.md), and give --classes FILE; an '
      'id2label.json next to the files is found.'
    )
  return parse_classes(found.pop().decode(errors='replace'), str(path))
