"""Decodes images and index masks."""

import dataclasses
import os

import cv2
import numpy as np
from PIL import Image

from resnest_jax.errors import UserError

_COLOUR_TYPES = {0: 'grey', 2: 'RGB', 3: 'palette', 4: 'grey-alpha', 6: 'RGBA'}


@dataclasses.dataclass(frozen=True)
class PngHeader:
  width: int
  height: int
  bits: int  # per channel
  colour: str  # 'grey', 'RGB', 'palette', 'grey-alpha', 'RGBA' or 'strange'


def png_header(png: bytes) -> PngHeader | None:
  """Reads the IHDR chunk; None if this is not a PNG file."""
  # OpenCV converts palettes and depths: only the header tells what is stored.
  if png[:8] != b'\x89PNG\r\n\x1a\n' or len(png) < 26:
    return None
  width, height = (int.from_bytes(png[i : i + 4]) for i in (16, 20))
  colour = _COLOUR_TYPES.get(png[25], 'strange')
  return PngHeader(width, height, png[24], colour)


def decode_image(encoded: bytes, flags: int) -> np.ndarray | None:
  """Decodes as `cv2.imdecode`; returns None for truncated or unknown data."""
  if not encoded:  # OpenCV raises for an empty buffer.
    return None
  # Not cv2.imread, which fills the missing part of a truncated JPEG with grey.
  return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)


def is_turned(path: str | os.PathLike) -> bool:
  """Whether an image's EXIF orientation exchanges its height and width."""
  try:
    with Image.open(path) as picture:
      orientation = 0x0112  # The EXIF tag.
      return picture.getexif().get(orientation, 1) in (5, 6, 7, 8)
  # Pillow raises SyntaxError for broken PNG chunks.
  except (OSError, ValueError, SyntaxError):
    return False


def png_kind(png: bytes, where: str) -> tuple[int, str]:
  """Returns (bits per channel, colour type), such as (8, 'grey')."""
  header = png_header(png)
  if header is None:
    raise UserError(f'{where} is not a PNG file.')
  return header.bits, header.colour


def read_index_mask(
  png: bytes, where: str, allowed: np.ndarray, meaning: str
) -> np.ndarray:
  """Decodes an index mask: uint8 (H, W).

  `allowed`, bool (256,), are its values, `meaning` in words.
  """
  bits, colour = png_kind(png, where)
  # A palette mask would decode to colours instead of class numbers.
  if (bits, colour) != (8, 'grey'):
    raise UserError(
      f'{where} is a {bits}-bit {colour} picture; masks are 8-bit with a '
      f'single channel that holds the class number: {meaning}. Coloured masks '
      'are for viewing or belong to another release.'
    )
  mask = decode_image(png, cv2.IMREAD_UNCHANGED)
  if mask is None:
    raise UserError(f'{where} cannot be decoded.')
  wrong = ~allowed[mask]
  if wrong.any():
    raise UserError(
      f'{where} has the value {mask[wrong].max()}; the masks of this release '
      f'have {meaning}.'
    )
  return mask
