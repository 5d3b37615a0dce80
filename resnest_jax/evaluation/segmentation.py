"""What is counted of a segmentor: pixels, by class and by predicted class."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from resnest_jax.errors import UserError
from resnest_jax.evaluation import metrics
from resnest_jax.inference.steps import Batch, filled
from resnest_jax.labels import IGNORE


@dataclasses.dataclass(frozen=True)
class ImageResult:
  index: int  # Position in the split.
  name: str
  # Views of a batch, at the original size: copy what has to outlast it.
  prediction: np.ndarray | None  # uint8 (H, W), classes.
  label: np.ndarray  # uint8 (H, W), classes or 255.
  confusion: np.ndarray  # int64 (C, C), rows = ground truth.
  loss: float = 0.0  # Summed cross entropy, if asked for.
  measured: np.ndarray | float = 0.0  # float64, summed over rows; likewise.


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Counts and scores of a split, the same on every host."""

  confusion: np.ndarray  # int64 (C, C), rows = ground truth.
  scores: metrics.Scores
  num_images: int
  seconds: float  # Wall time, compilation included.
  # int64 (num_images, 2, C): each image's intersection and union.
  image_counts: np.ndarray
  names: Sequence[str] = ()  # Of the images, by position in the split.
  # Position in the split -> uint8 (H, W), for the images that are kept.
  predictions: Mapping[int, np.ndarray] = dataclasses.field(
    default_factory=dict
  )
  loss: float = 0.0  # Mean cross entropy of the labelled pixels, if asked for.
  measured: np.ndarray | float = 0.0  # Summed over images, likewise.


class Segmentation:
  """The task of `evaluate` for a segmentor."""

  def __init__(
    self,
    class_names: Sequence[str],
    fscore_beta: float = 1.0,
    with_maps: bool = True,
  ):
    """Without `with_maps` label maps stay on the devices."""
    self._beta = fscore_beta
    self._with_maps = with_maps
    # The confusion of the images that were counted.
    self.total = np.zeros((len(class_names), len(class_names)), np.int64)

  def read(self, batch: Batch, outputs: Sequence[Any]) -> Iterator[ImageResult]:
    """Waits for the device; yields the result of each image."""
    maps, counts, *more = outputs
    # Sums over a split may not fit in int32.
    counts = np.asarray(counts).astype(np.int64)
    losses, *measured = map(np.asarray, more or [np.zeros(len(counts))])
    maps = np.asarray(maps) if self._with_maps else None
    for slot, index in filled(batch):
      _check_counts(counts[slot], batch, slot)
      inside = slot, *map(slice, batch['label_size'][slot])
      yield ImageResult(
        index,
        batch['name'][slot],
        None if maps is None else maps[inside],
        batch['label'][inside],
        counts[slot],
        float(losses[slot]),
        # Float32 would lose digits over millions of pixels.
        *(rows[slot].sum(0, np.float64) for rows in measured),
      )

  def count(self, image: ImageResult) -> tuple[np.ndarray, float, Any]:
    """Counts an image; returns what is kept of it."""
    self.total += image.confusion
    counts = metrics.intersection_and_union(image.confusion)
    return counts, image.loss, image.measured

  def join(
    self,
    totals: Sequence[np.ndarray],
    counts: Sequence[tuple[np.ndarray, float, Any]],
    names: Sequence[str],
    seconds: float,
  ) -> Evaluation:
    """Adds up what the processes have counted; images by their position."""
    confusion, number = sum(totals), len(counts)
    image_counts = [each for each, *_ in counts]
    return Evaluation(
      confusion,
      metrics.scores(confusion, self._beta),
      number,
      seconds,
      np.reshape(image_counts, (number, 2, len(self.total))),
      names,
      loss=math.fsum(loss for _, loss, _ in counts) / max(confusion.sum(), 1),
      measured=sum(measured for *_, measured in counts),
    )


def _check_counts(counts: np.ndarray, batch: Batch, slot: int) -> None:
  # `count_confusion` drops labels that are no class: those of another data set
  # would pass as ignored pixels.
  label = batch['label'][slot]
  labelled = np.count_nonzero(label != IGNORE)
  if counts.sum() != labelled:
    raise UserError(
      f'{labelled - counts.sum()} of {labelled} labelled pixels of '
      f'{batch["name"][slot]} have no class: its labels go up to '
      f'{label[label != IGNORE].max()}; accepted are '
      f'0..{len(counts) - 1} and {IGNORE} (ignored). Prepare the data '
      'set again.'
    )
