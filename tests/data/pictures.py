"""Pictures that common libraries do not write: TIFFs of any bands, and lies."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SMALL = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def tiff(
  pixels,
  extra=None,
  order='<',
  big=False,
  planar=False,
  size=None,
  grey=False,
):
  """An uncompressed TIFF of uint8 or uint16 (H, W, bands).

  `extra` is what it says of the bands after the third (2: opacity), `size` the
  (height, width) that it claims; `grey` calls the first band grey and the
  others extra ones.
  """
  height, width, bands = pixels.shape
  body = pixels.transpose(2, 0, 1) if planar else pixels
  body = body.astype(pixels.dtype.newbyteorder(order)).tobytes()
  start = 16 if big else 8
  parts = bands if planar else 1
  colours = 3 if bands > 2 and not grey else 1
  step = len(body) // parts
  claimed = size or (height, width)
  tags = {
    256: (4, [claimed[1]]),
    257: (4, [claimed[0]]),
    258: (3, [8 * pixels.itemsize] * bands),
    259: (3, [1]),
    262: (3, [2 if colours == 3 else 1]),
    273: (4, [start + step * i for i in range(parts)]),
    277: (3, [bands]),
    278: (4, [claimed[0]]),
    279: (4, [step] * parts),
    284: (3, [2 if planar else 1]),
    # Of GeoTIFF: the size of a pixel on the ground.
    33550: (12, [10.0, 10.0, 0.0]),
  }
  if extra is not None:
    tags[338] = (3, [extra] * (bands - colours))
  wide = 8 if big else 4
  offset, table = start + len(body), b''
  for tag, (kind, values) in sorted(tags.items()):
    code = {3: 'H', 4: 'I', 12: 'd'}[kind]
    value = struct.pack(f'{order}{len(values)}{code}', *values)
    if len(value) > wide:
      body += value
      value = struct.pack(order + 'IQ'[big], offset)
      offset += len(body) - (offset - start)
    count = struct.pack(order + 'IQ'[big], len(values))
    table += struct.pack(f'{order}HH', tag, kind) + count
    table += value.ljust(wide, b'\0')
  table = struct.pack(order + 'HQ'[big], len(tags)) + table + bytes(wide)
  mark = b'II' if order == '<' else b'MM'
  if big:
    head = mark + struct.pack(f'{order}HHHQ', 43, 8, 0, offset)
  else:
    head = mark + struct.pack(f'{order}HI', 42, offset)
  return head + body + table


def saved(form, image=None, **options):
  """A Pillow image, `SMALL` by default, as the bytes of a file."""
  file = io.BytesIO()
  (image or Image.fromarray(SMALL)).save(file, form, **options)
  return file.getvalue()


def chunk(kind, body):
  end = struct.pack('>I', zlib.crc32(kind + body))
  return struct.pack('>I', len(body)) + kind + body + end


def png_bomb(height, width, rows=None):
  """A PNG of zeros, 1 bit a pixel, whole or with its first rows alone."""
  pack = zlib.compressobj(9)
  row = bytes(1 + -(-width // 8))
  number = height if rows is None else rows
  rows = b''.join(pack.compress(row) for _ in range(number)) + pack.flush()
  header = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
  parts = chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + parts


def claiming(height, width):
  """Small files of each kind whose headers have this size, by kind."""
  files = {kind: saved(kind) for kind in ('JPEG', 'BMP', 'GIF', 'PPM')}
  files['PNG'] = png_bomb(height, width, 1)
  files['JPEG 2000'] = saved('JPEG2000')
  old, new = (struct.pack('>II', *x) for x in ((8, 6), (width, height)))
  # The box around the codestream keeps the small size.
  files['JPEG 2000'] = files['JPEG 2000'].replace(old, new)
  files['PPM'] = files['PPM'].replace(b'8 6', b'%d %d' % (width, height))
  files['BMP'] = files['BMP'].replace(
    struct.pack('<ii', 8, 6), struct.pack('<ii', width, -height)
  )
  for kind, old in (('JPEG', '>HH'), ('GIF', '<HH')):
    sizes = (6, 8) if kind == 'JPEG' else (8, 6)
    most = [min(x, 65500) for x in (height, width)]
    new = most if kind == 'JPEG' else most[::-1]
    files[kind] = files[kind].replace(
      struct.pack(old, *sizes), struct.pack(old, *new)
    )
  for big in (False, True):
    for order in '<>':
      name = f'{"BigTIFF" if big else "TIFF"} {order}'
      files[name] = tiff(SMALL, order=order, big=big, size=(height, width))
  files['HDR'] = (
    f'#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {height} +X {width}\n'.encode()
    + bytes(99)
  )
  return files
