"""Classes files as users write them, chosen colours, labels of weights."""

import json

import numpy as np
import pytest
from data.refusals import refused
from numpy.testing import assert_equal
from trouble import obeying_permissions

from resnest_jax.data.own import classes as own
from resnest_jax.labels import ADE20K, CITYSCAPES, PASCAL_CONTEXT


@pytest.fixture
def read(tmp_path):
  """Reads a text or what is written as JSON."""

  def run(content, coding='utf-8'):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / 'classes.txt').write_text(text, coding)
    return own.read_classes(tmp_path / 'classes.txt')

  return run


def facts(classes):
  """Names, values, ignored values, and names whose colours are chosen."""
  names = classes.labels.classes
  return names, classes.values, classes.ignored, classes.chosen


def test_lines_of_names_and_colours(read):
  text = '\ufeff# of a coast\n\nopen sea 0 0 9\n  quay, 9, 8, 7 \nroute 66\n'
  classes = read(text)
  names = 'open sea', 'quay', 'route 66'
  assert facts(classes) == (names, ((0,), (1,), (2,)), (), names[2:])
  labels = classes.labels
  assert labels.palette[:2].tolist() == [[0, 0, 9], [9, 8, 7]]
  assert labels.palette.dtype == labels.to_train_id.dtype == np.uint8
  assert labels.to_train_id.tolist() == [0, 1, 2] + [255] * (2**16 - 3)
  assert np.flatnonzero(classes.known()).tolist() == [0, 1, 2, 255]


def test_lines_with_mask_values(read):
  classes = read('7: road 128 64 128\n8 11,12: a: b\n255: sky\nignore: 0 1\n')
  names, values = ('road', 'a: b', 'sky'), ((7,), (8, 11, 12), (255,))
  assert facts(classes) == (names, values, (0, 1), names[1:])
  expected = np.full(2**16, 255)
  expected[[7, 8, 11, 12, 255]] = [0, 1, 1, 1, 2]
  assert_equal(classes.labels.to_train_id, expected)
  known = np.flatnonzero(classes.known()).tolist()
  assert known == [0, 1, 7, 8, 11, 12, 255]


def test_json_says_the_same(read):
  text = read('1: road 128 64 128\n2 3: tree 9 9 9\nignore: 0\n')
  colours = {'palette': [[128, 64, 128], [9, 9, 9]]}
  values = {'values': [1, [2, 3]], 'ignore': [0]}
  same = read({'classes': ['road', 'tree']} | colours | values)
  assert facts(same) == facts(text)
  assert_equal(same.labels.palette, text.labels.palette)
  assert_equal(same.labels.to_train_id, text.labels.to_train_id)
  names = read({'classes': ['a', 'b'], 'palette': [None, [1, 2, 3]]})
  assert names.chosen == ('a',)
  assert names.labels.palette[1].tolist() == [1, 2, 3]


