"""The images with the lowest and the highest scores, found in one pass."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from resnest_jax.distributed import messages
from resnest_jax.evaluation.evaluate import ImageResult
from resnest_jax.evaluation.metrics import intersection_and_union, own_score


@dataclasses.dataclass(frozen=True)
class ScoredImage:
  """An image that is kept."""

  score: float
  index: int  # Position in the split; the order of equal scores.
  prediction: np.ndarray  # uint8 (H, W), classes.

  @property
  def rank(self) -> tuple[float, int]:
    """By which images are ordered; no two are equal."""
    return self.score, self.index


class Extremes:
  """Keeps the `number` worst and the `number` best of all images added.

  Never more than twice `number` predictions are held. What is kept does not
  depend on the order in which images come: their order is that of (score,
  index), and of one image too many it is the one in the middle that goes.
  """

  def __init__(self, number: int):
    self.number = number
    self._kept: list[ScoredImage] = []

  def add(self, image: ImageResult) -> None:
    """Ranks an image by its own mIoU."""
    score = own_score(intersection_and_union(image.confusion))
    self.rank(image.index, score, image.prediction)

  def rank(self, index: int, score: float, prediction: np.ndarray) -> None:
    """Ranks an image.

    Args:
      index: position in the split.
      score: the higher the better; an image with NaN is passed over.
      prediction: uint8 (H, W); copied if it is kept.
    """
    if not self.number or math.isnan(score):
      return
    full = len(self._kept) == 2 * self.number
    place = bisect.bisect(self._kept, (score, index), key=lambda x: x.rank)
    if full and place == self.number:
      return
    image = ScoredImage(float(score), index, prediction.copy())
    self._kept.insert(place, image)
    if full:
      del self._kept[self.number]

  @classmethod
  def joined(cls, parts: Sequence['Extremes']) -> 'Extremes':
    """Ranks the images of all parts, which ask for the same number."""
    whole = cls(parts[0].number)
    for image in itertools.chain(*(part._kept for part in parts)):
      whole.rank(image.index, image.score, image.prediction)
    return whole

  def gather(self) -> None:
    """Ranks the images of all hosts."""
    self._kept = self.joined(messages.gather(lambda: self))._kept

  def both(self) -> dict[str, list[ScoredImage]]:
    """'worst' and 'best': at most `number` images each, that one first.

    No image is in both: of fewer than twice `number` they get half each.
    """
    middle = (len(self._kept) + 1) // 2
    return {'worst': self._kept[:middle], 'best': self._kept[middle:][::-1]}
