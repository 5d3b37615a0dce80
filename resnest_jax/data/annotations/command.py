r"""Turns what an annotation tool wrote into a data set.

    python -m resnest_jax.data.prepare own SOURCE --data_dir DIR

SOURCE is an export, unpacked, or one file of it: COCO (instances or panoptic),
labelme, CVAT for images 1.1, YOLO segmentation (data.yaml), Pascal VOC,
Roboflow's semantic masks, parquet files of Hugging Face, or coloured masks
(folders images and masks, and classes.txt with colours). DIR gets images (links
to them, or copies), index masks, classes.txt, and sheet.png, which shows
samples with their classes; configs/folder.py reads it. It appears when all is
written.

With --format mask_colours or mask_values SOURCE has masks alone, by the colours
of --classes or by its values (palette indices, grey of 1 to 16 bits). DIR gets
index masks of the same names, and --skip makes what is no class 255 (ignored).
"""

import argparse
import collections
import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from resnest_jax import drawing, files
from resnest_jax.data import images, pictures
from resnest_jax.data.annotations import masks, raster, tools
from resnest_jax.data.annotations import sample as s
from resnest_jax.data.own.classes import Classes, parse_classes, read_classes
from resnest_jax.data.own.splits import split_of
from resnest_jax.errors import UserError
from resnest_jax.flags import Parser
from resnest_jax.labels import IGNORE
from resnest_jax.progress import progress_bar
from resnest_jax.shipped import command
from resnest_jax.text import listed, plural
from resnest_jax.threads import map_in_threads
from resnest_jax.untrusted import brief

_PICTURES = 8  # On the sheet.
_SHOWN = 3  # Places of each fault that a message names.
_Fault = tuple[str, str]  # What it is, and where.
_BACKGROUND = 'background'
# Labels whose pixels are not counted, in lower case.
_IGNORED = ('ignore', '__ignore__', 'void')
_READERS = {
  'coco': tools.read_coco,
  'panoptic': tools.read_coco,
  'labelme': tools.read_labelme,
  'cvat': tools.read_cvat,
  'yolo': tools.read_yolo,
  'parquet': masks.read_parquet,
  **{x: partial(masks.read_folders, x) for x in masks.LAYOUTS},
}
_TEXTS = ('.json', '.xml', '.yaml', '.yml')
_DRAWN = ('coco', 'cvat', 'yolo')  # By pycocotools.
# What a file's path, a line break and its first bytes look like. The first that
# fits counts; '': COCO's files for other tasks.
_MARKS = (
  (rb'/(captions|person_keypoints|stuff)_[^/]*\.json\n', ''),
  (rb'/panoptic[^/]*\.json\n', 'panoptic'),
  (rb'\.json\n[^\0]*"shapes"\s*:', 'labelme'),
  (rb'\.json\n[^\0]*"(images|annotations|categories)"\s*:', 'coco'),
  (rb'\.xml\n[^\0]*<annotations>', 'cvat'),
  (rb'\.ya?ml\n([^\0]*\n)?names\s*:', 'yolo'),
  (rb'\.parquet\n', 'parquet'),
  (rb'/_classes\.csv\n', 'roboflow'),
  (rb'/SegmentationClass/.*\.(png|bmp|gif|tiff?)\n', 'voc'),
  (rb'/masks/.*\.(png|bmp|gif|tiff?)\n', 'coloured'),
)
# What is nearly a format, by the paths in a folder.
_HINTS = (
  (r'\.(zip|tar|gz|7z)\b', 'Unpack the archive first.'),
  (r'_mask\.png\b', "Roboflow's masks come with _classes.csv."),
  (r'\bdata\.ya?ml\b', 'data.yaml of YOLO has a list "names" of its classes.'),
  (
    r'\blabels/.*\.txt\b',
    "YOLO's labels come with data.yaml, which is missing there: write one with "
    '"names: [...]", the classes, and "train" and "val", folders of pictures.',
  ),
  (
    r'\nmasks/.*\.(jpe?g|webp)\b',
    'JPEG changes the values of masks: export them as PNG.',
  ),
)


