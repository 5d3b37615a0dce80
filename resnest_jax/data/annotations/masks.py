"""Sources that have masks, in folders of several layouts or in parquet."""

import argparse
import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from pyarrow import parquet

from resnest_jax.data.annotations import raster
from resnest_jax.data.annotations import sample as s
from resnest_jax.data.images import read_file
from resnest_jax.data.own.classes import Classes, parse_classes, read_classes
from resnest_jax.data.own.masks import (
  grey_bits,
  packed,
  read_colours,
  read_indices,
)
from resnest_jax.data.own.pairing import CONVERTED, MASK_SUFFIXES, endings
from resnest_jax.data.own.splits import split_of
from resnest_jax.errors import UserError
from resnest_jax.labels import IGNORE
from resnest_jax.text import listed
from resnest_jax.untrusted import json_object

_VOC = (
  'background aeroplane bicycle bird boat bottle bus car cat chair cow '
  'diningtable dog horse motorbike person pottedplant sheep sofa train '
  'tvmonitor'
).replace(' ', '\n')
_IMAGES = ('image', 'images', 'img', 'pixel_values', 'photo', 'picture')
_ENDINGS = (*MASK_SUFFIXES, *CONVERTED)


class _Layout(NamedTuple):
  classes: str  # The name of the classes file.
  mask: str  # Matches the paths of masks.
  picture: str  # Their pictures, by its groups; '': masks alone.
  colours: bool  # Pixels have the colours of their classes, and not values.


LAYOUTS = {
  'voc': _Layout(
    'labelmap.txt',
    r'(?:.*/)?SegmentationClass/(.*)\.\w+',
    r'JPEGImages/\1',
    True,
  ),
  'roboflow': _Layout('_classes.csv', r'(.*)_mask\.png', r'\1', False),
  'coloured': _Layout(
    'classes.txt', r'(.*/)?masks/(.*)\.\w+', r'\1images/\2', True
  ),
  'mask_colours': _Layout('classes.txt', '.*', '', True),
  'mask_values': _Layout('classes.txt', '.*', '', False),
}
# Pascal VOC has the masks of objects next to those of classes.
_NO_PICTURES = r'(.*/)?(SegmentationClass|SegmentationObject|masks)/'
ALONE = tuple(x for x, layout in LAYOUTS.items() if not layout.picture)


def read_folders(
  form: str, _, find: s.Finder, args: argparse.Namespace
) -> s.Source:
  """Reads masks in one of `LAYOUTS`."""
  masks = _masks_of(form, find, args.suffix)
  bits = {grey_bits(s.start_of(mask, 26)) for mask, *_ in masks}
  classes, colours = _classes_of(form, find, args, min(bits) > 4)
  values = None
  if form in ALONE:  # For which the classes file stays.
    values = {str(x): x for x in np.flatnonzero(classes.known()).tolist()}
    # A class may have 255; pixels of no class would become that class.
    if args.skip and classes.labels.to_train_id[IGNORE] != IGNORE:
      raise UserError(
        f'--skip writes {IGNORE} for what is no class, but a class has this '
        'value; give that class another one.'
      )
  few = {x in (1, 2, 4) for x in bits}
  read = _reader(classes, colours, form in ALONE, len(few) > 1)
  find.leave_out(_NO_PICTURES)
  # trainval.txt repeats the others; CVAT's default.txt is of no split.
  lines = {
    line: split_of(x.name)
    for x in sorted(find.files, key=lambda x: bool(split_of(x.name)))
    if form == 'voc' and x.parent.name == 'Segmentation'
    for line in filter(None, s.read_lines(x))
  }
  splits = {line: split for line, split in lines.items() if split}
  samples = [
    s.Sample(
      find.inside(mask),
      partial(find, picture, mask, split) if picture else partial(Path, mask),
      partial(read, partial(read_file, mask), find.inside(mask)),
      split,
    )
    for mask, name, picture in masks
    if not splits or name in splits
    for split in [splits.get(name, '')]
  ]
  lost = sorted(lines.keys() - {name for _, name, _ in masks})
  faults = [('has no mask', x) for x in lost]
  about = classes.colours(), len(samples), samples
  return s.Source(*about, unlabelled='ignore', faults=faults, values=values)


def _classes_of(
  form: str, find: s.Finder, args: argparse.Namespace, all_grey: bool
) -> tuple[Classes, bool]:
  """The classes, and whether masks have their colours instead of values."""
  name, *_, colours = LAYOUTS[form]
  files = find.named(name)
  # Roboflow's table alone says what its values are.
  if args.classes and form != 'roboflow':
    files = [args.classes]
  if form == 'voc' and not files:
    print("no labelmap.txt: Pascal VOC's 21 classes; --classes gives others")
    return parse_classes(_VOC, 'VOC'), False
  known = [read_classes(x) for x in files]
  # Grey colours are stored as class numbers are.
  grey = [x for x in known if (np.ptp(x.labels.palette, 1) == 0).all()]
  if colours and form != 'voc' and all_grey and not grey:
    raise UserError(
      f'{find.folder} has masks of class numbers: there is nothing to convert. '
      'configs/folder.py reads them as they are, with a classes file '
      '(docs/own-data.md, "1. Two folders").'
    )
  known = known or [read_classes(find.folder / name)]
  if len({(x.labels.classes, x.values) for x in known}) > 1:
    raise UserError(
      f'the classes differ between {listed(files)}. Export all splits of one '
      'version.'
    )
  if form == 'voc':
    colours = not known[0].chosen
  if colours:
    _check_colours(known[0], files[0])
  return known[0], colours


