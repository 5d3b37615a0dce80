"""Predicts a picture and formats the result as HTML for the page."""

import dataclasses
from html import escape
from pathlib import Path

import numpy as np

from resnest_jax import drawing, runtime
from resnest_jax.data.images import picture_size, read_file
from resnest_jax.data.pictures import read_picture
from resnest_jax.errors import UserError
from resnest_jax.evaluation.report.images import data_uri
from resnest_jax.evaluation.report.tables import named
from resnest_jax.inference.predictions import Prediction
from resnest_jax.inference.predictor import Predictor

MAX_EDGE = 1600  # Pixels: larger pictures are shrunk.
# 300 MB decoded. A small file can hold a picture that fills the memory.
MAX_PIXELS = 100_000_000
_SPACE = '\N{NO-BREAK SPACE}'

Shape = tuple[int, int]  # Height and width, pixels.


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
  """A predicted picture."""

  name: str  # The file's.
  prediction: Prediction  # At the size at which the page shows the picture.
  original: Shape  # Size in the file, upright.
  seen: Shape  # Size at which the network saw it.
  padded: Shape  # That size padded to a compiled shape.
  seconds: float  # Time of the devices without compiling.


def look_at(predictor: Predictor, path: Path) -> Result:
  """Predicts a picture, shrunk to `MAX_EDGE` if it is larger.

  No other thread may use the predictor meanwhile. `UserError` if the file is no
  picture or exceeds `MAX_PIXELS`.
  """
  picture = _read(path)
  original = picture.shape[:2]
  if max(original) > MAX_EDGE:
    picture = drawing.fit(picture, (MAX_EDGE, MAX_EDGE), smooth=True)
  steps = []
  predictor.on_step = lambda *step: steps.append(step)
  try:
    with runtime.count_compilations() as compiled:
      prediction = predictor.predict(picture)
    if compiled:  # Again, for the device's time alone.
      prediction = predictor.predict(picture)
  finally:
    predictor.on_step = None  # Every step would wait for the devices.
  batch, seconds = steps[-1]
  seen, padded = tuple(batch['size'][0].tolist()), batch['image'].shape[1:3]
  return Result(path.name, prediction, original, seen, padded, seconds)


def _read(path: Path) -> np.ndarray:
  try:
    # Without a size it is no picture, and `read_picture` says so.
    height, width = picture_size(read_file(path)) or (0, 0)
    if height * width > MAX_PIXELS:
      raise UserError(
        f'{path.name} has more than {MAX_PIXELS // 10**6} million pixels; '
        'shrink it first.'
      )
    return read_picture(path)
  except UserError as error:  # Visitors do not know the folder of uploads.
    raise UserError(str(error).replace(str(path), path.name)) from error


def shares(labels: np.ndarray, number: int) -> list[tuple[int, int]]:
  """Each class in a label map and its share, the largest first.

  Shares are in tenths of a percent and add up to 1000.
  """
  counts = np.bincount(labels.ravel(), minlength=number)[:number]
  # Rounded down; the missing tenths go to the classes that lost most.
  tenths, rest = np.divmod(1000 * counts, counts.sum())
  lacking = 1000 - tenths.sum()
  tenths[np.argsort(-rest, kind='stable')[:lacking]] += 1
  order = np.argsort(-counts, kind='stable')
  return [(int(i), int(tenths[i])) for i in order if counts[i]]


def overlay(result: Result) -> str:
  """Two layers, the picture and its classes; the slider sets the opacity."""
  found = result.prediction
  height, width = found.labels.shape
  name = escape(result.name)
  layers = (
    ('photograph', name, data_uri(found.image, '.jpg')),
    ('colours', f'{name}: its classes', data_uri(found.colors(), '.png')),
  )
  images = ''.join(
    f'<img class="{kind}" alt="{text}" width="{width}" height="{height}" '
    f'src="{uri}">'
    for kind, text, uri in layers
  )
  ratio = f'--ratio: {width / height:.4f}'
  return f'<div class="layers" style="{ratio}">{images}</div>'


def legend(found: Prediction) -> str:
  """A table of the classes in a picture: colour, name, share."""
  rows = []
  for index, tenths in shares(found.labels, len(found.classes)):
    name = named(found.palette[index], found.classes[index])
    # A class that occurs must not read as 0.0.
    share = f'{tenths / 10:.1f}' if tenths else '&lt; 0.1'
    rows.append(
      f'<tr><th scope="row">{name}</th>'
      f'<td><span class="bar" style="width:{tenths / 10}%"></span></td>'
      f'<td class="share">{share} %</td></tr>'
    )
  return (
    '<table class="classes"><thead><tr><th scope="col">Class</th>'
    '<th scope="col" colspan="2">Share of the pixels</th></tr></thead>'
    f'<tbody>{"".join(rows)}</tbody></table>'
  )


def facts(result: Result) -> str:
  """Sizes and time in words."""
  shown, time = result.prediction.labels.shape, f'{result.seconds:.1f}{_SPACE}s'
  if result.seconds < 1:
    time = f'{1000 * result.seconds:.0f}{_SPACE}ms'
  size = _size(result.original)
  if shown != result.original:
    size += f'; it is large and was shrunk to {_size(shown)} first'
  return (
    f'<p class="facts"><strong>{escape(result.name)}</strong>: {size} pixels. '
    f'The network saw it at {_size(result.seen)}, padded to '
    f'{_size(result.padded)}, for <strong>{time}</strong> '
    f'on {escape(runtime.describe_devices())}.</p>'
  )


def _size(size: Shape) -> str:
  return f'{size[1]}{_SPACE}\N{MULTIPLICATION SIGN}{_SPACE}{size[0]}'
