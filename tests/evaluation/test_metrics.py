"""Metrics, their interval, Boundary IoU and ranks, by hand and by twins."""

import types

import numpy as np
import pytest
from data.pictures import blocks
from golden import reference
from scipy.ndimage import binary_erosion

from resnest_jax.distributed import messages
from resnest_jax.evaluation import bootstrap, boundary, metrics, ranked_images


def test_scores_equal_mmsegmentation():
  golden = reference.load('metric_a')
  pairs = [(golden[f'pred{i}'], golden[f'gt{i}']) for i in range(golden['n'])]
  classes = int(golden['k'])
  confusion = sum(metrics.confusion_matrix(*pair, classes) for pair in pairs)
  assert confusion.dtype == np.int64
  scores = metrics.scores(confusion)
  # The reference divides float32 counts; a float64 quotient of such integers
  # rounds to the same float32, bit for bit.
  for name in ('IoU', 'Acc', 'Dice', 'Precision', 'Recall', 'aAcc'):
    ours = np.float32(getattr(scores, name))
    np.testing.assert_array_equal(ours, np.float32(golden[name]), name)
  np.testing.assert_allclose(scores.Fscore, golden['Fscore'], rtol=3e-7, atol=0)
  means = [np.nanmean(golden[column]) for column in ('IoU', 'Acc')]
  assert [scores.mIoU, scores.mAcc] == pytest.approx(means, rel=1e-6)
  # Class 18 is predicted but never labelled: IoU 0 counts, accuracy does not.
  assert scores.num_averaged == 19


def test_mean_over_all_classes_is_pytorch_encodings():
  golden = reference.load('encoding_metric_a')
  classes = int(golden['k'])
  confusion = sum(
    metrics.confusion_matrix(
      golden[f'pred{i}'], golden[f'gt{i}'], classes, ignore=-1
    )
    for i in range(golden['n'])
  )
  counts = metrics.intersection_and_union(confusion)
  np.testing.assert_array_equal(counts, [golden['inter'], golden['union']])
  scores = metrics.scores(confusion)
  ours = scores.mIoU_all_classes, scores.aAcc, scores.mIoU
  theirs = [golden[x] for x in ('mIoU', 'pixAcc', 'mIoU_of_present')]
  np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def count(prediction, label):
  return metrics.confusion_matrix(np.array(prediction), np.array(label), 3)


def test_rows_are_ground_truth_and_ignored_pixels_do_not_count():
  counts = count([[0, 1, 1], [0, 2, 77]], [[0, 0, 1], [2, 255, 255]])
  assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_hand_computed_scores():
  counts = [[3, 1, 0, 0], [1, 5, 0, 0], [0, 0, 0, 0], [0, 2, 0, 0]]
  scores = metrics.scores(np.array(counts))
  for name, expected in (
    ('IoU', [3 / 5, 5 / 9, np.nan, 0]),
    ('Recall', [3 / 4, 5 / 6, np.nan, 0]),
    ('Precision', [3 / 4, 5 / 8, np.nan, np.nan]),
    ('Dice', [6 / 8, 10 / 14, np.nan, 0]),
  ):
    np.testing.assert_array_equal(getattr(scores, name), expected, name)
  assert scores.num_averaged == 3
  means = {'mIoU': (3 / 5 + 5 / 9) / 3, 'mAcc': (3 / 4 + 5 / 6) / 3}
  assert scores.summary() == pytest.approx(means | {'aAcc': 8 / 12})


def test_beta_weighs_recall():
  # By its other definition, in true and false positives and negatives of
  # class 0: 3, 4 and 1.
  for beta in (0.5, 1.0, 2.0):
    scores = metrics.scores(np.array([[3, 1], [4, 8]]), beta=beta)
    right = (1 + beta**2) * 3
    assert scores.Fscore[0] == pytest.approx(right / (right + beta**2 * 1 + 4))
  assert scores.mFscore == pytest.approx(scores.Fscore.mean())


def test_counts_beyond_32_bits_are_kept():
  scores = metrics.scores(np.array([[2**40 + 1, 1], [0, 1]]))
  assert scores.IoU[0] == (2**40 + 1) / (2**40 + 2)


