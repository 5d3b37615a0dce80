"""Decoding pictures: whole, damaged, and larger than a header may say."""

import contextlib
import io
import os
import resource

import cv2
import numpy as np
import psutil
import pytest
from data.pictures import SMALL, claiming, exif_of, saved, tiff
from data.refusals import unreadable
from data.small_archives import encode
from numpy.testing import assert_equal
from PIL import Image

from resnest_jax.data import headers, images
from resnest_jax.data.doctor.decoder_warnings import jpeg_warnings
from resnest_jax.data.images import decode_image, picture_size
from resnest_jax.data.pictures import as_rgb, read_picture, unused
from resnest_jax.errors import UnreadableSample

PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def decode(encoded, *options):
  return decode_image(encoded, cv2.IMREAD_COLOR_RGB, *options)


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'progressive'])
def test_what_is_cut_off_is_no_picture(form):
  options, lost = {}, 20
  if form == 'progressive':
    form, options, lost = 'JPEG', {'progressive': True}, 1
  encoded = saved(form, Image.fromarray(PICTURE), **options)
  assert decode(encoded).shape == PICTURE.shape
  for kept in (0, 1, 20, len(encoded) // 2, len(encoded) - lost):
    assert decode(encoded[:kept]) is None, kept


@pytest.mark.parametrize(
  'size', [(60_000, 60_000), (20_000, 20_000), (2**20 - 1, 40_000)]
)
def test_small_files_that_claim_to_be_large_are_not_decoded(size):
  files = claiming(*size)
  assert decode(files.pop('HDR')) is None  # Whose size Pillow does not read.
  for kind, encoded in files.items():
    assert len(encoded) < 2000
    height, width = picture_size(encoded)
    most = 65500 if kind in ('JPEG', 'GIF') else 2**31  # Of their 16 bits.
    assert (height, width) == tuple(min(x, most) for x in size), kind
    told = f'file is {width} x {height} pixels, more than {2**28} .*\nShrink it'
    unreadable(f'^a {told}', decode, encoded, 'a file', 2**28)


def test_a_chunk_that_is_longer_than_the_file_takes_no_memory():
  """Up to 4 GB, as OpenCV makes room for a chunk before it reads it."""
  png = bytearray(saved('PNG', Image.fromarray(PICTURE)))
  png[33:37] = b'\xff\xff\xff\x1c'  # The length of the first after IHDR.
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert decode(bytes(png)) is None
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
  assert grown < 2**20  # kB


def test_sizes_in_headers_are_those_that_are_decoded():
  """Of random pictures in every kind of file."""
  rng = np.random.default_rng(3)
  exif = exif_of('x' * 30_000, 0x010E)  # A description, before JPEG's size.
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
      assert decode(encoded).shape == pixels.shape
  assert decode(b'no picture') is None
  # Bytes that belong to no marker, which libjpeg passes over.
  jpeg = saved('JPEG')
  padded = jpeg[:20] + b'\0\xff\xff\0junk' + jpeg[20:]
  assert picture_size(padded) == (6, 8)
  assert decode(padded).shape == (6, 8, 3)


def test_damaged_headers_say_what_is_decoded_or_nothing():
  """400 files with wrong bytes; an error of another type would be a bug."""
  rng = np.random.default_rng(7)
  forms = 'PNG JPEG BMP GIF PPM WEBP AVIF TIFF JPEG2000'
  files = [*map(saved, forms.split())]
  files += [saved('WEBP', exif=exif_of(6))]
  files += [tiff(SMALL, order=x, big=y) for x in '<>' for y in (0, 1)]
  decoded = 0
  for number in range(400):
    encoded = bytearray(files[number % len(files)])
    for place in rng.integers(0, min(len(encoded), 200), rng.integers(1, 4)):
      encoded[place] = rng.choice([0, 1, 2, 127, 255])
    with contextlib.suppress(UnreadableSample):
      found = decode(bytes(encoded), 'x', 10**6)
      if found is not None:
        decoded += 1
        size = picture_size(bytes(encoded))
        assert size in (found.shape[:2], found.shape[1::-1]), number
  assert decoded > 100


def test_the_limit_of_opencv_remains():
  huge = claiming(40_000, 30_000)['PNG']
  unreadable('tiles: OpenCV reads at', decode, huge, 'a file', 2**40)
  wide = claiming(2**21, 2)['BMP']
  unreadable('a file cannot be decoded by Op', decode, wide, 'a file', 2**40)


def test_what_never_ends_is_not_read(tmp_path):
  pipe, long = tmp_path / 'b.jpg', tmp_path / 'c.jpg'
  long.touch()
  os.truncate(long, 2**40)  # Without taking space.
  unreadable(r'c\.jpg has \d+ bytes', read_picture, long)
  os.mkfifo(pipe)
  unreadable(r'b\.jpg is a device, a pipe', images.read_file, pipe)
  for path, why in ((tmp_path / 'd.jpg', 'No such'), (tmp_path, 'Is a dir')):
    unreadable(f'cannot be read .{why}', images.read_file, path)


def assert_equals_pillow(encoded, what, atol=0):
  expected = as_rgb(Image.open(io.BytesIO(encoded))).astype(int)
  found = decode(encoded)
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
      for form in ('PNG', 'TIFF', 'AVIF'):
        encoded = saved(form, colour, exif=exif_of(orientation))
        assert_equals_pillow(encoded, (form, orientation, shape))


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('extra', [None, 0, 1, 2])
def test_bands_of_a_tiff_are_taken_as_stored(bits, extra):
  # GDAL calls infrared opacity and, at 16 bits, all bands but the first extra
  # ones of a grey picture.
  rng = np.random.default_rng(5)
  for bands, grey in ((1, 0), (2, 0), (3, 0), (4, 0), (3, 1), (4, 1)):
    if extra is not None and bands in (1, 3) and not grey:
      continue
    pixels = rng.integers(0, 2**bits, (23, 31, bands), f'uint{bits}')
    stored = (pixels >> bits - 8).astype(np.uint8)
    stored = stored[..., :3] if bands > 2 else np.repeat(stored[..., :1], 3, 2)
    for order in '<>':
      for options in ({}, {'big': True}, {'planar': True}):
        encoded = tiff(pixels, extra, order, grey=grey, **options)
        # libtiff scales 16 bits of some kinds instead of cutting them.
        off = np.abs(decode(encoded).astype(int) - stored).max()
        assert off <= (bits == 16), (bands, order, options, grey)


@pytest.mark.parametrize('big', [False, True])
def test_more_bands_than_a_picture_has_are_counted(big):
  pixels = np.zeros((5, 7, 12), np.uint8)
  told = r'^b\.tif has 12 bands; .*\n.* three'
  unreadable(told, decode, tiff(pixels, 0, big=big), 'b.tif')
  # As the message says.
  assert_equal(decode(tiff(pixels[..., :3])), pixels[..., :3])


def test_tags_of_geography_are_no_warnings(capfd):
  for _ in range(2):
    assert_equal(decode(tiff(SMALL)), SMALL)
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('bands', [1, 2, 3, 4, 5, 12, 224])
@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('big', [False, True])
def test_bands_of_any_tiff(bands, order, big):
  pixels = np.zeros((2, 2, bands), np.uint8)
  encoded = tiff(pixels, order=order, big=big, grey=True)
  assert headers.channels(encoded) == bands
  assert bool(headers.left_out(bands)) == (bands not in (1, 3))
  # Any part of it says something or nothing, and is no error.
  for length in range(len(encoded)):
    assert headers.channels(encoded[:length]) in (0, 1, bands)


def test_dark_pictures_of_16_bits_name_their_white():
  (said,) = unused(encode(np.full((4, 4), 2100, np.uint16)), 16)
  assert 'nearly black.\nWrite it' in said.partition(' / 4095,')[0]


def test_pictures_with_fractions_say_so(tmp_path):
  old, new = str(tmp_path / 'floats.tif'), str(tmp_path / 'new.png')
  cv2.imwrite(old, np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4))
  told = unreadable('with fractions', read_picture, tmp_path / 'floats.tif')
  code = told.partition('file: ')[2].partition('. Here')[0]
  exec(code, {'cv2': cv2, 'np': np, 'old': old, 'new': new, 'WHITE': 1})
  assert read_picture(tmp_path / 'new.png')[-1, -1].tolist() == [255] * 3


COMPLAINT = b'Corrupt JPEG data: 213 extraneous bytes before marker 0xd9\n'


def test_complaints_are_kept_and_the_rest_is_passed_on(capfd):
  with jpeg_warnings() as found:
    os.write(2, b'another message\n' + COMPLAINT + b'no end of line')
    assert capfd.readouterr().err == ''
  assert found == [COMPLAINT.decode().rstrip()]
  assert capfd.readouterr().err == 'another message\nno end of line'


def test_error_output_is_restored_after_an_error(capfd):
  with pytest.raises(KeyError), jpeg_warnings():
    raise KeyError
  os.write(2, COMPLAINT)
  assert capfd.readouterr().err == COMPLAINT.decode()
  before = psutil.Process().num_fds()
  for _ in range(3):
    with jpeg_warnings() as found:
      pass
    assert found == []
  assert psutil.Process().num_fds() == before
