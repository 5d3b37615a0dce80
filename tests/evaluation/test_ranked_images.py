"""Which images are kept, against sorting all of them."""

import numpy as np
import pytest

from resnest_jax.evaluation.ranked_images import RankedImages


def kept(ranked):
  return {
    kind: [image.index for image in images]
    for kind, images in ranked.both().items()
  }


@pytest.mark.parametrize('number', [1, 3])
@pytest.mark.parametrize('images', [0, 1, 2, 3, 5, 6, 7, 40])
def test_any_order_keeps_what_sorting_all_would(number, images):
  rng = np.random.default_rng(images)
  scores = rng.integers(0, 5, images) / 4  # Many are equal.
  order = sorted(range(images), key=lambda i: (scores[i], i))
  worst = order[: min(number, (images + 1) // 2)]
  best = order[::-1][: min(number, images // 2)]
  for _ in range(4):
    ranked = RankedImages(number)
    for index in rng.permutation(images):
      ranked.rank(int(index), scores[index], np.full((2, 3), index, np.uint8))
      assert sum(map(len, ranked.both().values())) <= 2 * number
    assert kept(ranked) == {'worst': worst, 'best': best}
    for image in (*ranked.both()['worst'], *ranked.both()['best']):
      assert image.score == scores[image.index]
      assert (image.prediction == image.index).all()


@pytest.mark.parametrize('images', [1, 4, 5, 30])
def test_parts_join_to_what_one_would_keep(images):
  parts, whole = [RankedImages(2) for _ in range(3)], RankedImages(2)
  for index, score in enumerate(np.random.default_rng(images).random(images)):
    for ranked in (whole, parts[index % 3]):
      ranked.rank(index, score, np.zeros((1, 1), np.uint8))
  assert kept(RankedImages.joined(parts)) == kept(whole)


def test_prediction_outlives_the_batch_that_it_came_in():
  ranked = RankedImages(1)
  batch = np.full((1, 4, 4), 7, np.uint8)
  ranked.rank(0, 0.5, batch[0, :2, :3])
  batch[:] = 9
  (image,) = ranked.both()['worst']
  assert image.prediction.tolist() == [[7, 7, 7], [7, 7, 7]]


@pytest.mark.parametrize(('number', 'score'), [(2, float('nan')), (0, 0.5)])
def test_images_without_a_score_and_none_asked_for(number, score):
  ranked = RankedImages(number)
  ranked.rank(0, score, np.zeros((1, 1), np.uint8))
  assert kept(ranked) == {'worst': [], 'best': []}
