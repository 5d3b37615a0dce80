"""What the headers of pictures say and decoders do not tell."""

import io

from resnest_jax.data.images import by_pillow, png_header, tiff_numbers

_PNG = {'grey': 1, 'RGB': 3, 'palette': 3, 'grey-alpha': 2, 'RGBA': 4}
# Tags of TIFF.
_BITS, _PHOTOMETRIC, _SAMPLES, _FORMAT = 258, 262, 277, 339
_CMYK, _FLOATS = 5, 3

BANDS = (
  'Or name all bands, to train on all their bits: '
  '--config.data.bands=red,green,blue,nir (docs/bands.md).'
)


def picture_format(encoded: bytes) -> str:
  """'PNG', 'JPEG', 'TIFF', ...; '' if it is none that Pillow knows."""
  return by_pillow(io.BytesIO(encoded), lambda x: x.format) or ''


def channels(encoded: bytes) -> int:
  """Channels that are stored, 0 if the header does not say."""
  if encoded[:2] == b'\xff\xd8':  # JPEG
    return 3
  if header := png_header(encoded):
    return _PNG.get(header.colour, 0)
  if encoded[:2] in (b'II', b'MM'):
    numbers = tiff_numbers(encoded)
    # The four of CMYK are colours, and all of them are used.
    if numbers.get(_PHOTOMETRIC, (0, 0))[0] == _CMYK:
      return 3
    return numbers.get(_SAMPLES, (1 if numbers else 0, 0))[0]
  return by_pillow(
    io.BytesIO(encoded),
    lambda x: 3 if x.mode in ('CMYK', 'P') else len(x.getbands()),
    0,
  )


def has_16_bits(encoded: bytes) -> bool:
  """Whether it is a PNG or a TIFF of 16 bits per channel."""
  if header := png_header(encoded):
    return header.bits == 16
  return tiff_numbers(encoded).get(_BITS, (8,))[0] == 16


def left_out(number: int) -> str:
  """Says which of so many channels are not used; '' if all are."""
  if number in (0, 1, 3):
    return ''
  used = 'the first is' if number == 2 else 'the first 3 are'
  return f'{number} channels, of which {used} used'


def to_8_bits(
  white: object, flags: str = 'cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH'
) -> str:
  """The code that converts images whose white is this number."""
  # IMREAD_UNCHANGED leaves pictures on their side, and reads only the first of
  # GDAL's bands; the other flags do not read fractions.
  # Cameras of 10, 12 or 14 bits store them in the lower ones of 16.
  if isinstance(white, int):
    white = max(2 ** white.bit_length() - 1, 255)
  return (
    'Write it with 8 bits into a new file: image = cv2.imread(old, '
    f'{flags}); cv2.imwrite(new, '
    f'np.uint8(np.clip(image / {white}, 0, 1) * 255)). Here {white} is the '
    'value of white; take the same for all images.'
  )


FRACTIONS = (
  'holds numbers with fractions; images have 8 bits per channel.\n'
  + to_8_bits('WHITE', 'cv2.IMREAD_UNCHANGED')
)


def has_fractions(encoded: bytes) -> bool:
  """Whether it is a TIFF of floats, of which OpenCV decodes some kinds."""
  return tiff_numbers(encoded).get(_FORMAT, (0,))[0] == _FLOATS
