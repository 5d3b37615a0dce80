"""Label maps of TIFF files of any size, resumed after a kill.

Finished rows wait in the folder `NAME.tif.part`, as PNG files. The label map is
put together from them, so that a killed prediction has the bytes of another.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rich.progress

from resnest_jax import runtime
from resnest_jax.data.rasters import import_tifffile
from resnest_jax.data.tiled import TiledImage
from resnest_jax.drawing import write_image
from resnest_jax.errors import UserError
from resnest_jax.files import remove, whole_file, write_json
from resnest_jax.inference.predictor import Predictor
from resnest_jax.prediction.sources import Source, part_of
from resnest_jax.text import listed

TILE = 256  # Pixels of an edge.
_ABOUT = 'about.json'


def predict_large(
  predictor: Predictor,
  source: Source,
  out: Path,
  progress: rich.progress.Progress,
  overwrite: bool = False,
) -> None:
  """Predicts a large picture, or the rest of it, and writes its label map.

  Raises `UserError` if there is a part of another prediction, unless it is to
  be overwritten.
  """
  target = out / source.files['masks']
  part, how = part_of(target), predictor.protocol.normalization
  image = TiledImage(source.path, how)
  with runtime.lock_folder(part, 'writes to'):
    _claim(part, _about(predictor, source), overwrite)
    start = min(TILE * len(_bands(part)), image.size[0])
    if start:
      said = f'{source.path}: {start} of {image.size[0]} rows are there already'
      progress.console.print(said, soft_wrap=True)
    if start < image.size[0]:
      task = progress.add_task(source.path.name, total=None, unit='windows')

      def tell(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

      found = predictor.stream(
        lambda rows: image[rows, :], image.size, start=start, tell=tell
      )
      with contextlib.closing(found):
        for row, band in _in_bands(found, start, image.size):
          write_image(part / f'{row:08}.png', band)
    _write(target, image, predictor.palette, part)


def _about(predictor: Predictor, source: Source) -> dict[str, Any]:
  """All that the bits of a label map depend on, as JSON has it."""
  status = source.path.stat()
  about = {
    'file': [status.st_size, status.st_mtime_ns],
    'weights': [predictor.digest, predictor.about.get('model')],
    'protocol': predictor.protocol.describe(),
    'batch_size': predictor.batch_size,
    'devices': runtime.describe_devices(),
    'versions': runtime.versions(),
  }
  return json.loads(json.dumps(about, default=list))


def _claim(part: Path, about: dict[str, Any], overwrite: bool) -> None:
  path = part / _ABOUT
  there = json.loads(path.read_text('utf-8')) if path.exists() else {}
  if there == about:
    return
  if there and not overwrite:
    differ = [key for key in about if about[key] != there.get(key)]
    raise UserError(
      f'{part} has the rows of another prediction: {listed(differ)} differ. '
      'Repeat its command to resume it, or give another --out, or --overwrite '
      'to begin again.'
    )
  for band in _bands(part):
    remove(band)
  write_json(path, about)


def _bands(part: Path) -> list[Path]:
  return sorted(part.glob('[0-9]' * 8 + '.png'))


def _in_bands(
  found: Iterable[tuple[int, np.ndarray]], row: int, size: tuple[int, int]
) -> Iterator[tuple[int, np.ndarray]]:
  """Bands of `TILE` rows from `row` on, of labels of any number of rows."""
  band = np.zeros((TILE, size[1]), np.uint8)
  for top, labels in found:
    while row < top + len(labels):
      filled = row % TILE
      taken = labels[row - top :][: TILE - filled]
      band[filled : filled + len(taken)] = taken
      row += len(taken)
      if row % TILE == 0 or row == size[0]:
        top_of_band = (row - 1) // TILE * TILE
        yield top_of_band, band[: row - top_of_band]


def _write(
  target: Path, image: TiledImage, palette: np.ndarray, part: Path
) -> None:
  def tiles() -> Iterator[np.ndarray]:
    for path in _bands(part):
      encoded = np.fromfile(path, np.uint8)
      band = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
      more = TILE - len(band), -band.shape[1] % TILE
      band = np.pad(band, [(0, n) for n in more])
      yield from (band[:, x : x + TILE] for x in range(0, band.shape[1], TILE))

  colours = np.zeros((3, 256), np.uint16)
  colours[:, : len(palette)] = 257 * palette.T.astype(np.uint16)
  with whole_file(target) as temporary:
    import_tifffile().imwrite(
      temporary,
      tiles(),
      bigtiff=image.size[0] * image.size[1] > 2**31,
      shape=image.size,
      dtype=np.uint8,
      tile=(TILE, TILE),
      compression='zlib',
      photometric='palette',
      colormap=colours,
      extratags=image.tags,
      metadata=None,
      software=False,
    )
