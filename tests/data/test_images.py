"""Decoding pictures: whole, damaged, and larger than a header may say."""

import contextlib
import io
import os
import threading

import cv2
import numpy as np
import pytest
from data.pictures import SMALL, claiming, png_bomb, saved, tiff
from data.small_archives import encode
from PIL import Image

from resnest_jax.data.images import (
  PngHeader,
  decode_image,
  picture_size,
  png_header,
  read_file,
)
from resnest_jax.data.pictures import as_rgb, read_picture
from resnest_jax.errors import UnreadableSample, UserError

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


# --- Sizes and bounds --------------------------------------------------------


@pytest.mark.parametrize(
  'size', [(60_000, 60_000), (20_000, 20_000), (2**20 - 1, 40_000)]
)
def test_small_files_that_claim_to_be_large_are_not_decoded(size):
  for kind, encoded in claiming(*size).items():
    assert len(encoded) < 2000
    if kind == 'HDR':  # Whose size Pillow does not read.
      assert decode_image(encoded, cv2.IMREAD_COLOR_RGB) is None
      continue
    height, width = picture_size(encoded)
    most = 65500 if kind in ('JPEG', 'GIF') else 2**31  # Of their 16 bits.
    assert (height, width) == tuple(min(x, most) for x in size), kind
    told = (
      f'a file is {width} x {height} pixels, more than {2**28} .*\nShrink it'
    )
    with pytest.raises(UnreadableSample, match=told):
      decode_image(encoded, cv2.IMREAD_COLOR_RGB, 'a file', 2**28)


def test_sizes_in_headers_are_those_that_are_decoded():
  """Of random pictures in every kind of file."""
  rng = np.random.default_rng(3)
  exif = Image.Exif()
  exif[0x010E] = 'x' * 30_000  # A description, before JPEG's size.
  for _ in range(3):
    height, width = rng.integers(1, 300, 2).tolist()
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    files = [saved(form, image) for form in ('PNG', 'BMP', 'GIF', 'PPM')]
    files += [saved('JPEG', image, progressive=x, exif=exif) for x in (0, 1)]
    files += [saved('JPEG2000', image, no_jp2=x) for x in (False, True)]
    files += [saved('WEBP', image, lossless=x) for x in (False, True)]
    files += [saved('WEBP', image, exif=exif), saved('AVIF', image)]
    files += [tiff(pixels, order=x, big=y) for x in '<>' for y in (0, 1)]
    for encoded in files:
      assert picture_size(encoded) == (height, width), encoded[:12]
      decoded = decode_image(encoded, cv2.IMREAD_COLOR_RGB)
      assert decoded.shape == pixels.shape
  # Bytes that belong to no marker, which libjpeg passes over.
  jpeg = saved('JPEG')
  padded = jpeg[:20] + b'\0\xff\xff\0junk' + jpeg[20:]
  assert picture_size(padded) == (6, 8)
  assert decode_image(padded, cv2.IMREAD_COLOR) is not None


def test_damaged_headers_say_what_is_decoded_or_nothing():
  """400 files with wrong bytes; an error of another type would be a bug."""
  rng = np.random.default_rng(7)
  exif = Image.Exif()
  exif[0x0112] = 6
  forms = [
    'PNG',
    'JPEG',
    'BMP',
    'GIF',
    'PPM',
    'WEBP',
    'AVIF',
    'TIFF',
    'JPEG2000',
  ]
  files = [saved(form) for form in forms] + [saved('WEBP', exif=exif)]
  files += [tiff(SMALL, order=x, big=y) for x in '<>' for y in (0, 1)]
  decoded = 0
  for number in range(400):
    encoded = bytearray(files[number % len(files)])
    for place in rng.integers(0, min(len(encoded), 200), rng.integers(1, 4)):
      encoded[place] = rng.choice([0, 1, 2, 127, 255])
    with contextlib.suppress(UnreadableSample):
      found = decode_image(bytes(encoded), cv2.IMREAD_COLOR_RGB, 'x', 10**6)
      if found is not None:
        decoded += 1
        size = picture_size(bytes(encoded))
        assert size in (found.shape[:2], found.shape[1::-1]), number
  assert decoded > 100


def test_the_limit_can_be_raised(tmp_path):
  """As the message says, up to OpenCV's own."""
  path = tmp_path / 'a.png'
  path.write_bytes(png_bomb(300, 400))
  with pytest.raises(
    UserError, match=r'a\.png is 400 x 300 .*\n.* raise config'
  ):
    read_picture(path, 300 * 400 - 1)
  assert read_picture(path, 300 * 400).shape == (300, 400, 3)
  huge = claiming(40_000, 30_000)['PNG']
  with pytest.raises(UnreadableSample, match='a file cannot be decoded by Op'):
    decode_image(huge, cv2.IMREAD_COLOR_RGB, 'a file', 2**40)