def test_nothing_counted_gives_nan():
  scores = metrics.scores(np.zeros((2, 2), np.int64))
  assert np.isnan([scores.mIoU, scores.mAcc, scores.aAcc]).all()


def test_wrong_arrays_are_refused():
  for told, function, *given in (
    ('label values span 0..3; accepted are 0..2', count, [0, 1], [0, 3]),
    ('prediction values span -1..0', count, [0, -1], [0, 1]),
    ('differ in shape', count, [0], [0, 1]),
    ('square array of integer counts', metrics.scores, np.eye(3)),
  ):
    with pytest.raises(ValueError, match=told):
      function(*given)


# --- The interval ------------------------------------------------------------


def random_counts(images, classes):
  rng = np.random.default_rng(0)
  union = rng.integers(0, 900, (images, classes))
  union[rng.random(union.shape) < 0.6] = 0  # Most classes in few images.
  return np.stack([rng.binomial(union, 0.7), union], axis=1)


def test_interval_equals_a_loop_over_resamples_and_images():
  counts, rng = random_counts(9, 5), np.random.default_rng(3)
  means = []
  for _ in range(50):
    total = sum(counts[image] for image in rng.integers(9, size=9))
    means.append(np.nanmean(metrics.ratio(*total)))
  bounds = np.percentile(means, (10, 90))
  interval = bootstrap.miou_interval(counts, resamples=50, seed=3, level=0.8)
  low, high, *rest = interval.values()
  assert [low, high] == pytest.approx(bounds, rel=1e-12)
  assert rest == [0.8, 50, 3]


def test_interval_is_deterministic_and_does_not_depend_on_chunks(monkeypatch):
  counts = random_counts(40, 7)
  interval = bootstrap.miou_interval(counts)
  assert bootstrap.miou_interval(counts) == interval
  # As wholes they would always differ: the seed is a field.
  assert bootstrap.miou_interval(counts, seed=1)['low'] != interval['low']
  monkeypatch.setattr(bootstrap, 'MOST_DRAWS', 40 * 7)
  assert bootstrap.miou_interval(counts) == interval


def test_images_that_do_not_differ_leave_no_doubt():
  for counts, bound in (
    (np.tile([[[30, 0], [40, 0]]], (6, 1, 1)), 0.75),
    (np.zeros((0, 2, 4), int), np.nan),
    (np.zeros((3, 2, 4), int), np.nan),
  ):
    interval = bootstrap.miou_interval(counts, resamples=20)
    np.testing.assert_array_equal([*interval.values()][:2], bound)


# --- Boundary IoU ------------------------------------------------------------

CLASSES = 6


def areas(seed, height, width):
  rng = np.random.default_rng(seed)
  return blocks(rng, height, width, CLASSES, cell=9, ignored=0.003)


def twin_counts(prediction, label, ratio):
  # As the paper defines it: every mask eroded on its own, step by step.
  steps = max(1, round(ratio * np.hypot(*label.shape)))
  counts, square = [], np.ones((3, 3))
  for k in range(CLASSES):
    masks = label == k, (prediction == k) & (label != 255)
    theirs, ours = (x & ~binary_erosion(x, square, steps) for x in masks)
    counts.append([(theirs & ours).sum(), (theirs | ours).sum()])
  return np.transpose(counts)


