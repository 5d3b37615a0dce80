r"""Turns coloured masks into index masks.

    python -m resnest_jax.data.prepare palette2id \
        --masks DIR --classes FILE --out DIR

Every picture below --masks, palette or RGB, becomes an 8-bit PNG of the same
name below --out, in which each pixel has the mask value of the class with
exactly its colour in the classes file. A colour that is no class is an error
that lists all of them, or becomes 255 (ignored) with --unknown ignore. With
--indices the colours do not matter: the indices of a palette PNG, or the values
of a grey one, are kept. --out appears when all of it is written.
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
SHOWN = 10  # How many colours a message lists.

# A mask to what stands in it and does not belong there (value or colour ->
# pixels), and the mask that is written.
Convert = Callable[[Path], tuple[np.ndarray, dict[int, int]]]


def main(arguments: Sequence[str]) -> None:
  """Reads the command line that follows `palette2id`, and converts."""
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
    help='keep palette indices or grey values instead of looking at colours',
  )
  parser.add_argument(
    '--unknown',
    choices=('error', 'ignore'),
    default='error',
    help='what to do with colours that are no class (default: error)',
  )
  args = parser.parse_args(arguments)
  classes = read_classes(args.classes)
  of_ignored = classes.labels.to_train_id[IGNORE]
  if args.unknown == 'ignore' and of_ignored != IGNORE:
    raise UserError(
      f'--unknown ignore writes {IGNORE}, but in {args.classes} that is '
      f'{classes.labels.classes[of_ignored]}; give it another value there.'
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
  if classes.chosen:
    raise UserError(
      f'{classes_file} gives no colour for {", ".join(classes.chosen)}; add '
      'them behind the name ("road 128 64 128"), or keep the values as they '
      'are with --indices.'
    )
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
  table = np.where(classes.known(), np.arange(256), -1).astype(np.int16)

  def convert(path: Path) -> tuple[np.ndarray, dict[int, int]]:
    picture = _open(path)
    if picture.mode == 'LA':
      picture = picture.getchannel(0)
    values = np.asarray(picture)
    if values.ndim != 2 or values.dtype.kind not in 'bui':
      raise UserError(
        f'{path} is a colour picture ({picture.mode}) and has no indices. '
        'Leave out --indices, so that its colours decide.'
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
  """Pillow spreads 2 and 4 bits of grey over 0 to 255; a class is so far."""
  head = path.read_bytes()[:26]
  if head.startswith(b'\x89PNG') and head[25] == 0 and head[24] in (2, 4):
    return 255 // (2 ** head[24] - 1)
  return 1


def _open(path: Path) -> Image.Image:
  """The decoded picture; a `UserError` if it is damaged."""
  try:
    with Image.open(path) as picture:
      return picture.copy()
  except (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
  ) as error:
    raise UserError(
      f'{path} cannot be decoded ({error}); nothing was written. Repair it or '
      'move it away.'
    ) from error


def _packed(colours: np.ndarray) -> np.ndarray:
  """(..., 3) colours as one number each."""
  red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
  return (red << 16) | (green << 8) | blue


def _colour_name(packed: int) -> str:
  return f'({packed >> 16}, {packed >> 8 & 255}, {packed & 255})'


def _split_unknown(
  ids: np.ndarray, original: np.ndarray
) -> tuple[np.ndarray, dict[int, int]]:
  """Ids with 255 where they are -1, and the pixels of each such original."""
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
    masks: the folder.
    out: appears whole or not at all.
    convert: one picture.
    ignore_unknown: whether what is no class becomes 255, or is an error.
    in_words: says a value or colour.
    classes_file: for messages.
  """
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
    if pixels and not ignore_unknown:
      raise UserError(
        f'nothing was written: {len(pixels)} values or colours are no class '
        f'of {classes_file}:\n{unknown}\nAdd them to that file, or make them '
        '255 (ignored) with --unknown ignore. Very many colours come from '
        'smoothed edges or from JPEG; if the masks hold class numbers '
        'already, add --indices.'
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
  """Writes masks without unknown values, and the others if these are ignored.

  Returns:
    Pixels of each unknown value or colour, and the first picture with it.
  """
  pixels, first = collections.Counter(), {}

  def work(item: tuple[Path, Path]) -> tuple[Path, dict[int, int]]:
    target, source = item
    mask, unknown = convert(source)
    if ignore_unknown or not unknown:
      (folder / target).parent.mkdir(parents=True, exist_ok=True)
      (folder / target).write_bytes(cv2.imencode('.png', mask)[1].tobytes())
    return source, unknown

  with progress_bar('converting masks') as report:
    converted = map_in_threads(work, targets.items())
    for done, (source, unknown) in enumerate(converted, 1):
      pixels.update(unknown)
      for value in unknown:
        first.setdefault(value, source)
      report(done, len(targets))
  return pixels, first


def _targets(masks: Path, out: Path) -> dict[Path, Path]:
  """Name to write, relative to the result -> picture."""
  if not masks.is_dir():
    raise UserError(f'there is no folder {masks}; give --masks another.')
  if out.resolve().is_relative_to(masks.resolve()):
    raise UserError(f'--out {out} lies in --masks {masks}; give another.')
  targets: dict[Path, Path] = {}
  for path in walk(masks):
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
        f'{targets[target]} and {path} would both become {target}; move one '
        'of them away.'
      )
    targets[target] = path
  if not targets:
    raise UserError(
      f'there are no masks in {masks}; accepted are {", ".join(SUFFIXES)}.'
    )
  return targets
