"""What is predicted of a picture: the class of each pixel, or its own."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resnest_jax import drawing
from resnest_jax.bands import shown
from resnest_jax.data.images import MAX_PIXELS
from resnest_jax.data.preprocess import IMAGENET, Normalization
from resnest_jax.data.rasters import as_image
from resnest_jax.errors import UserError
from resnest_jax.inference.steps import BEST
from resnest_jax.text import listed, percent, plural

SHOWN = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """The label map of a picture.

  Attributes:
    labels: uint8 (H, W), the class of every pixel.
    classes: C names: `classes[labels[y, x]]`.
    palette: uint8 (C, 3), RGB.
    source: the picture, an array or its path.
    probabilities: float32 (H, W, C) or (H, W) as requested, else None.
    normalization: that of the network, which knows the picture's bands.
  """

  labels: np.ndarray
  classes: tuple[str, ...]
  palette: np.ndarray
  source: np.ndarray | str | Path
  probabilities: np.ndarray | None = None
  normalization: Normalization = IMAGENET

  @property
  def image(self) -> np.ndarray:
    """The picture, uint8 (H, W, 3) RGB; of other bands as `bands.shown`."""
    # Read again from a path, so that thousands of predictions fit in memory.
    # Its size was accepted when it was predicted.
    how, most = self.normalization, max(self.labels.size, MAX_PIXELS)
    return shown(as_image(self.source, how, most), how.bands)

  def colors(self) -> np.ndarray:
    """The label map in the classes' colours, uint8 (H, W, 3) RGB."""
    return drawing.colour(self.labels, self.palette)

  def overlay(self, opacity: float = 0.5, legend: bool = False) -> np.ndarray:
    """The picture under the classes' colours, uint8 (H, W, 3) RGB.

    `opacity` is from 0 to 1; `legend` adds a strip with the classes' names.
    """
    check_opacity(opacity)
    mixed = drawing.overlay(self.image, self.labels, self.palette, opacity)
    if not legend:
      return mixed
    height, width = self.labels.shape
    zoom = max(round(min(height, width) / 500), 1)
    drawn = [self.labels], self.classes, self.palette, width, zoom
    return np.vstack([mixed, drawing.legend(*drawn)])

  def __repr__(self) -> str:
    height, width = self.labels.shape
    found = [self.classes[k] for k in np.unique(self.labels)]
    what = f'{width}x{height} pixels, {plural(len(found), "class")}'
    return f'<Prediction: {what}: {listed(found)}>'

  def _repr_png_(self) -> bytes:
    """What a notebook shows: the overlay, at most `SHOWN` pixels long."""
    try:
      picture = self.overlay()
    except UserError:  # The file has gone since.
      picture = self.colors()
    if max(picture.shape) > SHOWN:
      picture = drawing.fit(picture, (SHOWN, SHOWN), smooth=True)
    return drawing.encoded('.png', picture)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassPrediction:
  """The class of a picture.

  Attributes:
    probabilities: float32 (C,), of all classes.
    classes: their names.
    source: the picture, an array or its path.
  """

  probabilities: np.ndarray
  classes: tuple[str, ...]
  source: np.ndarray | str | Path

  @property
  def label(self) -> int:
    """The number of the most probable class."""
    return int(self.probabilities.argmax())

  def top(self, number: int = BEST) -> list[tuple[str, float]]:
    """Names and probabilities of the most probable classes, in order."""
    order = np.argsort(-self.probabilities, kind='stable')[:number]
    return [(self.classes[i], float(self.probabilities[i])) for i in order]

  def __str__(self) -> str:
    return said_of(self.top())

  def __repr__(self) -> str:
    return f'<ClassPrediction: {self}>'


def said_of(top: Sequence[tuple[str, float]]) -> str:
  """Classes and their probabilities in words: 'cat 98.0 %, dog 2.0 %'."""
  return ', '.join(f'{name} {percent(share, 1)} %' for name, share in top)


def check_opacity(opacity: float) -> None:
  if not 0 <= opacity <= 1:
    raise UserError(
      f'opacity is {opacity}; it must be from 0 (invisible) to 1.'
    )
