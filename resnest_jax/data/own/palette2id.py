r"""Turns coloured masks into index masks.

    python -m resnest_jax.data.prepare palette2id \
        --masks DIR --classes FILE --out DIR

Every picture below --masks, palette or RGB, becomes an 8-bit PNG of the same
name below --out. Each pixel gets the mask value of the class with exactly its
colour in the classes file. Colours that are no class are an error that lists
them, or become 255 (ignored) with --unknown ignore. --indices keeps the indices
of a palette PNG, or the values of a grey one, and disregards colours. --suffix
leaves out files whose names end otherwise. --out appears when all masks are
written.
"""

import collections
import contextlib
import functools
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from resnest_jax.data import images
from resnest_jax.data.own.classes import Classes, read_classes
from resnest_jax.data.own.masks import few_bits
from resnest_jax.data.own.pairing import endings, walk
from resnest_jax.errors import UserError
from resnest_jax.files import check_new, explain_refusal, whole_folder
from resnest_jax.flags import Parser
from resnest_jax.labels import IGNORE
from resnest_jax.progress import progress_bar
from resnest_jax.threads import map_in_threads

SUFFIXES = ('.png', '.bmp', '.gif', '.tif', '.tiff')
_EXACT = ('PNG', 'BMP', 'GIF', 'TIFF')  # Formats that keep numbers.
SHOWN = 10  # Colours that a message lists at most.


class Convert(NamedTuple):
  table: np.ndarray  # Value to write by value or packed colour; -1: no class.
  # Those of a picture's bytes, (H, W); a name for messages.
  read: Callable[[bytes, Path], np.ndarray]
  name: Callable[[int], str]  # One of them in messages.


def main(arguments: Sequence[str]) -> None:
  parser = Parser(
    prog='python -m resnest_jax.data.prepare palette2id', description=__doc__
  )
  add = parser.add_argument
  path = {'type': Path, 'required': True}
  about = 'folder of the coloured masks, sub folders included'
  add('--masks', **path, metavar='DIR', help=about)
  about = 'classes file with a line "name red green blue" for each class'
  add('--classes', **path, metavar='FILE', help=about)
  add('--out', **path, metavar='DIR', help='a new folder')
  about = 'keep palette indices or grey values and disregard colours'
  add('--indices', action='store_true', help=about)
  about = 'only files whose names end so, with or without extension: _mask'
  add('--suffix', default='', metavar='END', help=about)
  about = 'treatment of colours that are no class (default: error)'
  add('--unknown', choices=('error', 'ignore'), default='error', help=about)
  add('--max_pixels', type=int, default=images.MAX_PIXELS, help='of a mask')
  args = parser.parse_args(arguments)
  # `_open` explains what is larger; alone, Pillow calls it an attack.
  Image.MAX_IMAGE_PIXELS = max(args.max_pixels, 1)
  classes = read_classes(args.classes)
  # A class may have the value 255; unknown pixels would then become that class.
  of_ignored = classes.labels.to_train_id[IGNORE]
  ignore = args.unknown == 'ignore'
  if ignore and of_ignored != IGNORE:
    raise UserError(
      f'--unknown ignore writes {IGNORE}, but in {args.classes} this value is '
      f'{classes.labels.classes[of_ignored]}; give that class another value.'
    )
  targets = _targets(args.masks, args.out, args.suffix)
  if args.indices:
    convert = _index_converter(classes, targets.values())
  else:
    convert = _colour_converter(classes, args.classes)
  check_new(args.out)
  with explain_refusal(args.out), whole_folder(args.out) as folder:
    pixels, unknown = _convert(targets, folder, convert, ignore)
    # Raised inside the context, which then removes the folder.
    if pixels and not ignore:
      remedy = ''
      if of_ignored == IGNORE:
        remedy = ', or make them 255 (ignored) with --unknown ignore'
      remedy += (
        '. Very many colours come from smoothed edges or from JPEG: use the '
        'originals.'
      )
      if not args.indices:
        remedy += ' If the masks already hold class numbers, add --indices.'
      raise UserError(
        f'nothing was written: {len(pixels)} values or colours are no class '
        f'of {args.classes}:\n{unknown}\nAdd them to that file{remedy}'
      )
  if pixels:
    print(f'became 255 (ignored):\n{unknown}')
  print(f'{len(targets)} masks in {args.out}')


