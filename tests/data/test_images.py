"""Decoding whole and damaged pictures."""

import cv2
import numpy as np
import pytest
from data.small_archives import encode

from resnest_jax.data.images import PngHeader, decode_image, png_header

PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp'])
def test_what_is_cut_off_is_no_picture(suffix):
  encoded = encode(PICTURE, suffix)
  assert decode_image(encoded, cv2.IMREAD_COLOR).shape == PICTURE.shape
  for kept in (0, 1, len(encoded) // 2, len(encoded) - 20):
    assert decode_image(encoded[:kept], cv2.IMREAD_COLOR) is None, kept


def test_progressive_jpeg_that_lacks_its_last_bytes():
  flags = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
  encoded = cv2.imencode('.jpg', PICTURE, flags)[1].tobytes()
  assert decode_image(encoded, cv2.IMREAD_COLOR) is not None
  assert decode_image(encoded[:-1], cv2.IMREAD_COLOR) is None
  assert decode_image(b'no picture', cv2.IMREAD_COLOR) is None


def test_png_header():
  grey = encode(np.zeros((70, 300), np.uint16))
  assert png_header(grey) == PngHeader(300, 70, 16, 'grey')
  assert png_header(encode(PICTURE)) == PngHeader(64, 48, 8, 'RGB')
  assert png_header(encode(PICTURE)[:20]) is None
  assert png_header(encode(PICTURE, '.jpg')) is None
