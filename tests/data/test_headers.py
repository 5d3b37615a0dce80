"""What headers say, and what is said of files that cannot be decoded."""

import re
import struct

import cv2
import numpy as np
import pytest
from data.small_archives import encode

from resnest_jax.data import headers
from resnest_jax.data.pictures import read_picture
from resnest_jax.errors import UnreadableSample


def tiff(bands, order='<', wide=False):
  """A TIFF of 2 x 2 pixels and any number of bands, which OpenCV may refuse."""
  size, number = (8, 'Q') if wide else (4, 'I')
  head = (b'II' if order == '<' else b'MM') + struct.pack(
    f'{order}H', 43 if wide else 42
  )
  if wide:
    head += struct.pack(f'{order}HH', 8, 0)
  pixels = bytes(4 * bands)
  start = len(head) + size
  tags = {256: 2, 257: 2, 258: 8, 259: 1, 262: 1, 273: start, 277: bands}
  tags |= {278: 2, 279: len(pixels)}
  body = struct.pack(f'{order}{"Q" if wide else "H"}', len(tags))
  for tag, value in tags.items():
    kind = 4 if tag in (273, 279) else 3
    packed = struct.pack(f'{order}{"I" if kind == 4 else "H"}', value)
    body += struct.pack(f'{order}HH{number}', tag, kind, 1)
    body += packed.ljust(size, b'\0')
  body += bytes(size)
  place = struct.pack(f'{order}{number}', start + len(pixels))
  return head + place + pixels + body


@pytest.mark.parametrize('bands', [1, 2, 3, 4, 5, 12, 224])
@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('wide', [False, True])
def test_bands_of_any_tiff(bands, order, wide):
  encoded = tiff(bands, order, wide)
  assert headers.channels(encoded) == bands
  # Any part of it says something or nothing, and is no error.
  for length in range(len(encoded)):
    assert headers.channels(encoded[:length]) in (0, 1, bands)


@pytest.mark.parametrize(
  ('encoded', 'channels'),
  [
    (encode(np.zeros((4, 4, 3))), 3),
    (encode(np.zeros((4, 4, 4))), 4),
    (encode(np.zeros((4, 4, 4), np.uint16)), 4),
    (encode(np.zeros((4, 4)), '.jpg'), 3),
    (encode(np.zeros((4, 4, 4)), '.webp'), 4),
    (b'', 0),
    (b'no picture', 0),
  ],
)
def test_channels(encoded, channels):
  assert headers.channels(encoded) == channels
  assert bool(headers.left_out(channels)) == (channels == 4)


def test_pictures_with_fractions_and_with_bands_say_so(tmp_path):
  path = tmp_path / 'bands.tif'
  path.write_bytes(tiff(12))
  with pytest.raises(UnreadableSample, match='has 12 bands'):
    read_picture(path)
  old, new = str(tmp_path / 'floats.tif'), str(tmp_path / 'new.png')
  cv2.imwrite(old, np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4))
  with pytest.raises(UnreadableSample, match='with fractions') as error:
    read_picture(tmp_path / 'floats.tif')
  code = re.search(r'file: (.*)\. Take', str(error.value))[1]
  exec(code, {'cv2': cv2, 'np': np, 'old': old, 'new': new, 'WHITE': 1})
  assert read_picture(tmp_path / 'new.png')[-1, -1].tolist() == [255] * 3
