"""What the headers of pictures say and decoders do not tell."""

import io

from PIL import Image, TiffImagePlugin

from resnest_jax.data.images import png_header

_PNG = {'grey': 1, 'RGB': 3, 'palette': 3, 'grey-alpha': 2, 'RGBA': 4}
_SAMPLES, _FORMAT, _PHOTOMETRIC = 277, 339, 262  # Tags of TIFF.
_FLOATS, _CMYK = 3, 5
# Broken headers; Pillow raises SyntaxError for those of some formats.
_BROKEN = OSError, SyntaxError, ValueError, Image.DecompressionBombError


def picture_format(encoded: bytes) -> str:
  """'PNG', 'JPEG', 'TIFF', ...; '' if it is none that Pillow knows."""
  try:
    with Image.open(io.BytesIO(encoded)) as picture:
      return picture.format or ''
  except _BROKEN:
    return ''


def channels(encoded: bytes) -> int:
  """Channels that are stored, 0 if the header does not say."""
  if encoded[:2] == b'\xff\xd8':  # JPEG
    return 3
  if header := png_header(encoded):
    return _PNG.get(header.colour, 0)
  if tags := _tiff_tags(encoded):
    # The four of CMYK are colours, and all of them are used.
    is_cmyk = tags.get(_PHOTOMETRIC) == _CMYK
    return 3 if is_cmyk else tags.get(_SAMPLES, 1)
  try:
    with Image.open(io.BytesIO(encoded)) as picture:
      return 3 if picture.mode in ('CMYK', 'P') else len(picture.getbands())
  except _BROKEN:
    return 0


def left_out(number: int) -> str:
  """Says which of so many channels are not used; '' if all are."""
  if number in (0, 1, 3):
    return ''
  used = 'the first is' if number == 2 else 'the first 3 are'
  return f'{number} channels, of which {used} used'


def why_undecodable(encoded: bytes) -> tuple[str, str]:
  """Why a whole file cannot be decoded, and the remedy; both '' if unknown."""
  if (number := channels(encoded)) > 4:
    return (
      f'it has {number} channels; images have 1, 3 or 4',
      'Write three of them into a new file, for example with GDAL: '
      'gdal_translate -b 1 -b 2 -b 3 OLD NEW',
    )
  if _tiff_tags(encoded).get(_FORMAT, (1,))[0] == _FLOATS:
    return (
      'it holds numbers with fractions; images have 8 bits per channel',
      to_8_bits('WHITE'),
    )
  return '', ''


def to_8_bits(white: object) -> str:
  """The code that converts an image whose white is this number."""
  return (
    'Write it with 8 bits into a new file: image = cv2.imread(old, '
    f'cv2.IMREAD_UNCHANGED); cv2.imwrite(new, np.uint8(np.clip(image / {white},'
    ' 0, 1) * 255)).'
  )


def _tiff_tags(encoded: bytes) -> dict:
  """The first directory of a TIFF; {} for other files."""
  if encoded[:4] not in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
    return {}
  # Not `Image.open`, which refuses kinds that it cannot decode.
  try:
    file = io.BytesIO(encoded)
    # BigTIFF has a longer header.
    size = 16 if b'+' in encoded[:4] else 8
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(size))
    if tags.next < len(encoded):  # Pillow would only warn.
      file.seek(tags.next)
      tags.load(file)
    return dict(tags)
  except Exception:  # Of damaged directories; it has no common type.
    return {}
