"""Numbers and lists in words."""

import math

from resnest_jax import text


def test_nouns_and_verbs_follow_their_number():
  assert text.plural(1, 'mask', 'have') == '1 mask has'
  assert text.plural(2, 'class') == '2 classes'
  assert text.share(1, 3, 'mask', 'are') == '1 of 3 masks is'
  assert text.share_of('ab', 'abcd', 'mask', 'do') == '2 of 4 masks do'


def test_long_lists_end_with_a_number():
  assert text.listed([3, 1, 2], 3) == '3, 1, 2'
  assert text.listed('abcd', 2) == 'a, b and 2 more'


def test_percent():
  assert text.percent(0.12345) == '12.35'
  assert text.percent(0.12345, 1) == '12.3'
  assert text.percent(None) == '-'
  assert text.percent(math.nan, undefined='none') == 'none'


def test_durations():
  assert text.duration(3723.4) == '1:02:03'
  assert text.duration(59.7) == '1:00'
  assert text.duration(7) == '0:07'
