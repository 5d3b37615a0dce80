"""Label maps of TIFF files of any size, resumed after a kill.

Finished rows wait in the folder `NAME.tif.part`, a byte a pixel. The label map
is put together from them, so that a killed prediction has the bytes of another.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rich.progress

from resnest_jax import runtime
from resnest_jax.data.rasters import import_tifffile
from resnest_jax.data.tiled import TiledImage
from resnest_jax.errors import UserError
from resnest_jax.files import whole_file, write_json
from resnest_jax.inference.predictor import Predictor
from resnest_jax.prediction.sources import Source, part_of
from resnest_jax.text import listed

TILE = 256  # Pixels of an edge.
_ABOUT, _ROWS = 'about.json', 'rows'  # In the folder.


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
  rows, (height, width) = part / _ROWS, image.size
  with runtime.lock_folder(part, 'writes to'):
    _claim(part, predictor, source, overwrite)
    start = rows.stat().st_size // width
    if start:
      said = f'{source.path}: {start} of {height} rows are there already'
      progress.console.print(said, soft_wrap=True)
    if start < height:
      task = progress.add_task(source.path.name, total=None, unit='windows')
      found = predictor.stream(
        lambda part: image[part, :],
        image.size,
        start=start,
        tell=lambda n, total: progress.update(task, advance=n, total=total),
      )
      with contextlib.closing(found), rows.open('ab') as file:
        file.truncate(start * width)  # A kill may cut a row off.
        for top, labels in found:
          file.write(labels[max(start - top, 0) :].tobytes())
          file.flush()
    _write(target, image, predictor.palette, rows)


def _claim(
  part: Path, predictor: Predictor, source: Source, overwrite: bool
) -> None:
  status, path = source.path.stat(), part / _ABOUT
  about = {  # All that the bits of a label map depend on.
    'file': [status.st_size, status.st_mtime_ns],
    'weights': [predictor.digest, predictor.about.get('model')],
    'protocol': predictor.protocol.describe(),
    'batch_size': predictor.batch_size,
    'devices': runtime.describe_devices(),
    'versions': runtime.versions(),
  }
  about = json.loads(json.dumps(about, default=list))
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
  (part / _ROWS).write_bytes(b'')
  write_json(path, about)


def _write(
  target: Path, image: TiledImage, palette: np.ndarray, rows: Path
) -> None:
  height, width = image.size

  def tiles() -> Iterator[np.ndarray]:
    for top in range(0, height, TILE):
      shape = min(TILE, height - top), width
      band = np.fromfile(rows, np.uint8, np.prod(shape), offset=top * width)
      more = TILE - shape[0], -width % TILE
      band = np.pad(band.reshape(shape), [(0, n) for n in more])
      yield from (band[:, x : x + TILE] for x in range(0, width, TILE))

  colours = np.zeros((3, 256), np.uint16)
  colours[:, : len(palette)] = 257 * palette.T.astype(np.uint16)
  with whole_file(target) as temporary:
    import_tifffile().imwrite(
      temporary,
      tiles(),
      bigtiff=height * width > 2**31,
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
