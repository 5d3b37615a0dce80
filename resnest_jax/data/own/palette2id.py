r"""Turns coloured masks into index masks.

    python -m resnest_jax.data.prepare palette2id \
        --masks DIR --classes FILE --out DIR

Every picture below --masks, palette or RGB, becomes an 8-bit PNG of the same
name below --out. Each pixel gets the mask value of the class with exactly its
colour in the classes file. Colours that are no class are an error that lists
them, or become 255 (ignored) with --unknown ignore. --indices keeps the indices
of a palette PNG, or the values of a grey one, and disregards colours. --out
appears when all masks are written.
"""

import argparse
import collections
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from resnest_jax.data.own.classes import Classes, read_classes
from resnest_jax.data.own.pairing import walk
from resnest_jax.errors import UserError
from resnest_jax.files import check_new, explain_refusal, whole_folder
from resnest_jax.labels import IGNORE
from resnest_jax.progress import progress_bar
from resnest_jax.threads import map_in_threads

SUFFIXES = ('.png', '.bmp', '.gif', '.tif', '.tiff')
SHOWN = 10  # Colours that a message lists at most.

# Path of a mask -> the mask to write, uint8 (H, W), and the number of pixels
# with each value or packed colour that is no class.
Convert = Callable[[Path], tuple[np.ndarray, dict[int, int]]]


def main(arguments: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m resnest_jax.data.prepare palette2id',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--masks',
    type=Path,
    required=True,
    metavar='DIR',
    help='folder of the coloured masks, sub folders included',
  )
  parser.add_argument(
    '--classes',
    type=Path,
    required=True,
    metavar='FILE',
    help='classes file with a line "name red green blue" for each class',
  )
  parser.add_argument(
    '--out', type=Path, required=True, metavar='DIR', help='a new folder'
  )
  parser.add_argument(
    '--indices',
    action='store_true',
    help='keep palette indices or grey values and disregard colours',
  )
  parser.add_argument(
    '--unknown',
    choices=('error', 'ignore'),
    default='error',
    help='treatment of colours that are no class (default: error)',
  )
  args = parser.parse_args(arguments)
  classes = read_classes(args.classes)
  # A class may have the value 255; unknown pixels would then become that class.
  of_ignored = classes.labels.to_train_id[IGNORE]
  if args.unknown == 'ignore' and of_ignored != IGNORE:
    raise UserError(
      f'--unknown ignore writes {IGNORE}, but in {args.classes} this value is '
      f'{classes.labels.classes[of_ignored]}; give that class another value.'
    )
  if args.indices:
    convert = index_converter(classes)
  else:
    convert = colour_converter(classes, str(args.classes))
  convert_folder(
    args.masks,
    args.out,
    convert,
    ignore_unknown=args.unknown == 'ignore',
    in_words=str if args.indices else _colour_name,
    classes_file=str(args.classes),
  )


def colour_converter(classes: Classes, classes_file: str) -> Convert:
  """Finds each pixel's class by its colour."""
  # Colours that we choose do not occur in the user's masks.
  if classes.chosen:
    raise UserError(
      f'{classes_file} gives no colour for {", ".join(classes.chosen)}; add '
      'it after the name ("road 128 64 128"), or keep the values with '
      '--indices.'
    )
  # An entry for each of the 2**24 colours, -1 for no class: 32 MB, and one
  # lookup per pixel instead of one comparison per class.
  table = np.full(2**24, -1, np.int16)
  for values, colour in zip(
    classes.values, classes.labels.palette, strict=True
  ):
    table[_packed(colour[None, None])] = values[0]

  def convert(path: Path) -> tuple[np.ndarray, dict[int, int]]:
    packed = _packed(np.asarray(_open(path).convert('RGB')))
    return _split_unknown(table[packed], packed)

  return convert


def index_converter(classes: Classes) -> Convert:
  """Keeps the values of pictures with a single channel."""
  # Values that the classes file lists as ignored are known and kept.
  table = np.where(classes.known(), np.arange(256), -1).astype(np.int16)

  def convert(path: Path) -> tuple[np.ndarray, dict[int, int]]:
    picture = _open(path)
    if picture.mode == 'LA':  # Grey with transparency, which means nothing.
      picture = picture.getchannel(0)
    # Unlike OpenCV, Pillow keeps a palette PNG's indices and a bool for 1 bit.
    values = np.asarray(picture)
    if values.ndim != 2 or values.dtype.kind not in 'bui':
      raise UserError(
        f'{path} is a colour picture ({picture.mode}) without indices. '
        'Leave out --indices to convert its colours.'
      )
    values = values // _step(path)
    low, high = values.min(), values.max()
    if low < 0 or high > IGNORE:
      raise UserError(
        f'{path} has values from {low} to {high}; masks have 0 to {IGNORE}.'
      )
    return _split_unknown(table[values], values)

  return convert


