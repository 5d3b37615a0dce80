"""Classes files as users write them, chosen colours, labels of weights."""

import json

import numpy as np
import pytest
from numpy.testing import assert_equal

from resnest_jax.data.own.classes import (
  distinct_colours,
  label_set,
  read_classes,
)
from resnest_jax.errors import UserError
from resnest_jax.labels import ADE20K, CITYSCAPES


@pytest.fixture
def read(tmp_path):
  """Reads a text or what is written as JSON."""

  def run(content):
    path = tmp_path / 'classes.txt'
    if not isinstance(content, str):
      content = json.dumps(content)
    path.write_text(content)
    return read_classes(path)

  return run


def test_lines_of_names_and_colours(read):
  classes = read(
    '\ufeff# of a harbour\n\nopen water 0 0 255\n'
    '  quay, 90, 90, 90 \nroute 66\n'
  )
  labels = classes.labels
  assert labels.classes == ('open water', 'quay', 'route 66')
  assert labels.palette[:2].tolist() == [[0, 0, 255], [90, 90, 90]]
  assert labels.palette.dtype == labels.to_train_id.dtype == np.uint8
  assert labels.to_train_id.tolist() == [0, 1, 2] + [255] * 253
  assert classes.chosen == ('route 66',)
  assert np.flatnonzero(classes.known()).tolist() == [0, 1, 2, 255]


def test_lines_with_mask_values(read):
  classes = read('7: road 128 64 128\n8 11,12: a: b\n255: sky\nignore: 0 1\n')
  assert classes.labels.classes == ('road', 'a: b', 'sky')
  expected = np.full(256, 255)
  expected[[7, 8, 11, 12, 255]] = [0, 1, 1, 1, 2]
  assert_equal(classes.labels.to_train_id, expected)
  assert classes.values == ((7,), (8, 11, 12), (255,))
  assert classes.ignored == (0, 1)
  known = np.flatnonzero(classes.known()).tolist()
  assert known == [0, 1, 7, 8, 11, 12, 255]


def test_json_says_the_same(read):
  text = read('1: road 128 64 128\n2 3: tree 9 9 9\nignore: 0\n')
  colours = {'palette': [[128, 64, 128], [9, 9, 9]]}
  values = {'values': [1, [2, 3]], 'ignore': [0]}
  same = read({'classes': ['road', 'tree']} | colours | values)
  assert same.labels.classes == text.labels.classes
  assert_equal(same.labels.palette, text.labels.palette)
  assert_equal(same.labels.to_train_id, text.labels.to_train_id)
  assert (same.values, same.ignored) == (text.values, text.ignored)
  names = read({'classes': ['a', 'b'], 'palette': [None, [1, 2, 3]]})
  assert names.chosen == ('a',)
  assert names.labels.palette[1].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('road\n', 'has 1 classes; there must be 2 to 255'),
    ('\n'.join(f'class {i}' for i in range(256)), 'has 256 classes'),
    ('road\nroad\n', 'line 2: the name road of road is also used by road'),
    ('a 1 2 3\nb 1 2 3\n', r'colour \(1, 2, 3\) of b is also used by a'),
    ('a 1 2 256\nb\n', 'line 1: 256 is not from 0 to 255'),
    ('1: a\nb\n', 'line 2: b has no mask value'),
    ('a\nb\nignore: 0\n', 'line 1: the value 0 of a is also used by ignore'),
    ('1: a\n2: b\nignore: 256\n', 'ignore 256 is not from 0 to 255'),
    ('x: a\nb\n', "line 1: 'x' is no mask value"),
    ('a\nignore 0 0 0\n', 'line 2: what is not a class'),
    ('1: 5 5 5\n2: b\n', 'line 1: the name is missing'),
    ('{"classes": [}', 'is not valid JSON'),
    ({'names': ['a']}, "has 'names'; accepted are classes"),
    ({'classes': 'a b'}, '"classes" must be a list of names'),
    ({'classes': ['a', 'b'], 'palette': [[1, 2, 3]]}, r'as long as.*\(2\)'),
    ({'classes': ['a', 'b'], 'palette': [[1, 2], None]}, r'class 0: \[1, 2\]'),
    ({'classes': ['a', 'b'], 'values': [1, []]}, r'class 1: \[\] is no value'),
  ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(read, content, message):
  with pytest.raises(UserError, match=message):
    read(content)


def test_missing_file_says_what_to_write(tmp_path):
  with pytest.raises(UserError, match=r'no classes file .*road 128 64 128'):
    read_classes(tmp_path / 'classes.txt')
  (tmp_path / 'bytes').write_bytes(b'\xff\xfe\x00')
  with pytest.raises(UserError, match='cannot be read'):
    read_classes(tmp_path / 'bytes')


def test_chosen_colours_are_far_from_each_other():
  colours = np.array(distinct_colours(40), int)
  reserved = [(0, 0, 0), (255, 255, 255)]
  everything = np.concatenate([reserved, colours])
  apart = np.abs(everything[:, None] - everything).sum(-1)
  assert apart[np.triu_indices(len(apart), 1)].min() >= 80
  # The first ones do not change when there are more of them.
  assert distinct_colours(5) == [tuple(x) for x in colours[:5].tolist()]
  assert len(set(distinct_colours(255))) == 255


def test_chosen_colours_avoid_those_given(read):
  (first,) = distinct_colours(1)
  classes = read(f'a {first[0]} {first[1]} {first[2]}\nb\n')
  distance = np.abs(np.subtract(*classes.labels.palette.astype(int))).sum()
  assert distance > 200


def test_labels_of_weights_that_do_not_say():
  for known in (ADE20K, CITYSCAPES):
    number = len(known.classes)
    for names in (None, list(known.classes), ['of another number']):
      assert label_set(number, names, None) is known
  assert label_set(3, None, None).classes == ('0', '1', '2')


def test_labels_of_weights_that_say():
  names = [f'thing {i}' for i in range(19)]
  palette = [[i, 2 * i, 3 * i] for i in range(19)]
  for given, expected in ((palette, palette), (None, distinct_colours(19))):
    labels = label_set(19, names, given)
    assert labels.classes == tuple(names)
    assert_equal(labels.palette, expected)
