"""Decoding pictures and index masks."""

import dataclasses
import os

import cv2
import numpy as np
from PIL import Image

from resnest_jax.errors import UserError

_COLOUR_TYPES = {
  0: 'grey',
  2: 'RGB',
  3: 'palette',
  4: 'grey-alpha',
  6: 'RGBA',
}


@dataclasses.dataclass(frozen=True)
class PngHeader:
  """What a PNG file says of itself."""

  width: int  # pixels
  height: int
  bits: int  # of a channel
  colour: str  # 'grey', 'RGB', 'palette', 'grey-alpha', 'RGBA' or 'strange'


def png_header(png: bytes) -> PngHeader | None:
  """Reads the first chunk of a PNG file, or None if it is none."""
  if png[:8] != b'\x89PNG\r\n\x1a\n' or len(png) < 26:
    return None
  width, height = (int.from_bytes(png[i : i + 4]) for i in (16, 20))
  return PngHeader(
    width, height, png[24], _COLOUR_TYPES.get(png[25], 'strange')
  )


def decode_image(encoded: bytes, flags: int) -> np.ndarray | None:
  """The pixels of an encoded picture, or None if it is not a whole one.

  Unlike reading a file by its path, in which OpenCV fills what is missing of a
  truncated JPEG with grey.

  Args:
    encoded: PNG, JPEG or another format that OpenCV knows.
    flags: of `cv2.imdecode`, `cv2.IMREAD_COLOR_RGB` for instance.
  """
  if not encoded:  # For which OpenCV raises.
    return None
  return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)


_ORIENTATION = 0x0112  # The EXIF tag; 5 to 8 exchange height and width.


def is_turned(path: str | os.PathLike) -> bool:
  """Whether a picture's EXIF orientation exchanges its height and width."""
  try:
    with Image.open(path) as picture:
      return picture.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
  except (OSError, ValueError, SyntaxError):  # Pillow cannot read its header.
    return False


def png_kind(png: bytes, where: str, needed: str) -> tuple[int, str]:
  """Bits of a channel and colour type ('grey', 'RGB', ...) of a PNG file.

  Args:
    png: the whole file.
    where: its name, to begin messages with.
    needed: the sentence that messages end with.

  Raises:
    UserError: it is not a PNG file.
  """
  header = png_header(png)
  if header is None:
    raise UserError(f'{where} is not a PNG file. {needed}')
  return header.bits, header.colour


def read_index_mask(
  png: bytes, where: str, allowed: np.ndarray, meaning: str, needed: str
) -> np.ndarray:
  """Decodes an index mask.

  Args:
    png: the encoded mask.
    where: its name, to begin messages with.
    allowed: bool (256,), which values there may be.
    meaning: these values in words.
    needed: the sentence that messages end with.

  Returns:
    uint8 (H, W).

  Raises:
    UserError: it is not an index mask or has other values.
  """
  bits, colour = png_kind(png, where, needed)
  if (bits, colour) != (8, 'grey'):
    raise UserError(
      f'{where} is a {bits}-bit {colour} picture; masks are 8-bit with a '
      f'single channel that holds the class number: {meaning}. Coloured masks '
      f'are for viewing or belong to another release. {needed}'
    )
  mask = decode_image(png, cv2.IMREAD_UNCHANGED)
  if mask is None:
    raise UserError(f'{where} cannot be decoded. {needed}')
  wrong = ~allowed[mask]
  if wrong.any():
    raise UserError(
      f'{where} has the value {mask[wrong].max()}; the masks of this release '
      f'have {meaning}. {needed}'
    )
  return mask