def _step(path: Path) -> int:
  """The distance of neighbouring values after Pillow's decoding."""
  # Pillow spreads grey PNGs of 2 and 4 bits over 0 to 255. Bytes 24 and 25 of
  # the file are the bit depth and the colour type (0: grey).
  head = path.read_bytes()[:26]
  if head.startswith(b'\x89PNG') and head[25] == 0 and head[24] in (2, 4):
    return 255 // (2 ** head[24] - 1)
  return 1


def _open(path: Path) -> Image.Image:
  try:
    with Image.open(path) as picture:
      return picture.copy()  # `open` alone only reads the header.
  except (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
  ) as error:
    raise UserError(
      f'{path} cannot be decoded ({error}); nothing was written. Repair or '
      'remove it.'
    ) from error


def _packed(colours: np.ndarray) -> np.ndarray:
  # (..., 3) -> (...), 0xRRGGBB.
  red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
  return (red << 16) | (green << 8) | blue


def _colour_name(packed: int) -> str:
  return f'({packed >> 16}, {packed >> 8 & 255}, {packed & 255})'


def _split_unknown(
  ids: np.ndarray, original: np.ndarray
) -> tuple[np.ndarray, dict[int, int]]:
  """The mask with 255 for -1, and the pixels of each unknown original."""
  unknown = ids < 0
  values, counts = np.unique(original[unknown], return_counts=True)
  mask = np.where(unknown, IGNORE, ids).astype(np.uint8)
  return mask, dict(zip(values.tolist(), counts.tolist(), strict=True))


def convert_folder(
  masks: Path,
  out: Path,
  convert: Convert,
  *,
  ignore_unknown: bool,
  in_words: Callable[[int], str],
  classes_file: str,
) -> None:
  """Converts all pictures below a folder into a new or empty one.

  Args:
    masks: searched with its sub folders.
    out: appears whole or not at all.
    convert: converts one picture.
    ignore_unknown: whether unknown values become 255 or raise a `UserError`.
    in_words: formats a value or colour.
    classes_file: for messages.
  """
  # Mistakes that need no decoding come first.
  targets = _targets(masks, out)
  check_new(out)
  with (
    explain_refusal(out, 'give another --out'),
    whole_folder(out) as folder,
  ):
    pixels, first = _convert_all(targets, folder, convert, ignore_unknown)
    unknown = '\n'.join(
      f'  {in_words(value)}: {count} pixels, first in {first[value]}'
      for value, count in pixels.most_common(SHOWN)
    )
    if len(pixels) > SHOWN:
      unknown += f'\n  and {len(pixels) - SHOWN} more'
    # Raised inside the context, which then removes the folder. All pictures
    # were read, so one error lists all colours.
    if pixels and not ignore_unknown:
      raise UserError(
        f'nothing was written: {len(pixels)} values or colours are no class '
        f'of {classes_file}:\n{unknown}\nAdd them to that file, or make them '
        '255 (ignored) with --unknown ignore. Very many colours come from '
        'smoothed edges or from JPEG. If the masks already hold class '
        'numbers, add --indices.'
      )
  if pixels:
    print(f'became 255 (ignored):\n{unknown}')
  print(f'{len(targets)} masks in {out}')


def _convert_all(
  targets: Mapping[Path, Path],
  folder: Path,
  convert: Convert,
  ignore_unknown: bool,
) -> tuple[collections.Counter, dict[int, Path]]:
  """Writes the masks that are valid, or all if unknown values are ignored.

  Returns:
    Pixels of each unknown value or colour, and the first picture with it.
  """
  pixels, first = collections.Counter(), {}

  def work(item: tuple[Path, Path]) -> tuple[Path, dict[int, int]]:
    target, source = item
    mask, unknown = convert(source)
    if ignore_unknown or not unknown:
      (folder / target).parent.mkdir(parents=True, exist_ok=True)
      # `cv2.imwrite` reports a full disk only as False, without a reason.
      (folder / target).write_bytes(cv2.imencode('.png', mask)[1].tobytes())
    return source, unknown

  with progress_bar('converting masks') as report:
    # Results come in order, so `first` does not depend on the threads.
    converted = map_in_threads(work, targets.items())
    for done, (source, unknown) in enumerate(converted, 1):
      pixels.update(unknown)
      for value in unknown:
        first.setdefault(value, source)
      report(done, len(targets))
  return pixels, first


def _targets(masks: Path, out: Path) -> dict[Path, Path]:
  """File to write, relative to the result -> picture to read."""
  if not masks.is_dir():
    raise UserError(f'there is no folder {masks}; give another --masks.')
  # A second run would take the results for masks.
  if out.resolve().is_relative_to(masks.resolve()):
    raise UserError(f'--out {out} lies in --masks {masks}; give another.')
  targets: dict[Path, Path] = {}
  for path in walk(masks):
    # An error rather than a skip: the user would miss these masks later.
    if path.suffix.lower() in ('.jpg', '.jpeg'):
      raise UserError(
        f'{path} is a JPEG, which changes the colours of masks. Export the '
        'masks as PNG.'
      )
    if path.suffix.lower() not in SUFFIXES:
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
      f'there are no masks in {masks}; accepted are {", ".join(SUFFIXES)}.'
    )
  return targets
