"""Scores of a segmentation, from integer counts (NumPy).

Everything is computed from one confusion matrix of int64 counts: rows are the
ground truth, columns the prediction. The definitions are mmsegmentation's
(`IoUMetric`), also where they surprise: a class that is predicted somewhere but
is nowhere in the ground truth has IoU 0 and takes part in the mean; a class
that is in neither has NaN and does not. Scores are fractions, not percent.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from resnest_jax.labels import IGNORE


@dataclasses.dataclass(frozen=True)
class Scores:
  """Per-class scores, float64 (C,), NaN where undefined, and their means.

  Names are mmsegmentation's. With beta 1 `Dice` and `Fscore` are one number
  written two ways; they differ only where `Fscore`, the harmonic mean of
  precision and recall, divides by zero (NaN).
  """

  IoU: np.ndarray
  Acc: np.ndarray  # Equal to Recall.
  Dice: np.ndarray
  Fscore: np.ndarray
  Precision: np.ndarray
  Recall: np.ndarray
  mIoU: float  # Means over the classes where the score is defined.
  mAcc: float
  mDice: float
  mFscore: float
  mPrecision: float
  mRecall: float
  aAcc: float  # The share of all labelled pixels that is right.
  num_averaged: int  # Classes whose IoU is defined: the denominator of mIoU.
  absent: tuple[str, ...]  # Classes without a single ground-truth pixel.

  def summary(self) -> dict[str, float]:
    """The three numbers of every results table, under their usual names."""
    return {'mIoU': self.mIoU, 'mAcc': self.mAcc, 'aAcc': self.aAcc}


PER_CLASS = ('IoU', 'Acc', 'Dice', 'Fscore', 'Precision', 'Recall')


def confusion_matrix(
  prediction: np.ndarray,
  label: np.ndarray,
  num_classes: int,
  ignore: int = IGNORE,
) -> np.ndarray:
  """Counts pixels by (ground truth, prediction).

  Args:
    prediction: integers in [0, num_classes), any shape. Where the label is
      ignored, anything may stand here.
    label: integers of the same shape, in [0, num_classes) or `ignore`.
    num_classes: C.
    ignore: the label of pixels that are not counted.

  Returns:
    int64 (C, C), rows = ground truth, columns = prediction.

  Raises:
    ValueError: shapes differ, or a value is out of range.
  """
  prediction, label = np.asarray(prediction), np.asarray(label)
  if prediction.shape != label.shape:
    raise ValueError(
      f'prediction {prediction.shape} and label {label.shape} differ in shape'
    )
  counted = label != ignore
  rows = label[counted].astype(np.int64)
  columns = prediction[counted].astype(np.int64)
  for what, values in (('label', rows), ('prediction', columns)):
    if values.size and not 0 <= values.min() <= values.max() < num_classes:
      raise ValueError(
        f'{what} values span {values.min()}..{values.max()}; accepted are '
        f'0..{num_classes - 1}, and {ignore} (ignored) in labels'
      )
  counts = np.bincount(rows * num_classes + columns, minlength=num_classes**2)
  return counts.astype(np.int64).reshape(num_classes, num_classes)


def intersection_and_union(confusion: np.ndarray) -> np.ndarray:
  """Pixels in both, and in either, of ground truth and prediction.

  Args:
    confusion: (..., C, C) integer counts, rows = ground truth.

  Returns:
    int64 (..., 2, C): the numerators of IoU, and its denominators. Those of
    several images may be summed.
  """
  confusion = np.asarray(confusion, np.int64)
  right = np.diagonal(confusion, axis1=-2, axis2=-1)
  union = confusion.sum(-1) + confusion.sum(-2) - right
  return np.stack([right, union], axis=-2)


def scores(
  confusion: np.ndarray,
  class_names: Sequence[str] | None = None,
  beta: float = 1.0,
) -> Scores:
  """Scores of a confusion matrix.

  Args:
    confusion: (C, C) integer counts, rows = ground truth.
    class_names: C names, for `Scores.absent`; '0', '1', ... when not given.
    beta: how many times as much as precision recall counts in `Fscore`, > 0.

  Returns:
    `Scores`; with no counted pixel at all, every number is NaN.
  """
  confusion = np.asarray(confusion)
  num_classes = len(confusion)
  if confusion.shape != (num_classes, num_classes) or not np.issubdtype(
    confusion.dtype, np.integer
  ):
    raise ValueError(
      'a confusion matrix is a square array of integer counts, got '
      f'{confusion.shape} {confusion.dtype}'
    )
  if class_names is None:
    class_names = [str(i) for i in range(num_classes)]
  if len(class_names) != num_classes:
    raise ValueError(
      f'{len(class_names)} class names for {num_classes} classes'
    )
  confusion = confusion.astype(np.int64)
  right = np.diagonal(confusion)
  labelled, predicted = confusion.sum(1), confusion.sum(0)
  precision, recall = ratio(right, predicted), ratio(right, labelled)
  per_class = {
    'IoU': ratio(*intersection_and_union(confusion)),
    'Acc': recall,
    'Dice': ratio(2 * right, labelled + predicted),
    'Fscore': ratio(
      (1 + beta**2) * precision * recall, beta**2 * precision + recall
    ),
    'Precision': precision,
    'Recall': recall,
  }
  return Scores(
    **per_class,
    **{f'm{name}': nanmean(values) for name, values in per_class.items()},
    aAcc=float(ratio(right.sum(), confusion.sum())),
    num_averaged=int(np.count_nonzero(~np.isnan(per_class['IoU']))),
    absent=tuple(
      name
      for name, count in zip(class_names, labelled, strict=True)
      if count == 0
    ),
  )


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  """Their quotient; 0 / 0 is NaN, without a warning."""
  with np.errstate(divide='ignore', invalid='ignore'):
    return np.asarray(numerator / np.asarray(denominator, np.float64))


def nanmean(values: np.ndarray) -> float:
  """The mean of what is defined; NaN, without a warning, if nothing is."""
  defined = values[~np.isnan(values)]
  return float(defined.mean()) if defined.size else float('nan')


def own_score(counts: np.ndarray) -> float:
  """An image's own mIoU, over the classes that it has or was given.

  Args:
    counts: int64 (2, C), see `intersection_and_union`.

  Returns:
    A fraction, NaN for an image without a labelled pixel.
  """
  return nanmean(ratio(*counts))