def main(arguments: Sequence[str]) -> None:
  args = _parse(arguments)
  # What is larger is explained; alone, Pillow calls it an attack.
  Image.MAX_IMAGE_PIXELS = max(args.max_pixels, 1)
  data, again = args.data_dir, 'give another --data_dir'
  files.check_new(data, again)
  # What is written would be read by a second run.
  if data.resolve().is_relative_to(args.source.resolve()):
    raise UserError(f'--data_dir {data} lies in {args.source}; give another.')
  source, find = _open(args)
  values, unlabelled, classes = _plan(args, source)
  small = (args.overlaps or source.overlaps) == 'small'
  draw = partial(raster.paint, values=values, rest=unlabelled, small=small)
  with files.explain_refusal(data, again), files.whole_folder(data) as folder:
    written, faults, notes = _convert(
      source, find, draw, classes, folder, args.copy
    )
    # Raised inside the context, which then removes the folder.
    if not written or (faults and not args.skip):
      raise UserError(
        f'nothing was written: {_told(faults)}\nCorrect the annotations, the '
        f'classes or --format{"" if args.skip else ", or give --skip"}.'
      )
    splits = collections.Counter(written)
    if classes:
      _write_classes(folder / 'classes.txt', classes)
    if written[0] and len(splits) == 1:  # Training draws two of it.
      for kind in (folder / 'images', folder / 'masks'):
        (kind / written[0]).rename(folder / 'moved')
        kind.rmdir()
        (folder / 'moved').rename(kind)
  if faults:
    print(f'left out: {_told(faults)}')
  print(*notes, sep='\n', end='\n' * bool(notes))
  if not classes:
    print(f'{plural(len(written), "mask")} in {data}')
    return
  for split, number in splits.items():
    print(f'  {split or "no splits":<13}{plural(number, "image")}')
  print(f'  {"classes":<13}{listed(classes.labels.classes, 10)}')
  print(f'  {"look at":<13}{data / "sheet.png"}')
  config = '--config configs/folder.py '
  config += shlex.quote(f'--config.data.data_dir={data}')
  if {*splits} == {'train', 'test'}:
    config += ' --config.data.eval_split=test'
  print(
    f'Next:\n  python -m resnest_jax.data.doctor {config} --out doctor\n'
    f'  {command("train.py")} {config} --workdir runs/own\n'
    'For a trial on a laptop write configs/folder.py:mini.'
  )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  name = 'python -m resnest_jax.data.prepare own'
  parser = Parser(prog=name, description=__doc__)
  add = parser.add_argument
  add('source', type=Path, metavar='SOURCE', help='a folder or a file')
  about = 'folder of the pictures, if they do not lie in SOURCE'
  add('--pictures', type=Path, metavar='DIR', help=about)
  about = 'a new folder for the data set'
  add('--data_dir', type=Path, required=True, metavar='DIR', help=about)
  add('--format', choices=_READERS, help='if it is not recognised')
  about = 'a classes file: the classes to use, their order and colours'
  add('--classes', type=Path, metavar='FILE', help=about)
  about = 'pixels without annotation: background, another class, or ignore'
  add('--unlabelled', metavar='CLASS', help=about)
  about = 'which of overlapping shapes count (default: as the format has it)'
  add('--overlaps', choices=('later', 'small'), help=about)
  about = 'leave bad annotations out (default: they are an error)'
  add('--skip', action='store_true', help=about)
  about = 'only masks whose names end so, with or without extension: _mask'
  add('--suffix', default='', metavar='END', help=about)
  add('--copy', action='store_true', help='copy the pictures')
  about = 'of parquet files the columns of images and masks'
  add('--columns', nargs=2, metavar=('IMAGE', 'MASK'), help=about)
  add('--max_pixels', type=int, default=images.MAX_PIXELS, help='of a picture')
  return parser.parse_args(arguments)


def _open(args: argparse.Namespace) -> tuple[s.Source, s.Finder]:
  """Recognises the format and opens the reader of it."""
  given = args.source.resolve()
  if not given.exists():
    raise UserError(f'there is no {given}; give the export, unpacked.')
  folder = given if given.is_dir() else given.parent
  # Pictures lie next to it.
  if folder.name.lower() == 'annotations' and args.format not in masks.ALONE:
    folder = folder.parent
  if args.pictures and not args.pictures.is_dir():
    raise UserError(f'there is no folder {args.pictures}; correct --pictures.')
  if (folder / 'predictions.json').is_file() and not args.pictures:
    raise UserError(
      f'{folder} has predictions, whose label maps are no photographs. Give '
      'the folder of those as --pictures.'
    )
  if (file := folder / 'classes.json').is_file() and args.pictures:
    args.classes = args.classes or file  # In the order of the network.
  kinds = collections.defaultdict(list)
  find = s.Finder(folder, args.pictures and args.pictures.resolve())
  for path in find.files if given.is_dir() else [given]:
    kinds[_kind_of(path, find)].append(path)
  empty = [x for x in kinds[''] if x.suffix.lower() in _TEXTS and x.is_file()]
  empty = [x for x in empty if not x.stat().st_size and not args.skip]
  if empty:
    raise UserError(
      f'there is nothing in {listed(empty, _SHOWN)}. Export it again, or '
      'remove it.'
    )
  kinds.pop('', None)
  if len(kinds) > 1:  # Masks may be a part of any.
    kinds.pop('coloured', None)
  names = [args.format] if args.format else [*kinds]
  inside = '\n'.join(['', *map(find.inside, find.files), given.name])
  hints = (x for mark, x in _HINTS if re.search(mark, inside) and not kinds)
  hint = next(hints, '')
  if len(names) != 1:
    raise UserError(
      f'{given} may be {" or ".join(names) or "anything"}'
      f'{f". {hint} Or" if hint else ";"} say what it is with --format, one '
      f'of {", ".join(_READERS)}. Give the unpacked folder of annotations and '
      'pictures.'
    )
  # A format that was named may lie in files of any name.
  paths = kinds[names[0]] or [given]
  if not paths[0].is_file() and names[0] not in masks.LAYOUTS:
    hint = hint or 'Leave --format out, or give the folder of the export.'
    raise UserError(f'{given} has no files of the format {names[0]}. {hint}')
  if names[0] in _DRAWN and not importlib.util.find_spec('pycocotools'):
    raise UserError(
      'polygons need the package pycocotools: pip install pycocotools'
    )
  source = _READERS[names[0]](paths, find, args)
  print(f'{given} is read as {names[0]}: {plural(source.total, "picture")}')
  return source, find


