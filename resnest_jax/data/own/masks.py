"""Index masks of a user's own data: what one is, and how others become one.

Training, the doctor and `prepare own` ask the same functions, so that none of
them accepts what another refuses.
"""

import dataclasses
import io
import shlex
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from resnest_jax.data import images
from resnest_jax.data.headers import picture_format
from resnest_jax.data.images import by_pillow, png_header
from resnest_jax.data.own.classes import Classes
from resnest_jax.errors import UserError
from resnest_jax.labels import IGNORE
from resnest_jax.text import listed, plural

INDEX_MASKS = '8-bit grey', '16-bit grey'
# Pixels whose colours are counted: sorting all takes longer than decoding them.
_MOST_COLOURS = 100_000
_EXACT = ('PNG', 'BMP', 'GIF', 'TIFF')  # Formats that keep numbers.

Colours = set[tuple[int, ...]]


class Stored(NamedTuple):
  """A mask as its file has it.

  Attributes:
    pixels: as OpenCV decodes them; of grey PNGs with fewer than 8 bits the
      class numbers.
    kind: of `INDEX_MASKS`, '1-bit palette', ..., or 'JPEG' for no PNG.
    indices: values that occur in a palette PNG, before they become colours.
  """

  pixels: np.ndarray
  kind: str
  indices: tuple[int, ...] = ()


def stored_mask(
  pixels: np.ndarray, encoded: bytes, known: np.ndarray
) -> Stored:
  """Describes a mask; `known`, bool (65536,), are the values it may have."""
  if (header := png_header(encoded)) is None:
    return Stored(pixels, picture_format(encoded) or 'unknown')
  kind, indices = f'{header.bits}-bit {header.colour}', ()
  if header.colour == 'palette':
    # OpenCV has decoded it, but Pillow has limits of its own.
    read = by_pillow(io.BytesIO(encoded), lambda x: np.unique(x).tolist(), ())
    indices = tuple(read)
  if header.colour == 'grey' and header.bits < 8:
    pixels = few_bits(pixels, header.bits, known)
  return Stored(pixels, kind, indices)


def few_bits(
  pixels: np.ndarray, bits: int, known: np.ndarray, mixed: bool = False
) -> np.ndarray:
  """The class numbers of a grey PNG with fewer than 8 bits.

  `pixels` are as decoders spread them, 0 and 255 for one bit; `known`, bool
  (256,), the values that masks may have. If masks of 8 bits lie next to it,
  `mixed`, a `UserError` is raised where both numbers may be meant.
  """
  numbers = pixels // (255 // (2**bits - 1))
  spread = known[pixels].all()
  # Programs that make PNG files smaller write 0 and 255 with one bit.
  if spread and not known[numbers].all():
    return pixels
  if mixed and spread and numbers.any():
    value = numbers[numbers > 0].min()
    raise UserError(
      f'has {bits} bits per pixel and others have 8: its value {value} may '
      f'mean {value} or {pixels[numbers == value].flat[0]}. In the former case '
      'convert files like it in a folder of their own. In the latter write it '
      'with 8 bits first: cv2.imwrite(path, cv2.imread(path, '
      'cv2.IMREAD_UNCHANGED))'
    )
  return numbers


def grey_bits(encoded: bytes) -> int:
  """Bits of a grey PNG, by its first bytes; else 0."""
  header = png_header(encoded)
  return header.bits if header and header.colour == 'grey' else 0


def read_colours(encoded: bytes) -> np.ndarray:
  """The colours of a mask to convert, (H, W); see `packed`."""
  return packed(np.asarray(_open(encoded).convert('RGB')))


def packed(colours: np.ndarray) -> np.ndarray:
  """Colours (..., 3) as numbers 0xRRGGBB."""
  return colours.astype(np.int32) @ np.array([2**16, 2**8, 1], np.int32)


def read_indices(
  encoded: bytes, known: np.ndarray, mixed: bool = False
) -> np.ndarray:
  """The values of a mask to convert, (H, W); see `few_bits`."""
  picture = _open(encoded)
  # Unlike OpenCV, Pillow keeps a palette PNG's indices and a bool for 1 bit.
  values = np.asarray(picture)
  if values.ndim == 3:
    # The numbers, repeated in each channel, of which Pillow cuts 16 bits to 8;
    # transparency means nothing.
    options = cv2.IMREAD_UNCHANGED, 'a mask', Image.MAX_IMAGE_PIXELS
    pixels = images.decode_image(encoded, *options)
    if pixels is not None and (pixels[..., :3] == pixels[..., :1]).all():
      values = pixels[..., 0]
  if values.ndim != 2:
    raise UserError(
      f'has colours ({picture.mode}) and no indices; masks of VOC need '
      '--classes FILE with these colours, others --format mask_colours'
    )
  whole = (np.rint(values) == values).all()
  if not whole or values.min() < 0 or values.max() >= len(known):
    raise UserError(
      f'has values that are no whole numbers from 0 to {len(known) - 1}. Write '
      'the class numbers as an 8-bit PNG: '
      "cv2.imwrite(new, mask.round().astype('uint8'))"
    )
  if 0 < (bits := grey_bits(encoded)) < 8:
    # Pillow spreads 2 and 4 bits over 0 to 255, as OpenCV does, and not 1.
    spread = values.astype(np.uint8) * (255 if bits == 1 else 1)
    values = few_bits(spread, bits, known, mixed)
  return values.astype(np.int32)


