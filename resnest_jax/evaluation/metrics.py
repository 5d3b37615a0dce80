"""Scores of a segmentation, from a confusion matrix of int64 counts (NumPy).

Rows are the ground truth, columns the prediction; scores are fractions. Names
and definitions are those of mmsegmentation's `IoUMetric`: a class that is
predicted but absent from the ground truth has IoU 0 and takes part in the mean;
a class that is in neither is NaN and does not.
"""

import dataclasses

import numpy as np

from resnest_jax.labels import IGNORE


@dataclasses.dataclass(frozen=True)
class Scores:
  """Per-class scores, float64 (C,), NaN where undefined, and their means."""

  IoU: np.ndarray
  Acc: np.ndarray  # Equal to Recall.
  # With beta 1 these two differ only where precision and recall are both 0:
  # Dice is then 0, and Fscore, their harmonic mean, is NaN.
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
  aAcc: float  # Share of all labelled pixels that are right.
  num_averaged: int  # Classes whose IoU is defined: the denominator of mIoU.

  @property
  def mIoU_all_classes(self) -> float:
    """As PyTorch-Encoding counts: the IoU of a class without pixels is 0."""
    return float(np.nan_to_num(self.IoU).mean())

  def summary(self) -> dict[str, float]:
    """The three numbers of results tables, under their usual names."""
    return {'mIoU': self.mIoU, 'mAcc': self.mAcc, 'aAcc': self.aAcc}


PER_CLASS = ('IoU', 'Acc', 'Dice', 'Fscore', 'Precision', 'Recall')


def confusion_matrix(
  prediction: np.ndarray,
  label: np.ndarray,
  num_classes: int,
  ignore: int = IGNORE,
) -> np.ndarray:
  """Counts pixels by (ground truth, prediction): int64 (C, C).

  Both are integers in [0, num_classes), of any shape. Labels may be `ignore`,
  which is not counted, and there the prediction is not read. Raises
  `ValueError` where shapes differ or a value is out of range.
  """
  prediction, label = np.asarray(prediction), np.asarray(label)
  check_shapes(prediction, label)
  counted = label != ignore
  # Wide enough for row * C + column: uint8 would wrap beyond 16 classes.
  rows = label[counted].astype(np.int64)
  columns = prediction[counted].astype(np.int64)
  # A value out of range would be counted in the bin of another pair.
  for what, values in (('label', rows), ('prediction', columns)):
    if values.size and not 0 <= values.min() <= values.max() < num_classes:
      raise ValueError(
        f'{what} values span {values.min()}..{values.max()}; accepted are '
        f'0..{num_classes - 1}, and {ignore} (ignored) in labels'
      )
  counts = np.bincount(rows * num_classes + columns, minlength=num_classes**2)
  return counts.astype(np.int64).reshape(num_classes, num_classes)


def check_shapes(prediction: np.ndarray, label: np.ndarray) -> None:
  """Raises `ValueError` if the two differ in shape."""
  if prediction.shape != label.shape:
    raise ValueError(
      f'prediction {prediction.shape} and label {label.shape} differ in shape'
    )


def intersection_and_union(confusion: np.ndarray) -> np.ndarray:
  """Numerators and denominators of IoU: (..., C, C) -> int64 (..., 2, C)."""
  confusion = np.asarray(confusion, np.int64)
  right = np.diagonal(confusion, axis1=-2, axis2=-1)
  union = confusion.sum(-1) + confusion.sum(-2) - right
  return np.stack([right, union], axis=-2)


def scores(confusion: np.ndarray, beta: float = 1.0) -> Scores:
  """All scores of (C, C) integer counts; NaN if no pixel was counted.

  `beta`, above 0, is the weight of recall against precision in `Fscore`.
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
  )


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  """The quotient in float64; 0 / 0 is NaN, without a warning."""
  with np.errstate(divide='ignore', invalid='ignore'):
    return np.asarray(numerator / np.asarray(denominator, np.float64))


def nanmean(values: np.ndarray) -> float:
  """The mean of the values that are not NaN; NaN if there are none."""
  # `np.nanmean` would warn if there are none.
  defined = values[~np.isnan(values)]
  return float(defined.mean()) if defined.size else float('nan')


def own_score(counts: np.ndarray) -> float:
  """mIoU of one image, over the classes in its labels or its prediction.

  Of its `intersection_and_union`; NaN if all are 0.
  """
  return nanmean(ratio(*counts))
