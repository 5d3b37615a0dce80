"""What is counted of a classifier: images whose class is among its guesses."""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from resnest_jax.errors import UserError
from resnest_jax.evaluation import metrics
from resnest_jax.evaluation.metrics import ratio
from resnest_jax.inference.steps import BEST, Batch, filled


@dataclasses.dataclass(frozen=True)
class ClassResult:
  """An image's class, and the classes that are most probable, in order."""

  index: int  # Position in the split.
  name: str
  label: int
  best: np.ndarray  # int32 (k,), k = min(BEST, classes).
  probabilities: np.ndarray  # Of these; float (k,).
  loss: float  # Cross entropy.
  measured: np.ndarray | float = 0.0  # float64, if asked for.


@dataclasses.dataclass(frozen=True)
class ClassScores:
  """Shares of images, 0 to 1; NaN where there are none."""

  top1: float  # Of those whose class is the most probable one.
  top5: float  # Of those whose class is among the five most probable.
  per_class: np.ndarray  # float64 (C,), top1 of each class' images.
  images: np.ndarray  # int64 (C,), of each class.

  def summary(self) -> dict[str, float]:
    """The numbers of results tables, under their usual names."""
    scores = {'top1': self.top1, 'top5': self.top5}
    if len(self.images) <= BEST:  # Five of five say nothing.
      del scores['top5']
    return scores


@dataclasses.dataclass(frozen=True)
class ClassEvaluation:
  """Guesses and scores of a split of n images, the same on every host."""

  scores: ClassScores
  num_images: int
  seconds: float  # Wall time, compilation included.
  names: Sequence[str]  # By position in the split, as the next three.
  labels: np.ndarray  # int (n,)
  best: np.ndarray  # int (n, k), most probable first.
  probabilities: np.ndarray  # float32 (n, k)
  loss: float  # Mean cross entropy of the images.
  measured: np.ndarray | float = 0.0  # Summed over images, if asked for.

  def mistakes(self) -> np.ndarray:
    """Positions of wrongly classified images, the surest guess first."""
    # Stable: equal probabilities keep their order on every machine.
    order = np.argsort(-self.probabilities[:, 0], kind='stable')
    return order[self.best[order, 0] != self.labels[order]]

  @property
  def confusion(self) -> np.ndarray:
    """Counts of images, int64 (C, C): class, and most probable class."""
    classes = len(self.scores.images)
    return metrics.confusion_matrix(self.best[:, 0], self.labels, classes, -1)


class Classification:
  """The task of `evaluate` for a classifier."""

  total = None  # All is kept by image.

  def __init__(self, class_names: Sequence[str]):
    self._names = class_names

  def read(self, batch: Batch, outputs: Sequence[Any]) -> Iterator[ClassResult]:
    """Waits for the device; yields the result of each image."""
    best, probabilities, losses, *measured = map(np.asarray, outputs)
    probabilities = np.take_along_axis(probabilities, best, 1)
    for slot, index in filled(batch):
      name, label = batch['name'][slot], int(batch['label'][slot])
      # A label of another data set would pass as a mistake.
      if not 0 <= label < len(self._names):
        raise UserError(
          f'{name} has the class number {label}; accepted are '
          f'0..{len(self._names) - 1}. Prepare the data set again.'
        )
      found = best[slot], probabilities[slot], float(losses[slot])
      sums = (rows[slot].sum(0, np.float64) for rows in measured)
      yield ClassResult(index, name, label, *found, *sums)

  def count(self, image: ClassResult) -> ClassResult:
    """Returns what is kept of an image."""
    return image

  def join(
    self,
    totals: Sequence[None],
    counts: Sequence[ClassResult],
    names: Sequence[str],
    seconds: float,
  ) -> ClassEvaluation:
    """Scores all images; `counts` and `names` are by their position."""
    del totals
    classes, number = len(self._names), len(counts)
    labels = np.array([x.label for x in counts])
    best = np.stack([x.best for x in counts])
    hits = best == labels[:, None]
    images = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[hits[:, 0]], minlength=classes)
    scores = ClassScores(
      top1=float(ratio(right.sum(), number)),
      top5=float(ratio(hits[:, :BEST].any(1).sum(), number)),
      per_class=ratio(right, images),
      images=images,
    )
    return ClassEvaluation(
      *(scores, number, seconds, names),
      *(labels, best, np.stack([x.probabilities for x in counts])),
      loss=math.fsum(x.loss for x in counts) / number,
      measured=sum(x.measured for x in counts),
    )


def wilson_interval(
  right: int, number: int, level: float = 0.95
) -> dict[str, Any]:
  """An interval of a share, as fractions: where it lies on other images.

  Wilson's score interval (Journal of the American Statistical Association 22,
  1927): images are independent, so that it needs no resampling.
  """
  z = statistics.NormalDist().inv_cdf((1 + level) / 2)
  share, extra = right / number, z * z / number
  middle = (share + extra / 2) / (1 + extra)
  half = z * math.sqrt((share * (1 - share) + extra / 4) / number) / (1 + extra)
  # Rounding leads out of them.
  low, high = max(middle - half, 0.0), min(middle + half, 1.0)
  return {'low': low, 'high': high, 'level': level, 'method': 'wilson'}