def _open(encoded: bytes) -> Image.Image:
  if size := images.picture_size(encoded):
    images.check_pixels(*size, Image.MAX_IMAGE_PIXELS, 'a mask')
  try:
    with Image.open(io.BytesIO(encoded)) as picture:
      if picture.format not in _EXACT:
        raise UserError(
          f'is a {picture.format}, whatever its name says, which changes the '
          'values of masks. Export the masks as PNG'
        )
      if (frames := getattr(picture, 'n_frames', 1)) > 1:
        raise UserError(
          f'has {frames} pictures, and a mask is one. Write each to a file of '
          'its own'
        )
      return picture.copy()  # `open` alone only reads the header.
  except images.BROKEN as error:
    raise UserError(
      f'cannot be decoded ({error}). Repair or remove it'
    ) from error


def colours_of(mask: np.ndarray) -> np.ndarray:
  """RGB colours, (K, 3), of a picture in OpenCV's order; (0, 3) for others."""
  if mask.ndim != 3 or mask.shape[2] < 3:
    return np.zeros((0, 3), np.int64)
  pixels = mask[..., 2::-1].reshape(-1, 3)  # From BGR or BGRA.
  pixels = pixels[:: max(len(pixels) // _MOST_COLOURS, 1)]
  return np.unique(pixels, axis=0).astype(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
  """How a folder of other masks becomes one of index masks."""

  masks: str  # The folder.
  classes_file: str
  classes: Classes
  suffix: str  # The end of the masks' names, if others lie among them; else ''.
  then: str  # What to set after it.

  def command(self, form: str) -> str:
    words = [self.masks, '--format', form, '--classes', self.classes_file]
    words += ['--data_dir', f'{self.masks}_ids']
    words += ['--suffix', self.suffix] if self.suffix else []
    return (
      'This converts all files there:\n  python -m resnest_jax.data.prepare '
      f'own {shlex.join(words)}\nThen {self.then}.'
    )

  def naming(self, value: int) -> str:
    """The line of the classes file that makes a value a class."""
    classes, line = self.classes, f'"{value}: name"'
    if not classes.plain:
      line += ' in the form of that file'
    # Lines that have no values take none among them that has one.
    if classes.values == tuple((k,) for k in range(len(classes.values))):
      first = f'{classes.values[0][0]}: {classes.labels.classes[0]}'
      line += f', with a value in all lines ("{first}", ...)'
    return line

  def of_mask(self, mask: Stored) -> str:
    """The remedy for a mask that is no index mask."""
    if mask.kind in ('JPEG', 'WEBP'):
      return (
        f'{mask.kind} changes the values of masks: write the originals as PNG.'
      )
    colours = colours_of(mask.pixels)
    if (colours == colours[:, :1]).all() and not mask.indices:
      return self.command('mask_values')
    return self.of_colours(set(map(tuple, colours.tolist())), mask.indices)

  def of_colours(self, colours: Colours, indices: Sequence[int] = ()) -> str:
    """The remedy for masks of colours; `indices` if all have a palette."""
    file, labels = self.classes_file, self.classes.labels
    named = zip(labels.classes, labels.palette.tolist(), strict=True)
    chosen = self.classes.chosen
    unknown = sorted(colours - {tuple(c) for x, c in named if x not in chosen})
    fit = bool(indices) and self.classes.known()[list(indices)].all()
    if len(unknown) == len(colours):
      if fit:
        numbers = self.command('mask_values')
        return f'The indices of their palette are values of {file}. {numbers}'
      return (
        f'No class of {file} has one of the colours {listed(unknown, 8)}. If '
        'each colour is a class, write it behind the name ("name '
        f'{" ".join(map(str, unknown[-1]))}") and examine the masks again. '
        'Colours that number objects (instances, panoptic masks) are no '
        'classes: export a mask of classes from your program.'
      )
    remedy = self.command('mask_colours')
    if chosen:
      remedy = f'Give {", ".join(chosen)} a colour in {file} first. {remedy}'
    if unknown:
      ignore = ''
      # With a class of 255 there is no number for them.
      if labels.to_train_id[IGNORE] == IGNORE:
        ignore = ', or add --skip, which makes them 255 (ignored)'
      remedy = (
        f'{plural(len(unknown), "colour", "are")} no class of {file}: '
        f'{listed(unknown, 8)}. Add them to it first{ignore}. {remedy}'
      )
    if fit:
      remedy += (
        '\nSay --format mask_values if the indices of its palette are the '
        'classes.'
      )
    return remedy
