"""Regions of TIFF files of any size: only what a region touches is read."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from resnest_jax.data.preprocess import IMAGENET, Normalization
from resnest_jax.data.rasters import as_image, import_tifffile
from resnest_jax.errors import UnreadableSample
from resnest_jax.text import plural

# Where it lies on the ground: pixels, points, their transformation, and keys.
_GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
_ORIENTATION = 274
_MOST = 2**28  # Bytes of a strip, which is decoded as a whole.


class TiledImage:
  """The first image of a TIFF file, read where it is indexed: [rows, columns].

  Threads may share it. `size` are height and width, `tags` what places it on
  the ground, as `extratags` of tifffile; `has_tiles`: some, of 8 bits.
  """

  dtype = np.dtype(np.uint8)  # Of an image without bands.

  def __init__(self, path: str | Path, normalization: Normalization = IMAGENET):
    """`UnreadableSample`: it is cut off, or nothing that is read in parts."""
    tifffile = import_tifffile()
    self.path, self._how = path, normalization
    with self._decoding(''):
      self._file = tifffile.TiffFile(path)
      page = self._page = self._file.pages.first
      tags = [page.tags.get(code) for code in _GEO_TAGS]
      self.tags = [(x.code, x.dtype, x.count, x.value, True) for x in tags if x]
      self.size = page.imagelength, page.imagewidth
      self.shape = *self.size, 3
      # A strip is a tile as wide as the image.
      strip = min(page.rowsperstrip, page.imagelength), page.imagewidth
      tile = page.tilelength, page.tilewidth
      self._tile = tile if page.is_tiled else strip
      self.has_tiles = page.is_tiled and page.dtype == self.dtype
      self._planes = page.samplesperpixel if page.planarconfig == 2 else 1
      ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
      if (there := os.path.getsize(path)) < (end := max(ends)):
        raise EOFError(f'cut off: {there} bytes of {end}')
    self._check()

  def __del__(self):
    with contextlib.suppress(AttributeError):  # It could not be opened.
      self._file.close()

  @contextlib.contextmanager
  def _decoding(self, where: str) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Whatever a damaged file is to tifffile.
      raise UnreadableSample(
        f'{self.path} cannot be read{where}: {error}. It is damaged, or of a '
        'kind that tifffile does not know; get it again from its origin.'
      ) from error

  def _check(self) -> None:
    page = self._page
    kind, bands = page.photometric.name, page.samplesperpixel
    colours = kind in ('MINISBLACK', 'RGB', 'YCBCR') and bands in (1, 3, 4)
    colours &= page.dtype in ('uint8', 'uint16')
    turned = page.tags.valueof(_ORIENTATION, 1)
    colours &= turned == 1
    size = np.prod(self._tile) * bands * page.dtype.itemsize
    if size <= _MOST and (self._how.bands or colours):
      return
    raise UnreadableSample(
      f'{self.path} is {kind} of {plural(bands, "band")} of {page.dtype}, '
      f'with orientation {turned}, in parts of {self._tile[0]} rows. Images '
      'that are read in parts have the bands of the network, or are grey or '
      'RGB of 8 or 16 bits, with orientation 1, in parts of at most '
      f'{_MOST} bytes. Another --protocol reads it whole, or write it anew: '
      'gdal_translate -co TILED=YES OLD NEW (-expand rgb for a palette, -b 1 '
      '-b 2 -b 3 for some bands, -ot Byte -scale for another type).'
    )

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    return self[:, :]

  def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
    """A region (rows, columns, bands) as `rasters.as_image` of the file."""
    top, end, _ = part[0].indices(self.size[0])
    left, right, _ = part[1].indices(self.size[1])
    with self._decoding(f' in rows {top} to {end}'):
      region = self._region(top, end, left, right)
    if not self._how.bands:
      region = region[..., :3] if region.shape[2] > 1 else region[..., 0]
      if region.dtype == np.uint16:  # As libtiff does for OpenCV.
        region = np.uint8((np.uint32(region) + 128) // 257)
    return as_image(region, self._how)

  def _region(self, top: int, end: int, left: int, right: int) -> np.ndarray:
    page, (high, wide) = self._page, self._tile
    across, number = -(-self.size[1] // wide), len(page.dataoffsets)
    # A file may leave out tiles of the value that says so.
    shape = end - top, right - left, page.samplesperpixel
    region = np.full(shape, page.nodata, page.dtype)
    for plane, row, column in itertools.product(
      range(self._planes),
      range(top // high, -(-end // high)),
      range(left // wide, -(-right // wide)),
    ):
      index = plane * number // self._planes + row * across + column
      # Without a seek, as threads share the file.
      part = page.databytecounts[index], page.dataoffsets[index]
      encoded = os.pread(self._file.filehandle.fileno(), *part)
      if not encoded:
        continue
      tables = {'jpegtables': page.jpegtables, 'jpegheader': page.jpegheader}
      tile = page.decode(encoded, index, **tables)[0][0]
      y, x = row * high - top, column * wide - left
      tile = tile[max(-y, 0) : end - top - y, max(-x, 0) : right - left - x]
      bands = slice(plane, plane + 1) if self._planes > 1 else slice(None)
      place = np.s_[max(y, 0) :, max(x, 0) :, bands]
      region[place][: tile.shape[0], : tile.shape[1]] = tile
    return region
