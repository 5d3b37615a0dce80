"""Images of any kind as uint8 RGB: files, Pillow images, arrays."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from resnest_jax.data import headers
from resnest_jax.data.images import BROKEN, MAX_PIXELS, decode_image, read_file
from resnest_jax.data.own.pairing import IMAGE_SUFFIXES
from resnest_jax.errors import UnreadableSample, UserError

_ARRAYS = 'uint8 (H, W, 3) with RGB values from 0 to 255, or (H, W) in grey'


def decode_file(
  path: str | Path, flags: int, max_pixels: int, remedy: str
) -> tuple[np.ndarray, bytes]:
  """What OpenCV makes of a picture's file, and its bytes.

  Raises `UnreadableSample`, which ends with the remedy.
  """
  encoded = read_file(path, max_pixels)
  pixels = decode_image(encoded, flags, path, max_pixels)
  if pixels is None and headers.has_fractions(encoded):
    raise UnreadableSample(f'{path} {headers.FRACTIONS}')
  if pixels is None:
    raise UnreadableSample(
      f'{path} cannot be decoded: its {len(encoded)} bytes are damaged, '
      f'truncated, or not of the format that its name says. {remedy}'
    )
  return pixels, encoded


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Reads an image file as uint8 (H, W, 3) RGB."""
  # Upright by its EXIF data, the upper 8 of 16 bits, no transparency.
  remedy = f'Accepted are {", ".join(IMAGE_SUFFIXES)} of 8 or 16 bits.'
  return decode_file(path, cv2.IMREAD_COLOR_RGB, max_pixels, remedy)[0]


def unused(encoded: bytes, max_pixels: int) -> list[str]:
  """Says which channels and bits `read_picture` leaves out."""
  said = [headers.left_out(headers.channels(encoded))]
  if headers.has_16_bits(encoded):
    said.append('16 bits, of which the upper 8 are used')
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    pixels = decode_image(encoded, flags, max_pixels=max_pixels)
    if pixels is not None and (white := pixels.max().item()) < 2**13:
      said[-1] += f'; these are nearly black.\n{headers.to_8_bits(white)}'
  return [*filter(None, said)]


def as_rgb(image: Any, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Converts a path, a Pillow image or an array to uint8 (H, W, 3) RGB.

  `max_pixels` holds for files; the others are in memory already.
  """
  if isinstance(image, str | Path):
    return read_picture(Path(image), max_pixels)
  if isinstance(image, Image.Image):
    return _from_pillow(image)
  # Also JAX arrays and tensors of PyTorch on the CPU.
  if hasattr(image, '__array__'):
    return _from_array(np.asarray(image))
  raise UserError(
    f'an image cannot be of type {type(image).__name__}; accepted are arrays, '
    f'{_ARRAYS}, paths, and images of Pillow.'
  )


def _from_pillow(image: Image.Image) -> np.ndarray:
  if image.width < 1 or image.height < 1:
    raise UserError(f'the image is empty: it has {image.width}x{image.height}.')
  try:
    # As `read_picture`. Pillow decodes here, not when it opens a file.
    image = ImageOps.exif_transpose(image)
    # 16 bits are I;16 or, in older versions, I; `convert` would clip at 255.
    if image.mode[0] not in 'FI':
      return np.array(image.convert('RGB'))
    grey = np.asarray(image)
    if image.mode != 'F' and 0 <= grey.min() <= grey.max() < 2**16:
      grey = (grey >> 8).astype(np.uint8)
    return _from_array(grey)
  except BROKEN as error:
    name = getattr(image, 'filename', '') or 'the image'
    raise UnreadableSample(
      f'{name} cannot be read by Pillow ({error}); it is damaged or cut off'
    ) from error


def _from_array(image: np.ndarray) -> np.ndarray:
  # Nothing is guessed: floats may be normalised, three rows be three channels.
  kind, last = image.dtype.name, image.shape[2:]
  remedies = {
    'convert floats from 0 to 1 by (image * 255).round().astype'
    "('uint8'); do not normalise them, that is done here": 'float' in kind,
    "convert 16 bits by (image >> 8).astype('uint8')": kind == 'uint16',
    'convert it to uint8': kind != 'uint8',
    'it is empty': 0 in image.shape,
    'for several images give a list, such as list(images)': image.ndim == 4,
    'drop the transparency: image[..., :3]': last == (4,),
    'the channels come last: image.transpose(1, 2, 0)': (
      image.ndim == 3 and last not in ((1,), (3,)) and len(image) == 3
    ),
    'give one of these': image.ndim < 2 or last not in ((), (1,), (3,)),
  }
  if remedy := next((x for x, applies in remedies.items() if applies), None):
    raise UserError(
      f'an array {image.dtype} {image.shape} is not an image; accepted: '
      f'{_ARRAYS}. {remedy}.'
    )
  if image.shape[2:] != (3,):
    image = np.repeat(image.reshape(*image.shape[:2], 1), 3, -1)
  return np.ascontiguousarray(image)
