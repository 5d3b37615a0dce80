"""Text on pictures: every name readable, no two alike."""

import itertools

import numpy as np
import pytest

from resnest_jax import drawing, lettering

INK = (10, 20, 30)


def written(text, room=400):
  picture = np.full((30, room, 3), 255, np.uint8)
  lettering.write(picture, text, (8, 20), INK)
  return picture


# Each would be invisible, a question mark or a box with a single font.
NAMES = [
  ('\u80cc\u666f', '\u53f6\u5b50', '??', '??????'),
  ('\U0001f9ff', '\U0001f9fe', '\u0928\u0926\u0940', '\u0928\u0926'),
  ('a', 'a\u200b', 'a\u00ad', 'a\ufe0f', 'a\u202e', 'a\u3164', 'a\t', 'a\n'),
  ('a b', 'a\u00a0b', 'a\u2003b', 'a  b', 'ab'),
  ('stra\udcdfe', 'stra\udce0e', 'stra\u00dfe', 'strae', 'stra?e'),
]


@pytest.mark.parametrize('names', NAMES)
def test_no_two_names_look_the_same(names):
  for one, other in itertools.combinations(names, 2):
    assert not np.array_equal(written(one), written(other)), (one, other)


def test_scripts_are_drawn_and_what_no_font_has_by_its_code_point():
  # An em for a Chinese character; eight for the six of a code point.
  assert lettering.width('\u80cc\u666f\u3068\ub098') == 4 * 12
  coded = written('\u27e80928\u27e9')
  np.testing.assert_array_equal(written('\u0928'), coded)
  # Both forms of an accent are one text, as file systems have either.
  composed, decomposed = written('\u00e9t\u00e9'), written('e\u0301te\u0301')
  np.testing.assert_array_equal(composed, decomposed)


def test_text_starts_at_its_base_and_keeps_the_picture():
  picture = written('Hg')
  rows, columns = np.nonzero((picture != 255).any(-1))
  assert (columns.min() in (8, 9, 10), rows.max() > 20) == (True, True)
  assert columns.max() < 8 + lettering.width('Hg')
  assert (written('H') != 255).any(-1).nonzero()[0].max() == 19
  assert picture.min((0, 1)).tolist() == pytest.approx(INK, abs=40)


def test_a_long_title_keeps_its_ends():
  name = 'train/' + 'x' * 245 + '.jpg'
  short = lettering.elided(name, 120)
  assert (short[:4], short[-5:]) == ('trai', 'x.jpg')
  assert 90 < lettering.width(short) <= 120
  assert lettering.elided('street.jpg', 120) == 'street.jpg'
  assert lettering.elided('street.jpg', 0) == '...g'


def test_long_class_names_differ_in_the_legend_by_their_ends():
  zeros, name = np.zeros((9, 3), np.uint8), 'roof ' * 40
  names = 'roof', f'{name}a', f'{name}b'
  short, one, other = (drawing.legend([zeros], [x], zeros, 300) for x in names)
  assert one.shape[0] > 3 * short.shape[0]
  assert one.shape == other.shape
  assert not np.array_equal(one, other)
  assert ''.join(lettering.wrapped(name, 100)) == name
  assert max(map(lettering.width, lettering.wrapped(name, 100))) <= 100
