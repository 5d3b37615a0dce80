"""Boundary IoU against its definition, class by class, and by hand."""

import types

import cv2
import numpy as np
import pytest

from resnest_jax.evaluation import boundary

CLASSES = 6


def blobs(seed, height, width):
  """A label map of smooth areas, with a few ignored ones."""
  rng = np.random.default_rng(seed)
  fields = rng.standard_normal((height, width, CLASSES)).astype(np.float32)
  classes = cv2.GaussianBlur(fields, (0, 0), 4).argmax(-1).astype(np.uint8)
  classes[cv2.GaussianBlur(fields[..., 0], (0, 0), 3) > 0.09] = 255
  return classes


def twin_counts(prediction, label, ratio):
  """As the paper defines it: every mask eroded on its own, step by step."""
  height, width = label.shape
  steps = max(1, round(ratio * np.sqrt(height**2 + width**2)))

  def outline(mask):
    eroded = np.pad(mask, 1)
    for _ in range(steps):
      windows = np.lib.stride_tricks.sliding_window_view(eroded, (3, 3))
      eroded = np.pad(windows.all((2, 3)), 1)
    return mask & ~eroded[1:-1, 1:-1]

  counts = []
  for k in range(CLASSES):
    theirs = outline(label == k)
    ours = outline((prediction == k) & (label != 255))
    counts.append([(theirs & ours).sum(), (theirs | ours).sum()])
  return np.transpose(counts)


@pytest.mark.parametrize(
  ('height', 'width', 'ratio'),
  [(80, 120, 0.02), (61, 37, 0.05), (200, 9, 0.02), (1, 1, 0.02)],
)
def test_counts_equal_the_definition(height, width, ratio):
  prediction = blobs(0, height, width)
  prediction[prediction == 255] = CLASSES - 1
  label = blobs(1, height, width)
  moved = np.where(label == 255, label, np.roll(prediction, 2, 1))
  label[: height // 2] = moved[: height // 2]
  counts = boundary.boundary_counts(prediction, label, CLASSES, ratio)
  np.testing.assert_array_equal(counts, twin_counts(prediction, label, ratio))
  assert counts.dtype == np.int64


def test_by_hand():
  # 10 x 10 pixels: a diagonal of 14, so that the boundary is one pixel wide.
  label = np.zeros((10, 10), np.uint8)
  label[2:7, 2:7] = 1  # 25 pixels, 16 of them its boundary.
  prediction = np.zeros((10, 10), np.uint8)
  prediction[2:7, 2:8] = 1  # 30 pixels, 18 of them: one column more.
  counts = boundary.boundary_counts(prediction, label, 2)
  # The right columns differ; 3 of the boundary's inner pixels are not shared.
  assert counts[:, 1].tolist() == [13, 16 + 18 - 13]
  # Class 0: the image's border (36) and 7 x 7 - 5 x 5 = 24 around the square.
  assert boundary.boundary(label)[label == 0].sum() == 36 + 24
  assert boundary.boundary_width(1024, 2048) == 46


def result(prediction, label):
  return types.SimpleNamespace(prediction=prediction, label=label)


def test_many_images_are_summed_then_divided():
  pairs = [(blobs(i, 50, 70), blobs(i + 20, 50, 70)) for i in range(12)]
  for prediction, label in pairs:
    prediction[prediction >= 4] = 0
    label[label == 4] = 255
    label[label == 5] = 0
  with boundary.BoundaryIoU(CLASSES, threads=2) as counter:
    for pair in pairs:
      counter.add(result(*pair))
    scores = counter.scores()
  counts = sum(boundary.boundary_counts(*pair, CLASSES) for pair in pairs)
  assert (counts[1] > 0).tolist() == [True] * 4 + [False] * 2
  expected = [*counts[0][:4] / counts[1][:4], np.nan, np.nan]
  np.testing.assert_array_equal(scores.IoU, expected)
  assert scores.mIoU == pytest.approx(np.mean(expected[:4]), rel=1e-12)


def test_an_error_in_a_thread_is_not_lost():
  with boundary.BoundaryIoU(2) as counter:
    counter.add(result(np.zeros((2, 3)), np.zeros((2, 2))))
    with pytest.raises(ValueError, match='differ in shape'):
      counter.scores()