def test_boundary_counts_equal_the_definition(monkeypatch):
  shapes = (80, 120, 0.02), (61, 37, 0.05), (200, 9, 0.02), (1, 1, 0.02)
  for *size, ratio in shapes:
    prediction, label = areas(0, *size), areas(1, *size)
    prediction[prediction == 255] = CLASSES - 1
    moved = np.where(label == 255, label, np.roll(prediction, 2, 1))
    label[: size[0] // 2] = moved[: size[0] // 2]
    monkeypatch.setattr(boundary, 'DILATION_RATIO', ratio)
    counts = boundary.boundary_counts(prediction, label, CLASSES)
    np.testing.assert_array_equal(counts, twin_counts(prediction, label, ratio))
    assert counts.dtype == np.int64


def test_boundary_by_hand():
  # 10 x 10 pixels: a diagonal of 14, so that the boundary is one pixel wide.
  label, prediction = np.zeros((2, 10, 10), np.uint8)
  label[2:7, 2:7] = 1  # 25 pixels, 16 of them its boundary.
  prediction[2:7, 2:8] = 1  # 30 pixels, 18 of them: one column more.
  counts = boundary.boundary_counts(prediction, label, 2)
  # The right columns differ; 3 of the boundary's inner pixels are not shared.
  assert counts[:, 1].tolist() == [13, 16 + 18 - 13]
  # Class 0: the image's border (36) and 7 x 7 - 5 x 5 = 24 around the square.
  assert boundary.boundary(label)[label == 0].sum() == 36 + 24
  assert boundary.boundary_width(1024, 2048) == 46


def scores_of(pairs):
  with boundary.BoundaryIoU(CLASSES) as counter:
    for prediction, label in pairs:
      image = types.SimpleNamespace(prediction=prediction, label=label)
      counter.add(image)
    return counter.scores()


def test_many_images_are_summed_then_divided():
  pairs = [(areas(i, 50, 70), areas(i + 20, 50, 70)) for i in range(12)]
  for prediction, label in pairs:
    prediction[prediction >= 4] = 0
    label[label == 4] = 255
    label[label == 5] = 0
  scores = scores_of(pairs)
  counts = sum(boundary.boundary_counts(*pair, CLASSES) for pair in pairs)
  assert (counts[1] > 0).tolist() == [True] * 4 + [False] * 2
  expected = [*counts[0][:4] / counts[1][:4], np.nan, np.nan]
  np.testing.assert_array_equal(scores.IoU, expected)
  assert scores.mIoU == pytest.approx(np.mean(expected[:4]), rel=1e-12)


def test_an_error_in_a_thread_is_not_lost():
  with pytest.raises(ValueError, match='differ in shape'):
    scores_of([(np.zeros((2, 3)), np.zeros((2, 2)))])


# --- Ranks -------------------------------------------------------------------


def rank(ranked, index, score):
  ranked.rank(int(index), score, np.full((2, 3), index, np.uint8))


def kept(ranked):
  return {k: [x.index for x in images] for k, images in ranked.both().items()}


@pytest.mark.parametrize('number', [1, 2, 3])
@pytest.mark.parametrize('images', [0, 1, 2, 3, 4, 5, 6, 7, 40])
def test_any_order_on_any_hosts_keeps_what_sorting_all_would(
  number, images, monkeypatch
):
  rng = np.random.default_rng(images)
  scores = rng.integers(0, 5, images) / 4  # Many are equal.
  order = sorted(range(images), key=lambda i: (scores[i], i))
  worst = order[: min(number, (images + 1) // 2)]
  best = order[::-1][: min(number, images // 2)]
  for _ in range(4):
    ranked, *parts = [ranked_images.RankedImages(number) for _ in range(4)]
    for index in rng.permutation(images):
      rank(ranked, index, scores[index])
      rank(parts[index % 3], index, scores[index])
      assert sum(map(len, ranked.both().values())) <= 2 * number
    assert kept(ranked) == {'worst': worst, 'best': best}
    monkeypatch.setattr(
      messages, 'gather', lambda _, parts=parts: [x._kept for x in parts]
    )
    parts[1].gather()
    assert kept(parts[1]) == kept(ranked)
    for image in (*ranked.both()['worst'], *ranked.both()['best']):
      assert image.score == scores[image.index]
      assert (image.prediction == image.index).all()


def test_prediction_outlives_the_batch_that_it_came_in():
  ranked, batch = ranked_images.RankedImages(1), np.full((1, 4, 4), 7, np.uint8)
  ranked.rank(0, 0.5, batch[0, :2, :3])
  batch[:] = 9
  (image,) = ranked.both()['worst']
  assert image.prediction.tolist() == [[7, 7, 7], [7, 7, 7]]


@pytest.mark.parametrize(('number', 'score'), [(2, float('nan')), (0, 0.5)])
def test_images_without_a_score_and_none_asked_for(number, score):
  ranked = ranked_images.RankedImages(number)
  rank(ranked, 0, score)
  assert kept(ranked) == {'worst': [], 'best': []}