REFUSED = [
  ('road\n', 'has 1 class; there must be 2 to 255.* "255: road"'),
  ('\n'.join(f'class {i}' for i in range(256)), 'has 256 classes'),
  ('road\nroad\n', 'line 2: the name road is also used by an ear'),
  ('a 1 2 256\nb\n', 'line 1: 256 is not from 0 to 255'),
  ('1: a\nb\n', 'line 2: b has no mask value'),
  ('a\nb\nignore: 0\n', 'line 1: the value 0 of a is also used by ignore'),
  ('1: a\n65536: b\n', '65536 is not from 0 to 65535'),
  ('1: a\n2: b\nignore: 65536\n', 'ignore 65536 is not from 0 to 65535'),
  ('x: a\nb\n', "line 1: 'x' is no mask value"),
  ('a\nignore 0 0 0\n', 'line 2: what is not a class'),
  ('a\nb 1 1 1\nc 2 2 2', "line 1: 'a' has no colour.* # in front"),
  ('a\n__ignore__\nb', 'line 2: what is not a class'),
  ('1: 5 5 5\n2: b\n', 'line 1: the name is missing'),
  ('{"classes": [}', 'is not valid JSON'),
  ('{"0": "a", "1": "b", "1": "c"}', "the key '1' stands there twice"),
  ({'names': ['a']}, "has 'names'; accepted are classes"),
  ({'classes': 'a b'}, '"classes" must be a list of names'),
  ({'classes': ['a', 'b'], 'palette': [[1, 2, 3]]}, r'as long as.*\(2\)'),
  ({'classes': ['a', 'b'], 'palette': [[1, 2], None]}, r'class 0: \[1, 2\]'),
  ({'classes': ['a', 'b'], 'values': [1, []]}, r'class 1: \[\] is no value'),
  # Tables, and JSON of others.
  ('name,r,g,b,kind\nsky,1,2,3,4\n', 'line 1: the columns of a table are'),
  ('name,r,g\nsky,1,2\n', 'line 1: the columns of a table are'),
  ('id,index,name\n0,0,sky\n', 'line 1: the columns of a table are'),
  ('r,g,b\n1,2,3\n', 'line 1: the columns of a table are'),
  ('name,r,g,b\nsky,1,2\n', r"line 2: 'sky,1,2' has 3 cells.* has 4\."),
  ('name,r,g,b\nsky,1,2,x\n', "line 2: 'x' is not a number from 0"),
  ('name,r,g,b\nsky,1,2,256\nsea,1,2,3', 'line 2: 256 is not from 0'),
  ('value,name\n0,sky\n0,sea\n', 'line 3: the value 0 of sea is also used'),
  ('{"0": "sky", "00": "sea"}', 'the value 0 of sea is also used by sky'),
  ('{"0": "sky", "1": 1}', '"classes" must be a list of names'),
  ('{"0": "sky", "one": "sea"}', "has 'one'; accepted are classes"),
  ([{'name': 'sky'}, {'name': 'sea'}], 'must be a list of names, as in {"cl'),
  ({'classes': ['sky', '\ud800']}, r"class 1: '\\ud800' is no text"),
  ('["a", ' + '[' * 10**6, 'is not valid JSON'),
  ('{"a":' * 10**6, 'is not valid JSON'),
  ('{"classes": ["sky", " "]}', 'class 1: the name is missing'),
  (f'{{"0": "sky", "{"9" * 5000}": "sea"}}', '999999999 is not from 0'),
  (f'{{"classes": ["a", "b"], "ignore": [{"9" * 5000}]}}', '99 is not from 0'),
  ('s\0k\0y\0\n\0', 'bytes that are no text.*in UTF-8'),
]


@pytest.mark.parametrize(('content', 'message'), REFUSED)
def test_what_cannot_be_meant_is_refused_with_its_place(read, content, message):
  refused(message, read, content)


NAMES = ('sky', 'red ox', 'oak')
COLOURS = [[10, 11, 12], [4, 5, 6], [7, 8, 9]]
OF_OTHER_TOOLS = [
  # Spreadsheets, with their separators, and Kaggle's class_dict.csv.
  ('name,r,g,b\nsky,10,11,12\nred ox,4,5,6\noak,7,8,9', 1),
  ('r;g;b;Name\n10;11;12;sky\n4;5;6;red ox\n7;8;9;oak\n', 1),
  ('"Class"\tRed\tGreen\tBlue\nsky\t10\t11\t12\n"red ox"\t4\t5\t6\n'
   'oak\t7\t8\t9\n', 1),
  ('index\tlabel\n0\tsky\n1\tred ox\n2\toak\n', 0),
  # Roboflow's _classes.csv.
  ('Pixel Value, Class\n0, sky\n1, red ox\n2, oak\n', 0),
  ('label_id,category\n0,sky\n1,"red ox"\n2,oak\n255,ignore', 0),
  # CVAT's labelmap.txt, with and without colours.
  ('# label:color_rgb:parts:actions\nsky:10,11,12::\nred ox:4,5,6::\n'
   'oak:7,8,9:leaf:open,shut\n', 1),
  ('sky:::\nred ox:::\noak:::', 0),
  # Hugging Face's id2label.json and config.json, and lists.
  ('{"0": "sky", "2": "oak", "1": "red ox"}', 0),
  ('{"id2label": {"0": "sky", "1": "red ox", "2": "oak"}, "label2id":{}}', 0),
  ('[\n  "sky",\n "red ox", "oak"]', 0),
  # labelme's labels.txt, and other ways to write a colour.
  ('__ignore__\nsky\nred ox\noak\n', 0),
  ('sky #0a0b0c\nred ox (4, 5, 6)\noak;7;8;9\n', 1),
]  # fmt: skip