def test_what_never_ends_is_not_read(tmp_path):
  device, pipe, long = (tmp_path / x for x in ('a.jpg', 'b.jpg', 'c.jpg'))
  device.symlink_to('/dev/zero')
  with pytest.raises(UnreadableSample, match=r'a\.jpg is a device'):
    read_picture(device)
  long.touch()
  os.truncate(long, 2**40)  # Without taking space.
  with pytest.raises(UnreadableSample, match=r'c\.jpg has \d+ bytes'):
    read_picture(long)
  os.mkfifo(pipe)

  def write():
    with contextlib.suppress(BrokenPipeError), pipe.open('wb') as file:
      while True:
        file.write(bytes(2**16))

  thread = threading.Thread(target=write)
  thread.start()
  with pytest.raises(UnreadableSample, match=r'b\.jpg has \d+ bytes'):
    read_file(pipe, 1000)
  thread.join()
  for path, why in ((tmp_path / 'd.jpg', 'No such'), (tmp_path, 'Is a dir')):
    with pytest.raises(UnreadableSample, match=f'cannot be read .{why}'):
      read_file(path)


# --- The same pixels as Pillow's ---------------------------------------------


def assert_equals_pillow(encoded, what, atol=0):
  expected = as_rgb(Image.open(io.BytesIO(encoded))).astype(int)
  found = decode_image(encoded, cv2.IMREAD_COLOR_RGB)
  assert found.shape == expected.shape, what
  assert np.abs(found - expected).max() <= atol, what


def test_random_pictures_equal_pillows():
  """Modes, kinds of files and orientations that both libraries read."""
  rng = np.random.default_rng(4)
  for _ in range(4):
    shape = rng.integers(1, 40, 2).tolist()
    pixels = rng.integers(0, 256, (*shape, 4), np.uint8)
    grey, colour = pixels[..., 0], Image.fromarray(pixels[..., :3])
    modes = {
      'L': Image.fromarray(grey),
      'LA': Image.fromarray(pixels[..., :2]),
      'RGB': colour,
      'RGBA': Image.fromarray(pixels),
      'P': colour.quantize(9),
      '1': Image.fromarray(grey).convert('1'),
      'I;16': Image.fromarray(grey.astype(np.uint16) * 257),
      'CMYK': Image.frombytes('CMYK', shape[::-1], pixels.tobytes()),
    }
    for form, names, options in (
      ('PNG', 'L LA RGB RGBA P 1 I;16', {}),
      ('BMP', 'L RGB RGBA P 1', {}),
      ('WEBP', 'RGB RGBA', {'lossless': True, 'exact': True}),
      ('TIFF', 'L LA RGB RGBA P 1 I;16 CMYK', {}),
      ('TIFF', 'L LA RGB RGBA P I;16', {'compression': 'tiff_lzw'}),
      ('TIFF', 'L RGB RGBA', {'big_tiff': True}),
      ('JPEG', 'CMYK', {}),
      ('GIF', 'L RGB RGBA P', {}),
      ('AVIF', 'RGB RGBA', {}),
    ):
      for name in names.split():
        encoded = saved(form, modes[name], **options)
        # Both round the product of colour and black in their own ways.
        atol = 2 if name == 'CMYK' else 0
        assert_equals_pillow(encoded, (form, name, shape), atol)
    for orientation in range(1, 9):
      exif = Image.Exif()
      exif[0x0112] = orientation
      for form in ('PNG', 'TIFF', 'AVIF'):
        encoded = saved(form, colour, exif=exif)
        assert_equals_pillow(encoded, (form, orientation, shape))


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('extra', [None, 0, 1, 2])
def test_bands_of_a_tiff_are_taken_as_stored(dtype, extra):
  """Whatever is said of them: GDAL calls infrared opacity and, at 16 bits, all
  bands but the first extra ones of a grey picture.
  """
  rng = np.random.default_rng(5)
  for bands, grey in (
    (1, False),
    (2, False),
    (3, False),
    (4, False),
    (3, True),
    (4, True),
  ):
    if extra is not None and bands in (1, 3) and not grey:
      continue
    pixels = rng.integers(0, 2**16, (23, 31, bands)) >> 16 - 8 * dtype(0).nbytes
    pixels = pixels.astype(dtype)
    stored = (pixels >> 8 * dtype(0).nbytes - 8).astype(np.uint8)
    stored = stored[..., :3] if bands > 2 else np.repeat(stored[..., :1], 3, 2)
    for order in '<>':
      for options in ({}, {'big': True}, {'planar': True}):
        encoded = tiff(pixels, extra, order, grey=grey, **options)
        found = decode_image(encoded, cv2.IMREAD_COLOR_RGB)
        what = f'{bands} bands, {order}, {options}, grey {grey}'
        assert found is not None, what
        # libtiff scales 16 bits of some kinds instead of cutting them.
        off = np.abs(found.astype(int) - stored).max()
        assert off <= (dtype == np.uint16), what


@pytest.mark.parametrize('big', [False, True])
def test_more_bands_than_a_picture_has_are_counted(big):
  pixels = np.zeros((5, 7, 12), np.uint8)
  with pytest.raises(
    UnreadableSample, match=r'^b\.tif has 12 bands; .*\n.* three'
  ):
    decode_image(tiff(pixels, 0, big=big), cv2.IMREAD_COLOR_RGB, 'b.tif')
  # As the message says.
  assert decode_image(tiff(pixels[..., :3]), cv2.IMREAD_COLOR_RGB) is not None


def test_tags_of_geography_are_no_warnings(capfd):
  for _ in range(2):
    assert decode_image(tiff(SMALL), cv2.IMREAD_COLOR_RGB) is not None
  assert capfd.readouterr() == ('', '')
