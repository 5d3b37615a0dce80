"""Decodes images and index masks, of which no file decides how large they are.

Width and height are read from the header before anything is decoded.
"""

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.files import read_bounded

# Pixels of a picture; config.data.max_pixels and predict.py --max_pixels.
MAX_PIXELS = 10**8
_OPENCVS = 2**30  # Pixels that OpenCV decodes at most.
_MOST_BYTES = 8  # Of a pixel in a file: four channels of 16 bits.
# What Pillow raises for broken or hostile files.
BROKEN = (
  *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError),
  *(ArithmeticError, MemoryError, RuntimeError, struct.error, zlib.error),
  Image.DecompressionBombError,
)
# OpenCV would warn of damage, which our errors tell with the file's name, and
# of each tag of a GeoTIFF at each read.
if 'OPENCV_LOG_LEVEL' not in os.environ:
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_PNG = b'\x89PNG\r\n\x1a\n'
_COLOUR_TYPES = {0: 'grey', 2: 'RGB', 3: 'palette', 4: 'grey-alpha', 6: 'RGBA'}


class PngHeader(NamedTuple):
  width: int
  height: int
  bits: int  # per channel
  colour: str  # 'grey', 'RGB', 'palette', 'grey-alpha', 'RGBA' or 'strange'


def png_header(png: bytes) -> PngHeader | None:
  """Reads the IHDR chunk; None if this is not a PNG file."""
  # OpenCV converts palettes and depths: only the header tells what is stored.
  if png[:8] != _PNG or len(png) < 26:
    return None
  width, height = (int.from_bytes(png[i : i + 4]) for i in (16, 20))
  colour = _COLOUR_TYPES.get(png[25], 'strange')
  return PngHeader(width, height, png[24], colour)


def decode_image(
  encoded: bytes,
  flags: int,
  where: str | os.PathLike = 'the picture',
  max_pixels: int | None = None,
) -> np.ndarray | None:
  """Decodes as `cv2.imdecode`; returns None for truncated or unknown data.

  Raises `UnreadableSample`, which begins with `where`, for too many pixels or
  channels. `max_pixels` is for callers whose users can raise it.
  """
  # A few bytes may say that they are gigabytes: what does not tell its size in
  # a way that is known is not decoded.
  if (size := picture_size(encoded)) is None:
    return None
  check_pixels(*size, max_pixels, where)
  if encoded[:8] == _PNG and not _chunks_fit(encoded):
    return None
  # OpenCV turns none of these kinds, and mixes transparent pixels.
  if encoded[:3] == b'GIF' or encoded[4:11] == b'ftypavi':
    return by_pillow(
      io.BytesIO(encoded),
      lambda x: np.array(ImageOps.exif_transpose(x).convert('RGB')),
    )
  buffer = np.frombuffer(encoded, np.uint8)
  if encoded[:4] in _TIFF:
    buffer = _tiff_as_stored(encoded, buffer, where)
  # Not cv2.imread, which fills the missing part of a truncated JPEG with grey.
  try:
    return cv2.imdecode(buffer, flags)
  # Not for damaged data, but above OpenCV's own limits, or out of memory.
  except (cv2.error, MemoryError) as error:
    raise UnreadableSample(
      f'{where} cannot be decoded by OpenCV ({getattr(error, "err", error)}); '
      'it is larger than OpenCV or the memory allows, or damaged.'
    ) from error


def by_pillow(
  file: Any, look: Callable[[Image.Image], Any], otherwise: Any = None
) -> Any:
  """What `look` finds in a picture; `otherwise` if Pillow cannot read it."""
  try:
    with Image.open(file) as picture:
      return look(picture)
  except BROKEN:
    return otherwise


def check_pixels(
  height: int, width: int, max_pixels: int | None, where: str | os.PathLike
) -> None:
  """Raises `UnreadableSample`, which begins with `where`, above the limit."""
  limit = min(max_pixels or MAX_PIXELS, _OPENCVS)
  if height * width <= limit:
    return
  remedy = 'No more are decoded here; get the file again from its origin.'
  if max_pixels and height * width > _OPENCVS:
    remedy = 'Shrink it or cut it into tiles: OpenCV reads at most 2^30.'
  elif max_pixels:
    remedy = (
      'Shrink it or cut it into tiles, or raise config.data.max_pixels '
      '(--max_pixels of predict.py and `prepare own`). If it has fewer, it is '
      'damaged.'
    )
  name = ' (max_pixels)' if limit < _OPENCVS else ''
  raise UnreadableSample(
    f'{where} is {width} x {height} pixels, more than {limit}{name}.\n{remedy}'
  )


