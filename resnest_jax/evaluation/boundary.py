"""Boundary IoU: how well the outlines fit, whatever the size of the areas.

Cheng et al., Boundary IoU: Improving Object-Centric Image Segmentation
Evaluation, CVPR 2021. A class' boundary is the part of its mask that lies
within d pixels of something else, where d is 2 % of the image's diagonal: the
mask without its d-fold erosion by a 3x3 square. The border of the image counts
as something else. IoU is then taken of the two boundaries. As with mIoU the
pixels are summed over all images before they are divided. Ignored pixels
belong to no mask, neither of the ground truth nor of the prediction.

The authors erode each mask on its own. Here the label map is eroded once and
dilated once: a pixel's (2d + 1)-square holds nothing but its own class if and
only if the smallest and the largest class in it are equal. So the time does
not depend on the number of classes.
"""

import collections
import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np

from resnest_jax.distributed import messages
from resnest_jax.evaluation.evaluate import ImageResult
from resnest_jax.evaluation.metrics import nanmean, ratio
from resnest_jax.labels import IGNORE
from resnest_jax.threads import thread_count

DILATION_RATIO = 0.02  # Of the image's diagonal (the paper's).


@dataclasses.dataclass(frozen=True)
class BoundaryScores:
  """Boundary IoU, fractions."""

  IoU: np.ndarray  # float64 (C,); NaN: neither labelled nor predicted.
  mIoU: float  # Mean over the classes where it is defined.
  dilation_ratio: float


def boundary_width(
  height: int, width: int, dilation_ratio: float = DILATION_RATIO
) -> int:
  """How many pixels of a mask, from its outline inwards, are its boundary."""
  return max(1, round(dilation_ratio * float(np.hypot(height, width))))


def boundary(
  label_map: np.ndarray, dilation_ratio: float = DILATION_RATIO
) -> np.ndarray:
  """Which pixels lie on the boundary of their class.

  Args:
    label_map: uint8 (H, W).
    dilation_ratio: the boundary's width as a share of the diagonal.

  Returns:
    bool (H, W): true where another value, or the end of the image, is at most
    the boundary's width away (in rows and in columns).
  """
  d = boundary_width(*label_map.shape, dilation_ratio)
  square = np.ones((3, 3), np.uint8)
  smallest = cv2.erode(label_map, square, iterations=d)
  largest = cv2.dilate(label_map, square, iterations=d)
  found = smallest != largest
  for edge in (found[:d], found[-d:], found[:, :d], found[:, -d:]):
    edge[...] = True
  return found


def boundary_counts(
  prediction: np.ndarray,
  label: np.ndarray,
  num_classes: int,
  dilation_ratio: float = DILATION_RATIO,
) -> np.ndarray:
  """Boundary pixels of one image by class.

  Args:
    prediction: uint8 (H, W), classes; anything where the label is ignored.
    label: uint8 (H, W), classes or 255.
    num_classes: C, at most 255.
    dilation_ratio: see `boundary`.

  Returns:
    int64 (2, C): pixels on both boundaries of a class, and on either.
  """
  if prediction.shape != label.shape:
    raise ValueError(
      f'prediction {prediction.shape} and label {label.shape} differ in shape'
    )
  prediction = np.where(label == IGNORE, np.uint8(IGNORE), prediction)
  theirs, ours = (
    np.where(boundary(x, dilation_ratio), x, np.uint8(IGNORE))
    for x in (label, prediction)
  )
  both = theirs[theirs == ours]
  both, theirs, ours = (
    np.bincount(x.ravel(), minlength=IGNORE + 1)[:num_classes]
    for x in (both, theirs, ours)
  )
  return np.stack([both, theirs + ours - both]).astype(np.int64)


class BoundaryIoU:
  """Sums the counts of many images, in threads beside the device's work.

      with BoundaryIoU(num_classes) as counter:
        counter.add(image)  # Every `ImageResult`.
        scores = counter.scores()

  The order of the images does not matter. Few of them wait at a time, so that
  memory stays small: `add` blocks if the threads cannot follow.
  """

  def __init__(
    self,
    num_classes: int,
    dilation_ratio: float = DILATION_RATIO,
    threads: int = 0,
  ):
    self.dilation_ratio = dilation_ratio
    self.counts = np.zeros((2, num_classes), np.int64)
    self._threads = thread_count(threads)
    self._pool = ThreadPoolExecutor(self._threads)
    self._waiting: collections.deque[Future] = collections.deque()

  def add(self, image: ImageResult) -> None:
    """Counts an image, see `boundary_counts`; its arrays must not change."""
    while len(self._waiting) > 2 * self._threads:
      self.counts += self._waiting.popleft().result()
    num_classes = self.counts.shape[1]
    self._waiting.append(
      self._pool.submit(
        boundary_counts,
        image.prediction,
        image.label,
        num_classes,
        self.dilation_ratio,
      )
    )

  def total(self) -> np.ndarray:
    """The counts of all images that were added, int64 (2, C)."""
    while self._waiting:
      self.counts += self._waiting.popleft().result()
    return self.counts

  def gather(self) -> None:
    """Adds up the counts of all hosts."""
    self.counts = sum(messages.gather(self.total))

  def scores(self) -> BoundaryScores:
    """The scores of all images that were added."""
    iou = ratio(*self.total())
    return BoundaryScores(iou, nanmean(iou), self.dilation_ratio)

  def __enter__(self) -> 'BoundaryIoU':
    return self

  def __exit__(self, *_) -> None:
    self._pool.shutdown(cancel_futures=True)
