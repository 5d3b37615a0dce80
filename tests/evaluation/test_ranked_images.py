"""Which images are kept, against sorting all of them."""

import numpy as np
import pytest

from resnest_jax.evaluation.ranked_images import Extremes


def kept(extremes):
  return {
    kind: [image.index for image in images]
    for kind, images in extremes.both().items()
  }


@pytest.mark.parametrize('number', [1, 3])
@pytest.mark.parametrize('images', [0, 1, 2, 3, 5, 6, 7, 40])
def test_any_order_keeps_what_sorting_all_would(number, images):
  rng = np.random.default_rng(images)
  scores = rng.integers(0, 5, images) / 4  # Many are equal.
  ranked = sorted(range(images), key=lambda i: (scores[i], i))
  worst = ranked[: min(number, (images + 1) // 2)]
  best = ranked[::-1][: min(number, images // 2)]
  for _ in range(4):
    extremes = Extremes(number)
    for index in rng.permutation(images):
      extremes.rank(int(index), scores[index], np.full((2, 3), index, np.uint8))
      assert sum(map(len, extremes.both().values())) <= 2 * number
    assert kept(extremes) == {'worst': worst, 'best': best}
    for image in (*extremes.both()['worst'], *extremes.both()['best']):
      assert image.score == scores[image.index]
      assert (image.prediction == image.index).all()


@pytest.mark.parametrize('images', [1, 4, 5, 30])
def test_parts_join_to_what_one_would_keep(images):
  parts, whole = [Extremes(2) for _ in range(3)], Extremes(2)
  for index, score in enumerate(np.random.default_rng(images).random(images)):
    for extremes in (whole, parts[index % 3]):
      extremes.rank(index, score, np.zeros((1, 1), np.uint8))
  assert kept(Extremes.joined(parts)) == kept(whole)


def test_prediction_outlives_the_batch_that_it_came_in():
  extremes = Extremes(1)
  batch = np.full((1, 4, 4), 7, np.uint8)
  extremes.rank(0, 0.5, batch[0, :2, :3])
  batch[:] = 9
  (image,) = extremes.both()['worst']
  assert image.prediction.tolist() == [[7, 7, 7], [7, 7, 7]]


@pytest.mark.parametrize(('number', 'score'), [(2, float('nan')), (0, 0.5)])
def test_images_without_a_score_and_none_asked_for(number, score):
  extremes = Extremes(number)
  extremes.rank(0, score, np.zeros((1, 1), np.uint8))
  assert kept(extremes) == {'worst': [], 'best': []}