def read_file(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> bytes:
  """The bytes of a picture's file, or an `UnreadableSample`."""
  try:
    return read_bounded(path, _MOST_BYTES * max_pixels + 2**20)
  except OSError as error:
    raise UnreadableSample(
      f'{path} cannot be read ({error.strerror}).'
    ) from error
  except UserError as error:
    raise UnreadableSample(str(error)) from error


_TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
# Comments may stand before each number.
_PNM = re.compile(rb'P[1-6]' + 2 * rb'(?:\s|#[^\n]*\n)+(\d{1,9})' + rb'\s')
_NPY = re.compile(rb"\x93NUMPY[^}]{4,99}'shape': \((\d{1,9}), (\d{1,9})[,)]")
# Tags of TIFF, and what the last two say: of a band, of the first bands.
_WIDTH, _HEIGHT, _BANDS, _EXTRA, _PHOTOMETRIC = 256, 257, 277, 338, 262
_OPACITY = 2
_GREY, _RGB = (0, 1), 2


def picture_size(encoded: bytes) -> tuple[int, int] | None:
  """Height and width as the header has them; None if it is no picture."""
  if header := png_header(encoded):
    return header.height, header.width
  if encoded[:2] == b'\xff\xd8':
    return _jpeg_size(encoded)
  if encoded[:4] in _TIFF:
    numbers = tiff_numbers(encoded)
    height, width = (numbers.get(x, (None,))[0] for x in (_HEIGHT, _WIDTH))
    return None if None in (height, width) else (height, width)
  if encoded[:2] == b'BM' and len(encoded) > 26:
    # The header of OS/2 has 12 bytes. A negative height: from the top.
    kind = '<HH' if encoded[14] == 12 else '<ii'
    width, height = struct.unpack_from(kind, encoded, 18)
    return abs(height), abs(width)
  if encoded[:3] == b'GIF' and len(encoded) > 10:
    return struct.unpack_from('<HH', encoded, 6)[::-1]
  if found := _PNM.match(encoded):
    return int(found[2]), int(found[1])
  if found := _NPY.match(encoded):
    return int(found[1]), int(found[2])
  if encoded[:4] == b'RIFF' and encoded[8:12] == b'WEBP':
    return _webp_size(encoded)
  # JPEG 2000: that of the codestream, as a box around it may have another.
  if encoded[:8] == b'\0\0\0\x0cjP  ' or encoded[:2] == b'\xff\x4f':
    found = re.search(rb'\xff\x4f\xff\x51.{4}(.{16})', encoded, re.DOTALL)
    if not found:
      return None
    right, bottom, left, top = struct.unpack('>4I', found[1])
    return bottom - top, right - left
  try:
    with Image.open(io.BytesIO(encoded)) as picture:
      return picture.height, picture.width
  except Image.DecompressionBombError:
    return 2**31, 2**31  # Which Pillow does not tell.
  except BROKEN:
    return None


def _chunks_fit(png: bytes) -> bool:
  """Whether the file has the bytes that each chunk says, up to its last."""
  # OpenCV makes room for a chunk, up to 4 GB, before it reads it.
  place = len(_PNG)
  while place < len(png) and png[place + 4 : place + 8] != b'IEND':
    # Its length, its name, what it holds and a checksum.
    place += 12 + int.from_bytes(png[place : place + 4])
  return place < len(png)


def _jpeg_size(jpeg: bytes) -> tuple[int, int] | None:
  place = 2
  # As libjpeg, which passes over bytes that belong to no marker.
  while 0 <= (place := jpeg.find(b'\xff', place)) < len(jpeg) - 8:
    marker = jpeg[place + 1]
    # SOF0 to SOF15, without the tables and extensions among these numbers.
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
      return struct.unpack_from('>HH', jpeg, place + 5)
    # Fill bytes, stuffed bytes, and markers without a length.
    if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
      place += 1 if marker == 0xFF else 2
    else:
      place += 2 + int.from_bytes(jpeg[place + 2 : place + 4])
  return None


def _webp_size(webp: bytes) -> tuple[int, int] | None:
  def number(start: int, end: int) -> int:
    return int.from_bytes(webp[start:end], 'little')

  bits = number(21, 25)
  sizes = {
    b'VP8X': (number(27, 30) + 1, number(24, 27) + 1),
    b'VP8L': ((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1),
    b'VP8 ': (number(28, 30) & 0x3FFF, number(26, 28) & 0x3FFF),
  }
  return sizes.get(webp[12:16])


def _tiff_order(tiff: bytes) -> Literal['little', 'big']:
  return 'little' if tiff[:1] == b'I' else 'big'


def tiff_numbers(tiff: bytes) -> dict[int, tuple[int, int, int]]:
  """Tag -> (its first number, the places of that and of the tag).

  Those of the first directory; empty if it is no TIFF.
  """
  if tiff[:4] not in _TIFF:
    return {}
  order = _tiff_order(tiff)
  wide = 8 if b'+' in tiff[:4] else 4  # Bytes of an offset; BigTIFF has 8.

  def number(place: int, size: int) -> int:
    return int.from_bytes(tiff[place : place + size], order)

  start = number(wide, wide)
  entries = start + (8 if wide == 8 else 2)
  length = 4 + 2 * wide
  count = min(number(start, entries - start), len(tiff) // length)
  found: dict[int, tuple[int, int, int]] = {}
  for entry in range(entries, entries + count * length, length):
    # Whole numbers of 8, 16, 32 and 64 bits, without and with a sign.
    sizes = {1: 1, 6: 1, 3: 2, 8: 2, 4: 4, 9: 4, 16: 8, 17: 8}
    size = sizes.get(number(entry + 2, 2))
    if size is None:
      continue
    place = entry + 4 + wide
    if size * number(entry + 4, wide) > wide:
      place = number(place, wide)
    # libtiff takes the first of a tag as well.
    found.setdefault(number(entry, 2), (number(place, size), place, entry))
  return found


def _tiff_as_stored(
  tiff: bytes, buffer: np.ndarray, where: str | os.PathLike
) -> np.ndarray:
  """The file as OpenCV has to see it, so that it gives the stored colours."""
  numbers = tiff_numbers(tiff)
  if (bands := numbers.get(_BANDS, (1, 0))[0]) > 4:
    raise UnreadableSample(
      f'{where} has {bands} bands; pictures have 1, 3 or 4.\nWrite three of '
      'them into a new file (gdal_translate -b 1 -b 2 -b 3 OLD NEW), or name '
      'all bands to train on them (config.data.bands, docs/bands.md).'
    )
  # libtiff would multiply the colours by a band that is called opacity, and
  # GDAL calls the fourth band so whatever it holds, such as infrared.
  value, place, entry = numbers.get(_EXTRA, (0, 0, 0))
  if value == _OPACITY:
    buffer = buffer.copy()
    buffer[place : place + 2] = 0
  # GDAL calls bands of 16 bits grey and more of it, also where they are three:
  # the first alone would be decoded.
  value, place, _ = numbers.get(_PHOTOMETRIC, (_RGB, 0, 0))
  if bands > 2 and value in _GREY:
    buffer = buffer.copy()
    buffer[place : place + 2] = [*_RGB.to_bytes(2, _tiff_order(tiff))]
    if entry:  # Its bands would leave one for the three colours.
      buffer[entry : entry + 2] = 0xFF  # A tag that means nothing.
  return buffer


def is_turned(path: str | os.PathLike) -> bool:
  """Whether an image's EXIF orientation exchanges its height and width."""
  orientation = 0x0112  # The EXIF tag.
  return by_pillow(
    path, lambda x: x.getexif().get(orientation, 1) in (5, 6, 7, 8), False
  )


def png_kind(png: bytes, where: str) -> tuple[int, str]:
  """Returns (bits per channel, colour type), such as (8, 'grey')."""
  if header := png_header(png):
    return header.bits, header.colour
  raise UserError(f'{where} is not a PNG file.')


def read_index_mask(
  png: bytes, where: str, values: Collection[int], meaning: str
) -> np.ndarray:
  """Decodes an index mask: uint8 (H, W), of these values; `meaning` in words.

  Messages begin with `where`.
  """
  bits, colour = png_kind(png, where)
  # A palette mask would decode to colours instead of class numbers.
  if (bits, colour) != (8, 'grey'):
    raise UserError(
      f'{where} is a {bits}-bit {colour} picture; masks are 8-bit with a '
      f'single channel that holds the class number: {meaning}. Coloured masks '
      'are for viewing or belong to another release.'
    )
  mask = decode_image(png, cv2.IMREAD_UNCHANGED, where)
  if mask is None:
    raise UserError(f'{where} cannot be decoded.')
  if (wrong := ~np.isin(np.arange(256), list(values))[mask]).any():
    raise UserError(
      f'{where} has the value {mask[wrong].max()}; the masks of this release '
      f'have {meaning}.'
    )
  return mask
