"""Boundary IoU: how well the outlines fit, whatever the size of the areas.

Cheng et al., Boundary IoU: Improving Object-Centric Image Segmentation
Evaluation, CVPR 2021. The boundary of a class is the part of its mask within d
pixels of anything else, the image's border included; d is 2 % of the diagonal.
As in mIoU, pixels are summed over all images before the division.
"""

import collections
import contextlib
import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np

from resnest_jax.distributed import messages
from resnest_jax.evaluation.metrics import check_shapes, nanmean, ratio
from resnest_jax.evaluation.segmentation import ImageResult
from resnest_jax.labels import IGNORE
from resnest_jax.threads import thread_count

DILATION_RATIO = 0.02  # The paper's share of the image's diagonal.


@dataclasses.dataclass(frozen=True)
class BoundaryScores:
  """Boundary IoU, fractions."""

  IoU: np.ndarray  # float64 (C,); NaN: neither labelled nor predicted.
  mIoU: float  # Mean over the classes where it is defined.


def boundary_width(height: int, width: int) -> int:
  """The boundary's width d in pixels, at least 1."""
  return max(1, round(DILATION_RATIO * float(np.hypot(height, width))))


def boundary(label_map: np.ndarray) -> np.ndarray:
  """Which pixels of a uint8 (H, W) map lie on the boundary of their class.

  True where another value or the image's border is at most `boundary_width`
  away, in rows and in columns.
  """
  d = boundary_width(*label_map.shape)
  # The authors erode the mask of each class. This takes the same time for any
  # number of classes: the (2d + 1)-square around a pixel holds a single class
  # if and only if the smallest and the largest label in it are equal.
  square = np.ones((3, 3), np.uint8)
  smallest = cv2.erode(label_map, square, iterations=d)
  largest = cv2.dilate(label_map, square, iterations=d)
  found = smallest != largest
  # OpenCV ignores pixels outside the image, but the paper counts them as
  # something else. A small image may be all boundary: the slices then overlap.
  for edge in (found[:d], found[-d:], found[:, :d], found[:, -d:]):
    edge[...] = True
  return found


def boundary_counts(
  prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> np.ndarray:
  """Boundary pixels of each class in one image.

  `prediction` and `label` are uint8 (H, W), of up to 255 classes; where the
  label is 255, the prediction is not read. Returns int64 (2, C): pixels on both
  boundaries of a class, and on either.
  """
  check_shapes(prediction, label)
  # The edge of an ignored region is an outline in both maps.
  prediction = np.where(label == IGNORE, np.uint8(IGNORE), prediction)
  # Label maps of the boundaries, with 255 off them.
  theirs, ours = (
    np.where(boundary(x), x, np.uint8(IGNORE)) for x in (label, prediction)
  )
  both, theirs, ours = (
    np.bincount(x.ravel(), minlength=IGNORE + 1)[:num_classes]
    for x in (theirs[theirs == ours], theirs, ours)
  )
  return np.stack([both, theirs + ours - both]).astype(np.int64)


class BoundaryIoU(contextlib.AbstractContextManager):
  """Sums the counts of many images, in threads, while the device computes.

  A context, in which `add` gets every `ImageResult` and `scores` is called.
  """

  def __init__(self, num_classes: int):
    self.counts = np.zeros((2, num_classes), np.int64)
    self._threads = thread_count()
    self._pool = ThreadPoolExecutor(self._threads)
    self._waiting: collections.deque[Future] = collections.deque()

  def add(self, image: ImageResult) -> None:
    """Counts an image, in another thread: its arrays must not change."""
    # Bounds memory: a waiting image keeps the arrays of its whole batch alive.
    self._collect(2 * self._threads)
    pair, classes = (image.prediction, image.label), self.counts.shape[1]
    self._waiting.append(self._pool.submit(boundary_counts, *pair, classes))

  def _collect(self, most_waiting: int) -> None:
    while len(self._waiting) > most_waiting:
      self.counts += self._waiting.popleft().result()

  def total(self) -> np.ndarray:
    """The counts of all images so far, int64 (2, C)."""
    self._collect(0)
    return self.counts

  def gather(self) -> None:
    """Adds up the counts of all hosts; all of them have to call it."""
    # `total` runs inside `gather`: a thread's error reaches the other hosts.
    self.counts = sum(messages.gather(self.total))

  def scores(self) -> BoundaryScores:
    """The scores of all images so far."""
    iou = ratio(*self.total())
    return BoundaryScores(iou, nanmean(iou))

  def __exit__(self, *_) -> None:
    self._pool.shutdown(cancel_futures=True)
