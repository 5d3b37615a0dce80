"""Images of 1 to 16 named bands of 8 or 16 bits or floats (`data.bands`).

TIFF is read by tifffile, which is imported where it is needed, .npy by NumPy,
and the other formats by OpenCV.
"""

import io
import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from resnest_jax.bands import ARRAY, has_colours, network_order
from resnest_jax.data import images
from resnest_jax.data.pictures import as_rgb, decode_file
from resnest_jax.data.preprocess import IMAGENET, Normalization
from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.progress import progress_bar
from resnest_jax.text import listed
from resnest_jax.threads import map_in_threads

_REPAIR = 'Repair it, or remove it with its mask.'


def as_image(
  image: Any, normalization: Normalization, max_pixels: int = images.MAX_PIXELS
) -> np.ndarray:
  """What `normalization` is for, of a path, an array or a picture.

  Without bands uint8 (H, W, 3) RGB, else (H, W, bands) in the file's order, of
  `normalization.dtype`, which '' leaves open. Raises `UnreadableSample` if it
  is damaged, of other bands or another type, or holds NaN or infinity.
  """
  bands, where = normalization.bands, 'the image'
  if not bands:
    return as_rgb(image, max_pixels)
  if isinstance(image, str | Path):
    where, image = image, _read(image, len(bands), max_pixels)
  image = np.asarray(image)
  image = image[..., None] if image.ndim == 2 else image
  fits = image.shape[2:] == (len(bands),) and image.dtype.kind in 'iuf'
  if not fits or 0 in image.shape:
    remedy = (
      f'config.data.bands names {", ".join(bands)}; name each band of the '
      'files, in their order, or write this one as the others are.'
    )
    if image.ndim == 3 and image.shape[0] == len(bands):
      remedy = 'Its bands come first: write np.moveaxis(array, 0, -1).'
    raise UnreadableSample(
      f'{where} is {image.dtype} {image.shape}; it has to be whole '
      f'numbers or floats of (height, width, {len(bands)}).\n{remedy}'
    )
  was = image.dtype
  dtype = image.dtype.name
  dtype = dtype if dtype in ('uint8', 'uint16') else 'float32'
  if normalization.dtype not in ('', dtype):
    raise UnreadableSample(
      f'{where} is of {was}, and the network takes {normalization.dtype}.\n'
      'Write all images, also those that are predicted, in the same way.'
    )
  image = np.array(image, dtype, order='C')
  if dtype == 'float32' and not np.isfinite(image).all():
    raise UnreadableSample(
      f'{where} has values that are NaN or infinite.\nWrite another number '
      'there, such as 0, and 255 (ignored) into the mask.'
    )
  return image


def _read(path: str | Path, number: int, max_pixels: int) -> np.ndarray:
  """The pixels of a file, (H, W) or with bands behind; not more than these."""
  ending = Path(path).suffix.lower()
  try:
    if ending == ARRAY:
      # Mapped: nothing is read or reserved before the shape is checked.
      image = np.lib.format.open_memmap(path, mode='r')
      images.check_pixels(*(*image.shape, 1, 1)[:2], max_pixels, path)
      return image
    if ending in ('.tif', '.tiff'):
      return _read_tiff(path, number, max_pixels)
  except UserError:
    raise
  except Exception as error:  # Of damaged files, and of missing codecs.
    more = ' Some compressions of TIFF need: pip install imagecodecs'
    more *= ending != ARRAY
    raise UnreadableSample(
      f'{path} cannot be decoded ({error}).\n{_REPAIR}{more}'
    ) from error
  flags = cv2.IMREAD_UNCHANGED
  if number == 3:  # As RGB: turned upright by the EXIF data.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
  image, _ = decode_file(path, flags, max_pixels, _REPAIR)
  order = [2, 1, 0, 3][: image.shape[-1]]  # As OpenCV has them.
  return image if image.ndim == 2 else image[..., order]


def import_tifffile() -> Any:
  try:
    import tifffile
  except ImportError as error:
    needed = 'such TIFF files need: pip install tifffile imagecodecs'
    raise UserError(needed) from error
  # Tags that it does not understand are none of those that are used.
  logging.getLogger('tifffile').setLevel(logging.CRITICAL)
  return tifffile


def _read_tiff(path: str | Path, number: int, max_pixels: int) -> np.ndarray:
  tifffile = import_tifffile()
  encoded = images.read_file(path, number * max_pixels)
  with tifffile.TiffFile(io.BytesIO(encoded)) as file:
    series = file.series[0]
    places = [series.axes.index(x) for x in 'YX']
    height, width = (series.shape[i] for i in places)
    images.check_pixels(height, width, max_pixels, path)
    # More bands are not decoded: their number is enough for the error.
    if series.size > number * height * width:
      image = np.broadcast_to(np.zeros((), series.dtype), series.shape)
    else:
      image = series.asarray()
  # Bands may be planes (GDAL's INTERLEAVE=BAND) or pages of their own.
  return np.moveaxis(image, places, (0, 1))


def measure(split: Any, num_threads: int = 0) -> Normalization:
  """Mean and deviation of each band over the images of a split with bands.

  Red, green and blue of 8 bits have ImageNet's, as all pictures have.
  """
  bands = split.bands

  def facts(index: int) -> tuple | None:
    try:
      image = split.image(index)
    except UnreadableSample:
      return None  # Training names it, or skips it.
    pixels = image.reshape(-1, len(bands))
    # One by one: NumPy makes a copy in float64.
    variances = [band.var(dtype=np.float64) for band in pixels.T]
    mean = pixels.mean(0, np.float64)
    return index, image.dtype.name, len(pixels), mean, variances

  found = []
  with progress_bar('measuring bands') as report:
    for fact in map_in_threads(facts, range(len(split)), num_threads):
      found.append(fact)
      report(len(found), len(split))
  found = [*filter(None, found)]
  if not found:
    split.image(0)  # Says why it cannot be read.
  first = {dtype: split.location(i) for i, dtype, *_ in reversed(found)}
  if len(first) != 1:
    said = listed(f'{x} ({place})' for x, place in sorted(first.items()))
    raise UserError(
      f'the images of the split {split.split} are not of one type: {said}. '
      'Write all in the same way.'
    )
  *_, numbers, means, variances = zip(*found, strict=True)
  mean = np.average(means, 0, numbers)
  variance = np.average(variances + np.square(means - mean), 0, numbers)
  # A constant band says nothing; 0 would divide by zero.
  std = np.where(variance > 1e-18 * mean**2 + 1e-60, np.sqrt(variance), 1.0)
  if has_colours(bands) and 'uint8' in first:
    places = network_order(bands)[:3]
    mean[places], std[places] = IMAGENET.mean, IMAGENET.std
  values = tuple(mean.tolist()), tuple(std.tolist())
  return Normalization(*values, bands=bands, dtype=next(iter(first)))
