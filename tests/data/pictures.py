"""Pictures that common libraries do not write: TIFFs of any bands, and lies."""

import io
import struct
import zlib

import numpy as np
import tifffile
from PIL import Image

SMALL = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def tiff(
  pixels, extra=None, order='<', big=False, planar=False, size=None, grey=False
):
  """An uncompressed TIFF of uint8 or uint16 (H, W, bands).

  `extra` is what it says of the bands after the third (2: opacity), `size` the
  (height, width) that it claims; `grey` calls the first band grey and the
  others extra ones.
  """
  bands = pixels.shape[2]
  height, width = size or pixels.shape[:2]
  body = pixels.transpose(2, 0, 1) if planar else pixels
  body = body.astype(pixels.dtype.newbyteorder(order)).tobytes()
  start, wide, word = (16, 8, 'Q') if big else (8, 4, 'I')
  parts = bands if planar else 1
  colours = 3 if bands > 2 and not grey else 1
  step = len(body) // parts
  shorts = {258: [8 * pixels.itemsize] * bands, 259: [1], 277: [bands]}
  shorts |= {262: [2 if colours == 3 else 1], 284: [2 if planar else 1]}
  if extra is not None:
    shorts[338] = [extra] * (bands - colours)
  longs = {256: [width], 257: [height], 278: [height], 279: [step] * parts}
  longs[273] = [start + step * i for i in range(parts)]
  tags = {tag: (3, 'H', values) for tag, values in shorts.items()}
  tags |= {tag: (4, 'I', values) for tag, values in longs.items()}
  # Of GeoTIFF: the size of a pixel on the ground.
  tags[33550] = 12, 'd', [10.0, 10.0, 0.0]
  table = b''
  for tag, (kind, code, values) in sorted(tags.items()):
    value = struct.pack(f'{order}{len(values)}{code}', *values)
    if len(value) > wide:
      place = struct.pack(order + word, start + len(body))
      body, value = body + value, place
    table += struct.pack(f'{order}HH{word}', tag, kind, len(values))
    table += value.ljust(wide, b'\0')
  table = struct.pack(order + 'HQ'[big], len(tags)) + table + bytes(wide)
  end = start + len(body)
  head = ('HHHQ', 43, 8, 0, end) if big else ('HI', 42, end)
  mark = b'II' if order == '<' else b'MM'
  return mark + struct.pack(order + head[0], *head[1:]) + body + table


def write_tiff(path, pixels, **options):
  """In tiles of 48 x 64 pixels, unless options of tifffile say otherwise."""
  layout = {'tile': (48, 64), 'compression': 'zlib', 'photometric': 'rgb'}
  tifffile.imwrite(path, pixels, metadata=None, **(layout | options))
  return path


def saved(form, image=None, **options):
  """A Pillow image, `SMALL` by default, as the bytes of a file."""
  file = io.BytesIO()
  (image or Image.fromarray(SMALL)).save(file, form, **options)
  return file.getvalue()


def exif_of(value, tag=0x0112):
  """By default an orientation; 6: to be turned by 90 degrees."""
  exif = Image.Exif()
  exif[tag] = value
  return exif


def chunk(kind, content):
  """A part of a PNG, with its checksum."""
  checksum = zlib.crc32(kind + content).to_bytes(4)
  return len(content).to_bytes(4) + kind + content + checksum


def grey_png(height, width, bits, rows):
  """A PNG of packed rows, a zero before each; bits: 1, 2, 4 or 8 a pixel."""
  header = struct.pack('>IIBBBBB', width, height, bits, 0, 0, 0, 0)
  encoded = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
  return encoded + chunk(b'IDAT', zlib.compress(rows, 9)) + chunk(b'IEND', b'')


def png_bomb(height, width, rows=None):
  """A PNG of zeros, 1 bit a pixel, whole or with its first rows alone."""
  rows = height if rows is None else rows
  return grey_png(height, width, 1, bytes(rows * (1 + -(-width // 8))))


def few_bits(ids, bits):
  """A grey PNG of 1, 2 or 4 bits, which neither OpenCV nor Pillow writes."""
  planes = np.unpackbits(np.uint8(ids)[..., None], axis=-1)[..., 8 - bits :]
  rows = np.packbits(planes.reshape(len(ids), -1), axis=-1)
  return grey_png(*ids.shape, bits, np.pad(rows, ((0, 0), (1, 0))).tobytes())


def with_palette(colours):
  def encoded(ids):
    picture = Image.fromarray(ids).convert('P')
    picture.putpalette(np.asarray(colours).ravel().tolist())
    return saved('PNG', picture)

  return encoded


def claiming(height, width):
  """Small files of each kind whose headers have this size, by kind."""
  most = [min(x, 65500) for x in (height, width)]
  files = {'PNG': png_bomb(height, width, 1)}
  for kind, form, old, new in (
    ('JPEG', '>HH', (6, 8), most),
    ('GIF', '<HH', (8, 6), most[::-1]),
    ('BMP', '<ii', (8, 6), (width, -height)),
    # The box around the codestream keeps the small size.
    ('JPEG2000', '>II', (8, 6), (width, height)),
  ):
    old, new = struct.pack(form, *old), struct.pack(form, *new)
    files[kind] = saved(kind).replace(old, new)
  files['PPM'] = saved('PPM').replace(b'8 6', b'%d %d' % (width, height))
  for name, big in (('TIFF', False), ('BigTIFF', True)):
    for order in '<>':
      lie = tiff(SMALL, order=order, big=big, size=(height, width))
      files[f'{name} {order}'] = lie
  head = '#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {} +X {}\n'
  files['HDR'] = head.format(height, width).encode() + bytes(99)
  return files


def blocks(rng, height, width, classes, cell, ignored=0.05):
  """A label of square cells with random classes and some ignored pixels."""
  places = np.ix_(np.arange(height) // cell, np.arange(width) // cell)
  label = rng.integers(0, classes, (32, 32), np.uint8)[places]
  label[rng.random((height, width)) < ignored] = 255
  return label