def _check_colours(classes: Classes, file: Path) -> None:
  # Colours that we choose do not occur in the user's masks.
  if chosen := classes.chosen:
    raise UserError(
      f'{file} gives no colour for {", ".join(chosen)}; add it after the name '
      '("road 128 64 128"). If masks have values instead of colours, give '
      'their folder with --format mask_values.'
    )
  named = classes.colours()
  if same := [x for x, c in named.items() if [*named.values()].count(c) > 1]:
    raise UserError(
      f'{file} gives {", ".join(same)} the same colours, by which coloured '
      'masks are read. Give each class the colour that it has there.'
    )


def _masks_of(
  form: str, find: s.Finder, suffix: str
) -> list[tuple[Path, str, str]]:
  """Masks, the end of their names that counts, and paths of their pictures."""
  layout, end = LAYOUTS[form], suffix.lower()
  masks, others = [], []
  for path in find.files:
    match = re.fullmatch(layout.mask, find.inside(path), re.DOTALL)
    ends = path.name.lower().endswith(end) or path.stem.lower().endswith(end)
    if not match or not ends:
      continue
    if path.suffix.lower() in _ENDINGS:
      name = match[match.re.groups]
      masks.append((path, name, match.expand(layout.picture)))
    else:
      others.append(path)
  if not masks:
    raise UserError(
      f'there are no masks in {find.folder}; accepted are '
      f'{", ".join(_ENDINGS)}{f" whose names end in {suffix}" if end else ""}, '
      f'and it has {endings(others) or "no others"}. JPEG changes the values '
      'of masks: export them as PNG.'
    )
  if others:
    print(f'left out of {find.folder}: {endings(others)}')
  return masks


def _reader(
  classes: Classes, colours: bool, keep: bool = False, mixed: bool = False
) -> Callable[[Callable[[], bytes], str], list[s.Shape]]:
  """Reads masks of the classes' colours or values, which `keep` has as labels.

  For `mixed` see `own.masks.few_bits`.
  """
  labels, known = classes.labels, classes.known()
  if colours:
    numbers = packed(labels.palette).tolist()
    names = [str(x) for x, *_ in classes.values] if keep else labels.classes
    read, words = read_colours, lambda x: str(tuple(x.to_bytes(3)))
  else:
    numbers = np.flatnonzero(known).tolist()
    found = {IGNORE: ''} | dict(enumerate(labels.classes))
    names = [str(x) if keep else found[labels.to_train_id[x]] for x in numbers]
    read, words = partial(read_indices, known=known, mixed=mixed), str
  of = dict(zip(numbers, names, strict=True))
  return lambda encoded, where: raster.numbered(
    read(encoded()), of, where, words
  )


def read_parquet(
  paths: Sequence[Path], find: s.Finder, args: argparse.Namespace
) -> s.Source:
  """Reads rows of a Hugging Face data set: an image and its mask in each."""
  files = []
  for path in paths:
    with _readable(path):
      files.append((path, parquet.ParquetFile(path)))
  schema = files[0][1].schema_arrow
  found = [x.name for x in schema if 'binary' in str(x.type)]
  columns = args.columns or sorted(found, key=lambda x: x not in _IMAGES)
  if len(columns) != 2 or not {*columns} <= {*schema.names}:
    raise UserError(
      f'{paths[0]} has the columns {listed(schema.names, 20)}. Name those of '
      'images and masks with --columns IMAGE MASK.'
    )
  named = [args.classes] if args.classes else find.named('id2label.json')
  known = read_classes(named[0]) if named else _named_in(schema, paths[0])
  read = _reader(known, False)

  def samples() -> Iterator[s.Sample]:
    for path, table in files:
      # Few at a time: a row has a whole photograph.
      batches = table.iter_batches(4, columns=columns)
      rows = (row for batch in batches for row in batch.to_pylist())
      split = split_of(find.inside(path))
      with _readable(path):
        for number, row in enumerate(rows):
          name = f'{path.stem}-{number}'
          image, mask = (partial(_cell, row[x]) for x in columns)
          shapes = partial(read, mask, name)
          yield s.Sample(name, image, shapes, split, name=name)

  total = sum(table.metadata.num_rows for _, table in files)
  return s.Source(known.colours(), total, samples(), unlabelled='ignore')


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
  try:
    yield
  except (OSError, pyarrow.ArrowException) as error:
    raise UserError(
      f'{path} is damaged or no parquet file ({error}). Download it again.'
    ) from error


def _cell(cell: Any) -> bytes:
  encoded = cell.get('bytes') if isinstance(cell, dict) else cell
  if not isinstance(encoded, bytes):
    raise s.Fault('has a cell without a picture')
  return encoded


def _named_in(schema: Any, path: Path) -> Classes:
  """The classes that the only list of names in the features has."""
  about, columns = (schema.metadata or {}).get(b'huggingface', b'{}'), []
  with contextlib.suppress(AttributeError, LookupError, TypeError):
    features = json_object(about, str(path))['info']['features'].values()
    # A column of classes has those of whole pictures.
    columns = [x for x in features if 'names' not in x]
  found = {*re.findall(r'"names": (\[[^]]+\])', json.dumps(columns))}
  if len(found) != 1:
    raise UserError(
      f'{path} does not name the classes of its masks. Write them into a file, '
      'a name in each line (docs/own-data.md), and give --classes FILE; an '
      'id2label.json next to the files is found.'
    )
  return parse_classes(found.pop(), str(path))