def _colour_converter(classes: Classes, classes_file: Path) -> Convert:
  """Finds each pixel's class by its colour."""
  table = np.full(2**24, -1, np.int32)
  table[colours_of(classes, classes_file)] = [v[0] for v in classes.values]
  return Convert(table, read_colours, colour_name)


def colours_of(classes: Classes, classes_file: Path) -> list[int]:
  """Those of the classes, as `read_colours` has them."""
  # Colours that we choose do not occur in the user's masks.
  if classes.chosen:
    raise UserError(
      f'{classes_file} gives no colour for {", ".join(classes.chosen)}; add '
      'it after the name ("road 128 64 128"), or keep the values with '
      '--indices.'
    )
  return _packed(classes.labels.palette).tolist()


def colour_name(colour: int) -> str:
  return f'({colour >> 16}, {colour >> 8 & 255}, {colour & 255})'


def read_colours(encoded: bytes, where: str | Path) -> np.ndarray:
  """The colours of a mask, (H, W), 0xRRGGBB."""
  return _packed(np.asarray(_open(encoded, where).convert('RGB')))


def _index_converter(classes: Classes, paths: Iterable[Path]) -> Convert:
  """Keeps the values of pictures with a single channel."""
  mixed = len({_bits_of(path) < 8 for path in paths}) > 1
  # Values that the classes file lists as ignored are known and kept.
  known = classes.known()
  table = np.where(known, np.arange(len(known)), -1)
  read = functools.partial(read_indices, known=known, mixed=mixed)
  return Convert(table, read, str)


def _bits_of(path: Path) -> int:
  # Errors are those of whoever decodes the file.
  with contextlib.suppress(OSError), path.open('rb') as file:
    return _bits(file.read(26))
  return 8


def _bits(encoded: bytes) -> int:
  """Bits of a grey PNG with fewer than 8; 8 of all others."""
  header = images.png_header(encoded)
  return header.bits if header and header.colour == 'grey' else 8


def read_indices(
  encoded: bytes, path: str | Path, known: np.ndarray, mixed: bool = False
) -> np.ndarray:
  """The values of a mask, uint16 (H, W); see `masks.few_bits`."""
  picture = _open(encoded, path)
  # Unlike OpenCV, Pillow keeps a palette PNG's indices and a bool for 1 bit.
  values = np.asarray(picture)
  if values.ndim == 3:
    # The numbers, repeated in each channel, of which Pillow cuts 16 bits to 8;
    # transparency means nothing.
    most = Image.MAX_IMAGE_PIXELS
    pixels = images.decode_image(encoded, cv2.IMREAD_UNCHANGED, path, most)
    if pixels is not None and (pixels[..., :3] == pixels[..., :1]).all():
      values = pixels[..., 0]
  if values.ndim != 2:
    raise UserError(
      f'{path} is a colour picture ({picture.mode}) without indices. '
      'Leave out --indices to convert its colours.'
    )
  if values.dtype.kind == 'f' and (np.rint(values) != values).any():
    raise UserError(
      f'{path} holds numbers with fractions. Write the class numbers as an '
      "8-bit PNG: cv2.imwrite(new, mask.round().astype('uint8'))."
    )
  if (bits := _bits(encoded)) < 8:
    # Pillow spreads 2 and 4 bits over 0 to 255, as OpenCV does, and not 1.
    spread = values.astype(np.uint8) * (255 if bits == 1 else 1)
    try:
      values = few_bits(spread, bits, known, mixed)
    except ValueError as error:
      raise UserError(
        f'{path} {error}. In the former case convert files like it in a '
        'folder of their own. In the latter write it with 8 bits first: '
        'cv2.imwrite(path, cv2.imread(path, cv2.IMREAD_UNCHANGED)).'
      ) from error
  low, high = values.min(), values.max()
  if low < 0 or high >= len(known):
    raise UserError(
      f'{path} has values from {low} to {high}; masks have 0 to 65535.'
    )
  return values.astype(np.uint16)