@pytest.mark.parametrize(('text', 'colours'), OF_OTHER_TOOLS)
def test_files_of_other_tools_mean_what_they_mean_there(read, text, colours):
  classes = read(text)
  assert facts(classes)[:2] == (NAMES, ((0,), (1,), (2,)))
  if colours:
    assert_equal(classes.labels.palette, COLOURS)
  assert bool(classes.chosen) is not bool(colours)


@pytest.mark.parametrize('coding', ['utf-8-sig', 'utf-16', 'utf-16-be'])
def test_files_of_windows_are_read(read, coding):
  mark = '\ufeff' if coding == 'utf-16-be' else ''
  classes = read(f'{mark}Straße 1 2 3\r\nBäume 4 5 6\r\n', coding)
  assert classes.labels.classes == ('Straße', 'Bäume')


# What is refused, with the message, and what follows its remedy.
MENDED = [
  ('0,sky\n1,sea\n', 'value,name\n0,sky\n1,sea\n'),
  ('sky,0\nsea,1\n', 'name,value\nsky,0\nsea,1\n'),
  ('0 sky\n1 sea\n', '0: sky\n1: sea\n'),
  ('0. sky\n1. sea\n', '0: sky\n1: sea\n'),
  ('"sky"\n"sea"\n', 'sky\nsea\n'),
  ('sky # above\nsea # below\n', '# above\nsky\n# below\nsea\n'),
  ('sky\t0\nsea\t1\n', 'name\tvalue\nsky\t0\nsea\t1\n'),
  ('sky;0\nsea;1\n', 'name;value\nsky;0\nsea;1\n'),
  ('sky=0\nsea=1\n', '0: sky\n1: sea\n'),
  ('- sky\n- sea\n', 'sky\nsea\n'),
  ('9 9 9 sky\n8 8 8 sea\n', 'sky 9 9 9\nsea 8 8 8\n'),
  ('sky,9,9,9,1\nsea,8,8,8,1\n', 'name,r,g,b\nsky,9,9,9\nsea,8,8,8\n'),
  ('0: sky, sun\n1: sea\n', '["sky", "sea"]'),
  ('sky\n' + 'sea' * 5000, 'sky\nsea'),
  ('sky 0.5 0.5 0.5\nsea 0.1 0.1 0.1', 'sky 127 127 127\nsea 25 25 25'),
  ('sky -1 0 0\nsea', 'sky\nsea'),
  ('sky 9 9\nsea 8 8', 'sky 9 9 9\nsea 8 8 8'),
]


@pytest.mark.parametrize(('text', 'mended'), MENDED)
def test_lines_that_are_no_classes_are_refused(read, text, mended):
  message = (
    r'classes\.txt, line [12]\b.*"0: road 128 64 128"\. A table starts with a '
    'line that names its columns.* A name with a comma needs JSON'
  )
  refused(message, read, text)
  assert facts(read(mended))[:2] == (('sky', 'sea'), ((0,), (1,)))