def _kind_of(path: Path, find: s.Finder) -> str:
  text = b'/%s\n' % os.fsencode(find.inside(path))
  if path.suffix.lower() in _TEXTS:
    text += s.start_of(path, 2**14)  # Later keys of a large file are not there.
  return next((kind for mark, kind in _MARKS if re.search(mark, text)), '')


def _plan(
  args: argparse.Namespace, source: s.Source
) -> tuple[Mapping[str, int], int, Classes | None]:
  """What labels and other pixels become; the classes, but of masks alone."""
  if source.values is not None:
    return source.values, IGNORE, None
  ignored = {x for x in source.classes if x.lower() in _IGNORED}
  named = {x: c for x, c in source.classes.items() if x not in ignored}
  if args.classes:
    named = read_classes(args.classes).colours()
  likely = (x for x in named if x.lower().strip('_') == _BACKGROUND)
  rest = args.unlabelled or source.unlabelled or next(likely, None)
  if rest is None:
    raise UserError(
      f'{args.source} leaves pixels without annotation. Say what they are: '
      'with --unlabelled background a class, if all objects are annotated; '
      'with --unlabelled ignore they count neither in training nor in scores.'
    )
  if rest == _BACKGROUND and rest not in named:
    named = {rest: (60, 60, 60)} | named  # Black is for ignored pixels.
  if len(named) == 1:
    remedy = 'With --unlabelled background the rest is one.'
    remedy = 'Annotate another.' if _BACKGROUND in named else remedy
    raise UserError(
      f'{args.source} has the classes {listed(named)}; there must be two. '
      f'{remedy}'
    )
  if rest not in ('ignore', *named):
    raise UserError(
      f'--unlabelled {rest} is none of the classes {listed(named, 20)}; give '
      'one of them, background or ignore.'
    )
  # Of classes with one colour the first keeps it.
  first = {colour: name for name, colour in reversed(named.items())}
  palette = [c if first[c] == x else None for x, c in named.items()]
  about = {'classes': [*named], 'palette': palette}
  classes = parse_classes(json.dumps(about), str(args.source))
  values = dict.fromkeys(ignored, IGNORE)
  values |= {name: i for i, name in enumerate(named)}
  return values, values.get(rest, IGNORE), classes


