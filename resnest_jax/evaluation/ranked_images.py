"""The images with the lowest and the highest mIoU, found in one pass."""

import bisect
import dataclasses
import itertools
import math
import operator

import numpy as np

from resnest_jax.distributed import messages
from resnest_jax.evaluation.metrics import intersection_and_union, own_score
from resnest_jax.evaluation.segmentation import ImageResult


@dataclasses.dataclass(frozen=True)
class ScoredImage:
  score: float
  index: int  # Position in the split; breaks ties between equal scores.
  prediction: np.ndarray  # uint8 (H, W), classes.


class RankedImages:
  """Keeps the `number` worst and the `number` best of all images added.

  The order in which images are added does not matter.
  """

  def __init__(self, number: int):
    self.number = number
    self._kept: list[ScoredImage] = []  # Sorted, worst first.

  def add(self, image: ImageResult) -> None:
    """Ranks an image of the split by its own mIoU."""
    score = own_score(intersection_and_union(image.confusion))
    self.rank(image.index, score, image.prediction)

  def rank(self, index: int, score: float, prediction: np.ndarray) -> None:
    """Keeps an image if its score is low or high enough; NaN never is."""
    if not self.number or math.isnan(score):
      return
    # A copy, because the prediction is a view that keeps its batch alive.
    image = ScoredImage(float(score), index, prediction.copy())
    order = operator.attrgetter('score', 'index')
    bisect.insort(self._kept, image, key=order)
    # Of 2 * number + 1 images the middle one can never be needed again.
    if len(self._kept) > 2 * self.number:
      del self._kept[self.number]

  def gather(self) -> None:
    """Ranks the images of all hosts; all of them have to call it."""
    parts, self._kept = messages.gather(lambda: self._kept), []
    for image in itertools.chain(*parts):
      self.rank(image.index, image.score, image.prediction)

  def both(self) -> dict[str, list[ScoredImage]]:
    """'worst' and 'best', each with at most `number` images, extreme first."""
    # No image is in both lists: a split that is too small is halved.
    middle = (len(self._kept) + 1) // 2
    return {'worst': self._kept[:middle], 'best': self._kept[middle:][::-1]}