def test_names_that_look_like_other_things_stay_names(read):
  # As they could be written before.
  names = 'route 66', 'c#', '[sky]', 'door;double door', 'no-name', 'red green'
  assert read('\n'.join(names)).labels.classes == names
  table = read('name;value\n"a, b";3\n2 wheels;4\n')
  assert table.labels.classes == ('a, b', '2 wheels')
  assert read('[sky]\n[sea] 1 2 3\n').labels.classes == ('[sky]', '[sea]')
  assert read('0: 3d\n1: b').labels.classes == ('3d', 'b')


@pytest.mark.parametrize(('sky', 'sea'), [('', ''), (' 9 9 9', ' 8 8 8')])
def test_values_behind_the_names_are_no_names(read, sky, sea):
  message = r'line 1: each name ends.*"1: sky"'
  refused(message, read, f'sky 1{sky}\nsea 2{sea}\n')
  classes = read(f'1: sky{sky}\n2: sea{sea}\n')
  assert facts(classes)[:2] == (('sky', 'sea'), ((1,), (2,)))
  same = read(f'class 1{sky}\nclass 2{sea}\n')
  assert same.labels.classes == ('class 1', 'class 2')


def test_one_class_gets_a_background_as_the_message_says(read):
  refused('add "background" in front', read, 'leaf\n')
  assert read('background\nleaf\n').values == ((0,), (1,))
  assert read('0: background\n255: leaf\n').values == ((0,), (255,))
  refused('add "0: background" in front', read, '1: leaf\n')
  assert read('0: background\n1: leaf\n').values == ((0,), (1,))
  assert read('id name\n3 leaf\n0 background\n').values == ((3,), (0,))


def test_missing_file_says_what_to_write(tmp_path):
  path = tmp_path / 'classes.txt'
  refused(r'classes file .*No such .*road 128 64 128', own.read_classes, path)
  no_text = r'cannot be read .*It is text in UTF-8'
  for content in (b'\xff\xfe\x00', 'Straße\nBaum'.encode('cp1252')):
    path.write_bytes(content)
    refused(no_text, own.read_classes, path)
  path.chmod(0)
  with obeying_permissions():
    refused('right to read', own.read_classes, path)
  refused('it is no file', own.read_classes, tmp_path)


def test_chosen_colours_are_far_from_each_other():
  colours = own.distinct_colours(40)
  everything = np.array([(0, 0, 0), (255, 255, 255), *colours])
  apart = np.abs(everything[:, None] - everything).sum(-1)
  assert apart[np.triu_indices(len(apart), 1)].min() >= 80
  # The first ones do not change when there are more of them.
  assert own.distinct_colours(5) == colours[:5]
  assert len(set(own.distinct_colours(255))) == 255


def test_chosen_colours_avoid_those_given(read):
  classes = read('a {} {} {}\nb\n'.format(*own.distinct_colours(1)[0]))
  distance = np.abs(np.subtract(*classes.labels.palette.astype(int))).sum()
  assert distance > 200


def test_labels_of_weights_that_do_not_say():
  for known in (ADE20K, CITYSCAPES, PASCAL_CONTEXT):
    number = len(known.classes)
    for names in (None, list(known.classes), ['of another number']):
      assert own.label_set(number, names, None) is known
  assert own.label_set(3, None, None).classes == ('0', '1', '2')
  # In alphabetical order, without the background that has colour 0 in ADE20K.
  context = PASCAL_CONTEXT
  assert len(context.classes) == 59
  assert sorted(context.classes) == [*context.classes]
  assert_equal(context.palette, ADE20K.palette[1:60])
  assert_equal(context.to_train_id[[0, 1, 59, 60]], [255, 0, 58, 255])


def test_labels_of_weights_that_say():
  names = [f'thing {i}' for i in range(19)]
  palette = [[i, 2 * i, 3 * i] for i in range(19)]
  for given, expected in ((palette, palette), (None, own.distinct_colours(19))):
    labels = own.label_set(19, names, given)
    assert labels.classes == tuple(names)
    assert_equal(labels.palette, expected)
