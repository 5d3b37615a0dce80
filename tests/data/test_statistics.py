"""Counts of classes against naive ones."""

import numpy as np
from numpy.testing import assert_equal

from resnest_jax.data import statistics
from resnest_jax.data.datasets import open_split


def test_counts_are_those_of_a_naive_loop(mini_data_dir):
  split = open_split('ade20k_mini', mini_data_dir, 'train')
  chosen, calls = [20, 3, 11], []
  rows = statistics.count_pixels(
    split, chosen, on_progress=lambda *place: calls.append(place)
  )
  labels = [split[index]['label'] for index in chosen]
  values = (*range(150), 255)
  assert rows.dtype == np.int64
  assert_equal(rows, [[(x == k).sum() for k in values] for x in labels])
  assert calls == [(1, 3), (2, 3), (3, 3)]