def _convert(
  source: s.Source,
  find: s.Finder,
  draw: Callable[..., tuple[np.ndarray, list[_Fault]]],
  classes: Classes | None,
  folder: Path,
  copy: bool,
) -> tuple[list[str], list[_Fault], list[str]]:
  """Writes images, masks and the sheet; returns each sample's split, and notes.

  Without classes it writes masks alone.
  """
  shown, panels = drawing.spread(source.total, _PICTURES), {}
  used, empty = [], []

  def work(item: tuple[int, s.Sample]) -> tuple[list[str], list[_Fault]]:
    number, sample = item
    where = sample.where
    try:
      picture, name = sample.picture(), sample.name
      if not (held := isinstance(picture, bytes)):
        used.append(picture)
        if (inside := find.inside(picture)) not in where:
          where += f': {inside}'
      size, ending = _look(picture, upright=classes is not None)
      if sample.size not in (None, size):
        claim = brief([*sample.size])
        where += f' (height and width {[*size]} instead of {claim})'
        raise s.Fault('has a picture of another size than it says')
      if not (shapes := sample.shapes()):
        empty.append(sample.where)
      mask, found = draw(shapes, size)
      if not held:
        name, ending = os.path.splitext(find.inside(picture))
      if not classes:
        _write_mask(mask, folder / f'{name}.png')
        return [''], found
      split = sample.split or split_of(os.path.dirname(name))
      if number in shown:
        # Of damage the doctor tells.
        with contextlib.suppress(UserError, OSError):
          panels[number] = _panel(picture, mask, classes, name)
      name = f'{split}/{s.name_of(name)}'.strip('/')
      _write_mask(mask, folder / f'masks/{name}.png')
      _place(picture, folder / f'images/{name}{ending.lower()}', copy)
      return [split], found
    except UserError as error:
      return [], [(str(error), where)]

  written, faults = [], []
  with progress_bar('drawing masks') as report:
    results = map_in_threads(work, enumerate(source.samples))
    for done, (splits, found) in enumerate(results, 1):
      written += splits
      faults += found
      report(done, source.total)
  if panels:
    sheet = drawing.contact_sheet([panels[x] for x in sorted(panels)], 2)
    drawing.write_image(folder / 'sheet.png', sheet)
  notes = [
    f'{plural(len(of), "picture")} {what}: {listed(of, _SHOWN)}'
    for of, what in (
      (empty, 'without a shape'),
      (find.others(used) if classes else [], 'without annotation, left out'),
    )
    if of
  ]
  if written and len(empty) == len(written):
    faults.append(('no picture has a shape', plural(len(empty), 'picture')))
  return written, [*faults, *source.faults], notes


def _panel(
  picture: Path | bytes, mask: np.ndarray, classes: Classes, name: str
) -> np.ndarray:
  held = isinstance(picture, bytes)
  image = Image.open(io.BytesIO(picture)) if held else picture
  image = pictures.as_rgb(image, Image.MAX_IMAGE_PIXELS)
  of = classes.labels.classes, classes.labels.palette, name
  return drawing.mask_panel(image, mask, *of)


def _look(picture: Path | bytes, upright: bool) -> tuple[tuple[int, int], str]:
  """Height and width of the picture, and an ending for its name."""
  held = isinstance(picture, bytes)
  file = io.BytesIO(picture) if held else picture
  found = images.by_pillow(file, lambda x: (*x.size[::-1], x.format.lower()))
  if not found:  # Of more pixels, bands or bits than Pillow takes.
    most = 8 * Image.MAX_IMAGE_PIXELS
    encoded = picture if held else images.read_file(picture, most)
    kinds = {b'II': 'tif', b'MM': 'tif', b'\x93N': 'npy'}
    ending = kinds.get(encoded[:2], '')
    found = *(images.picture_size(encoded) or (0, 0)), ending
  height, width, ending = found
  images.check_pixels(height, width, Image.MAX_IMAGE_PIXELS, 'a picture')
  if not height or not ending:
    raise s.Fault('has a picture that cannot be read')
  turned = upright and images.is_turned(file)
  size = (width, height) if turned else (height, width)
  # Readers look at the content; the ending has to be one that they find.
  return size, f'.{ending}' if f'.{ending}' in s.KINDS else '.jpg'


def _write_mask(mask: np.ndarray, path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  # Of two pictures of one name, the second would be written over the first or,
  # through a link, over the user's own.
  try:
    with path.open('xb') as file:
      file.write(drawing.encoded('.png', mask))
  except FileExistsError as error:
    raise s.Fault('has a picture of the same name as another') from error


def _place(picture: Path | bytes, path: Path, copy: bool) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(picture, bytes):
    path.write_bytes(picture)
    return
  with contextlib.suppress(OSError):  # Not on every system, for every user.
    if not copy:
      path.symlink_to(picture)
  if not path.is_symlink():
    shutil.copyfile(picture, path)


def _told(faults: Sequence[_Fault]) -> str:
  total, places = plural(len(faults), 'bad annotation'), {}
  for what, where in faults:
    places.setdefault(what, []).append(where)
  most = sorted(places.items(), key=lambda x: -len(x[1]))
  kinds = [f'  {len(x)}: {what} ({listed(x, _SHOWN)})' for what, x in most]
  more = [f'  and {len(kinds) - 20} more'] if len(kinds) > 20 else []
  return '\n'.join([total, *kinds[:20], *more])


def _write_classes(path: Path, classes: Classes) -> None:
  # A table: quoted, any name is a name.
  named = classes.colours().items()
  rows = [(' '.join(name.split()), *colour) for name, colour in named]
  with path.open('w', encoding='utf-8', newline='') as file:
    table = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator='\n')
    table.writerows([('name', 'r', 'g', 'b'), *rows])
