"""Both OpenCVs that are allowed give the same pixels, 4.13's."""

import hashlib
import itertools

import cv2
import numpy as np
import pytest
from data.pictures import saved
from data.small_archives import decode
from numpy.testing import assert_equal
from PIL import Image

from resnest_jax.data.mini import city, scene

# Digests of what 4.13.0 makes of `image`; they are the same under 5.0.0.
RESIZED = {
  cv2.INTER_LINEAR: '8a2f0f43a52efacc',
  cv2.INTER_NEAREST: 'd7ab56b4a68a74f2',
  cv2.INTER_AREA: 'bc49e734bc6be3c0',
}


@pytest.fixture(scope='module')
def image():
  """Smooth and colourful, uint8 (301, 417, 3), by integer arithmetic alone."""
  noise = np.random.default_rng(0).integers(0, 256, (38, 53, 3), np.uint8)
  return cv2.resize(noise, (417, 301), interpolation=cv2.INTER_LINEAR)


def digest(*arrays):
  assert {array.dtype for array in arrays} == {np.dtype(np.uint8)}
  return hashlib.sha256(b''.join(map(bytes, arrays))).hexdigest()[:16]


def test_resizes_of_uint8(image):
  sizes = [(100, 80), (833, 602), (211, 977), (418, 300), (1, 1)]
  for way, expected in RESIZED.items():
    resized = [cv2.resize(image, size, interpolation=way) for size in sizes]
    assert digest(*resized) == expected, way


def test_hues(image):
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
  found = digest(image, hsv, cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
  assert found == '5de828ee2d82b16b'


def test_decoding(image):
  picture, decoded = Image.fromarray(image), []
  for sampling, progressive in itertools.product((0, 1, 2), (False, True)):
    options = {'subsampling': sampling, 'progressive': progressive}
    jpeg = saved('JPEG', picture, quality=85, **options)
    decoded.append(decode(jpeg, cv2.IMREAD_COLOR_RGB))
  assert digest(*decoded) == 'f53a113875693664'


@pytest.mark.parametrize(
  ('name', 'kind', 'seed', 'width'),
  [('lake', scene, 1, 128), ('bedroom', scene, 9, 128), ('city', city, 0, 192)],
)
def test_drawn_scenes(name, kind, seed, width, root):
  """NumPy's functions round as the processor does: a pixel may be off by 1."""
  image, mask, *_ = kind.draw_scene((seed,), 96, width)
  path = root / f'tests/data/scenes/{name}.png'  # BGR, and the mask as alpha.
  kept = decode(path.read_bytes())
  assert_equal(mask, kept[..., 3])
  off = np.abs(image.astype(int) - kept[..., 2::-1])
  assert off.max() <= 1
  assert (off > 0).mean() < 0.001