def _open(encoded: bytes, path: str | Path) -> Image.Image:
  if size := images.picture_size(encoded):
    images.check_pixels(*size, Image.MAX_IMAGE_PIXELS, path)
  try:
    with Image.open(io.BytesIO(encoded)) as picture:
      if picture.format not in _EXACT:
        raise UserError(
          f'{path} is a {picture.format}, whatever its name says, which '
          'changes the values of masks. Export the masks as PNG.'
        )
      if (frames := getattr(picture, 'n_frames', 1)) > 1:
        raise UserError(
          f'{path} has {frames} pictures, and a mask is one. Write each to a '
          'file of its own.'
        )
      return picture.copy()  # `open` alone only reads the header.
  except images.BROKEN as error:
    raise UserError(
      f'{path} cannot be decoded ({error}); nothing was written. Repair or '
      'remove it.'
    ) from error


def _packed(colours: np.ndarray) -> np.ndarray:
  # (..., 3) -> (...), 0xRRGGBB.
  red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
  return (red << 16) | (green << 8) | blue


def _convert(
  targets: Mapping[Path, Path], folder: Path, convert: Convert, ignore: bool
) -> tuple[Mapping[int, int], str]:
  """Converts pictures, from `_targets`; unknown values become 255 if `ignore`.

  Returns the pixels of each unknown value, and lines about them.
  """
  pixels, first = collections.Counter(), {}  # Of each unknown value.
  largest = convert.table.max()  # One depth for all.

  def work(item: tuple[Path, Path]) -> tuple[Path, dict[int, int]]:
    target, source = folder / item[0], item[1]
    encoded = images.read_file(source, Image.MAX_IMAGE_PIXELS)
    original = convert.read(encoded, source)
    ids = convert.table[original]
    values, counts = np.unique(original[ids < 0], return_counts=True)
    if ignore or not values.size:
      target.parent.mkdir(parents=True, exist_ok=True)
      mask = np.where(ids < 0, IGNORE, ids)
      mask = mask.astype(np.uint8 if largest <= IGNORE else np.uint16)
      # `cv2.imwrite` reports a full disk only as False, without a reason.
      target.write_bytes(cv2.imencode('.png', mask)[1].tobytes())
    return source, dict(zip(values.tolist(), counts.tolist(), strict=True))

  with progress_bar('converting masks') as report:
    # Results come in order, so `first` does not depend on the threads.
    converted = map_in_threads(work, targets.items())
    for done, (source, unknown) in enumerate(converted, 1):
      pixels.update(unknown)
      for value in unknown:
        first.setdefault(value, source)
      report(done, len(targets))
  lines = [
    f'  {convert.name(value)}: {count} pixels, first in {first[value]}'
    for value, count in pixels.most_common(SHOWN)
  ]
  if len(pixels) > SHOWN:
    lines.append(f'  and {len(pixels) - SHOWN} more')
  return pixels, '\n'.join(lines)


def _targets(masks: Path, out: Path, suffix: str) -> dict[Path, Path]:
  """File to write, relative to the result -> picture to read."""
  if not masks.is_dir():
    raise UserError(f'there is no folder {masks}; give another --masks.')
  # A second run would take the results for masks.
  if out.resolve().is_relative_to(masks.resolve()):
    raise UserError(f'--out {out} lies in --masks {masks}; give another.')
  targets: dict[Path, Path] = {}
  others, end = [], suffix.lower()
  for path in walk(masks):
    name = path.name.lower()
    if not name.endswith(end) and not path.stem.lower().endswith(end):
      continue
    # An error rather than a skip: the user would miss these masks later.
    if path.suffix.lower() in ('.jpg', '.jpeg', '.jpe', '.jfif'):
      raise UserError(
        f'{path} is a JPEG, which changes the colours of masks. Export the '
        'masks as PNG.'
      )
    if path.suffix.lower() not in SUFFIXES:
      others.append(path)
      continue
    target = path.relative_to(masks).with_suffix('.png')
    if target in targets:
      raise UserError(
        f'{targets[target]} and {path} would both become {target}; remove one '
        'of them.'
      )
    targets[target] = path
  if not targets:
    raise UserError(
      f'there are no masks in {masks}; accepted are {", ".join(SUFFIXES)}'
      f'{f" whose names end in {suffix}" if suffix else ""}.'
    )
  if others:
    print(f'left out of {masks}: {endings(others)}')
  return targets
