"""Metrics against mmsegmentation's stored numbers and against hand counts."""

import numpy as np
import pytest
from golden import reference

from resnest_jax.evaluation import metrics


def test_scores_equal_mmsegmentation():
  golden = reference.load('metric_a')
  confusion = sum(
    metrics.confusion_matrix(
      golden[f'pred{i}'], golden[f'gt{i}'], int(golden['k'])
    )
    for i in range(int(golden['n']))
  )
  assert confusion.dtype == np.int64
  scores = metrics.scores(confusion)
  # The reference divides float32 counts; a float64 quotient of such integers
  # rounds to the same float32, bit for bit.
  for name in ('IoU', 'Acc', 'Dice', 'Precision', 'Recall', 'aAcc'):
    ours = np.float32(getattr(scores, name))
    np.testing.assert_array_equal(ours, np.float32(golden[name]), name)
  np.testing.assert_allclose(scores.Fscore, golden['Fscore'], rtol=3e-7, atol=0)
  for column in ('IoU', 'Acc'):
    expected = pytest.approx(np.nanmean(golden[column]), rel=1e-6)
    assert getattr(scores, f'm{column}') == expected
  # Class 18 is predicted but never labelled: IoU 0 counts, accuracy does not.
  assert (scores.num_averaged, scores.absent) == (19, ('18',))


def test_rows_are_ground_truth_and_ignored_pixels_do_not_count():
  label = np.array([[0, 0, 1], [2, 255, 255]], np.uint8)
  prediction = np.array([[0, 1, 1], [0, 2, 77]], np.uint8)
  np.testing.assert_array_equal(
    metrics.confusion_matrix(prediction, label, 3),
    [[1, 1, 0], [0, 1, 0], [1, 0, 0]],
  )


def test_hand_computed_scores():
  scores = metrics.scores(
    np.array([[3, 1, 0, 0], [1, 5, 0, 0], [0, 0, 0, 0], [0, 2, 0, 0]]),
    ['wall', 'sky', 'tree', 'road'],
  )
  for name, expected in (
    ('IoU', [3 / 5, 5 / 9, np.nan, 0]),
    ('Recall', [3 / 4, 5 / 6, np.nan, 0]),
    ('Precision', [3 / 4, 5 / 8, np.nan, np.nan]),
    ('Dice', [6 / 8, 10 / 14, np.nan, 0]),
  ):
    np.testing.assert_array_equal(getattr(scores, name), expected, name)
  assert (scores.num_averaged, scores.absent) == (3, ('tree',))
  assert scores.summary() == {
    'mIoU': pytest.approx((3 / 5 + 5 / 9) / 3),
    'mAcc': pytest.approx((3 / 4 + 5 / 6) / 3),
    'aAcc': pytest.approx(8 / 12),
  }


def test_beta_weighs_recall():
  confusion = np.array([[3, 1], [4, 8]])
  # By its other definition, in true and false positives and negatives of
  # class 0: 3, 4 and 1.
  for beta in (0.5, 1.0, 2.0):
    scores = metrics.scores(confusion, beta=beta)
    right = (1 + beta**2) * 3
    assert scores.Fscore[0] == pytest.approx(right / (right + beta**2 * 1 + 4))
  assert scores.mFscore == pytest.approx(scores.Fscore.mean())


def test_counts_beyond_32_bits_are_kept():
  big = 2**40 + 1
  scores = metrics.scores(np.array([[big, 1], [0, 1]], np.int64))
  assert scores.IoU[0] == big / (big + 1)


def test_nothing_counted_gives_nan():
  scores = metrics.scores(np.zeros((2, 2), np.int64), ['a', 'b'])
  assert np.isnan([scores.mIoU, scores.mAcc, scores.aAcc]).all()
  assert scores.absent == ('a', 'b')


def test_wrong_arrays_are_refused():
  for prediction, label, message in (
    ([0, 1], [0, 3], 'label values span 0..3; accepted are 0..2'),
    ([0, -1], [0, 1], 'prediction values span -1..0'),
    ([0], [0, 1], 'differ in shape'),
  ):
    with pytest.raises(ValueError, match=message):
      metrics.confusion_matrix(np.array(prediction), np.array(label), 3)
  with pytest.raises(ValueError, match='square array of integer counts'):
    metrics.scores(np.eye(3))
  with pytest.raises(ValueError, match='2 class names for 3 classes'):
    metrics.scores(np.eye(3, dtype=np.int64), ['a', 'b'])
