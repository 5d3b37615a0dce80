"""`prepare own`: exports that lack something are refused, and told what."""

import functools
import json
import re
import shutil

import pytest
from data import annotated
from data.annotated import SAMPLES, WRITERS
from data.refusals import refused
from data.test_annotations import masks_in
from numpy.testing import assert_array_equal

from resnest_jax.data import prepare
from resnest_jax.data.own.classes import read_classes


@pytest.fixture
def convert(call, tmp_path):
  words = 'own', tmp_path / 'export', '--data_dir', tmp_path / 'data'
  words += '--unlabelled', 'background'
  return functools.partial(call, prepare.main, *words)


def remove(folder, pattern):
  found = [x for x in folder.rglob('*') if re.search(pattern, x.as_posix())]
  files = [x for x in found if x.is_file()]
  assert files
  for file in files:
    file.unlink()


def replace(folder, file, old, new):
  text = (folder / file).read_text()
  assert old in text
  (folder / file).write_text(text.replace(old, new))


def edit_json(folder, edit, pattern='*.json'):
  files = [*folder.rglob(pattern)]
  assert files
  for file in files:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def rename(content):
  for category in content['categories']:
    category['name'] = 'leaf'


def lose_segment(content):
  del content['annotations'][0]['segments_info'][0]


def test_colours_of_panoptic_categories_are_kept(convert, tmp_path):
  WRITERS['panoptic'](tmp_path / 'export')
  colours = {'leaf': [34, 139, 34], 'flower': [200, 30, 90]}

  def colour(content):
    for category in content['categories']:
      category['color'] = colours.get(category['name'], 'none')

  # The other splits say nothing of colours.
  edit_json(tmp_path / 'export', colour, '*train*.json')
  convert()
  found = read_classes(tmp_path / 'data' / 'classes.txt').colours()
  for name, colour in colours.items():
    assert found[name] == tuple(colour)


def test_one_class_and_nothing_else(convert, tmp_path):
  WRITERS['coco'](tmp_path / 'export')
  edit_json(tmp_path / 'export', lambda x: x['categories'].pop())
  message = r'there must be two\. With --unlabelled background the rest is one'
  refused(message, convert, '--unlabelled', 'ignore')
  assert not (tmp_path / 'data').exists()


def test_yaml_of_yolo_may_have_its_names_by_number(convert, tmp_path):
  """As Ultralytics' own examples have them, with the path of a computer."""
  annotated.yolo(tmp_path / 'export')
  names = 'names:\n  0: leaf  # green\n  1: flower\npath: /data/garden'
  file = tmp_path / 'export', 'data.yaml'
  replace(*file, 'names: [leaf, flower]', names)
  convert()
  found = masks_in(tmp_path / 'data')
  for name in SAMPLES:
    assert_array_equal(found[name], annotated.expected(name, 'yolo'))


def test_masks_of_voc_have_the_colours_of_a_classes_file(convert, tmp_path):
  WRITERS['voc'](tmp_path / 'export')
  lines = (tmp_path / 'export/labelmap.txt').read_text().splitlines()
  names = [re.sub(r'[:,]', ' ', x) for x in lines if x[0] != '#']
  (tmp_path / 'names').write_text('\n'.join(names))
  remove(tmp_path / 'export', 'labelmap.txt')
  convert('--classes', tmp_path / 'names')
  found = masks_in(tmp_path / 'data')
  for name in SAMPLES:
    assert_array_equal(found[name], annotated.expected(name))


MISTAKES = {
  'no pictures of VOC': (
    'voc',
    lambda x: remove(x, '/JPEGImages/'),
    '5: has no picture in .*export: add it, .* give its folder as --pictures',
  ),
  'a picture of VOC is missing': (
    'voc',
    lambda x: remove(x, '/JPEGImages/.*3.jpg'),
    r'1: has no picture in .*\(SegmentationClass/.*3.png',
  ),
  'no coloured pictures': (
    'coloured',
    lambda x: remove(x, '/images/'),
    '5: has no picture in',
  ),
  'a list of no split': (
    'voc',
    lambda x: (x / 'ImageSets/Segmentation/default.txt').write_text('hen\n'),
    r'1: has no mask \(hen\)',
  ),
  'pictures that were enlarged': (
    'labelme',
    lambda x: replace(x, 'a.json', '"imageWidth": ', '"imageWidth": 1'),
    r'1: has a picture of another size .* \[\d+, \d+\] instead of \[\d+, 1\d+',
  ),
  'a label of spaces': (
    'labelme',
    lambda x: (
      shutil.copy(x / 'a.jpg', x / 'b.jpg')
      and (x / 'b.json').write_text('{"shapes": [{"label": " "}]}')
    ),
    r'1: has no list of shapes with labels \(b.json',
  ),
  'an empty file': (
    'labelme',
    lambda x: (x / 'b.json').touch(),
    'there is nothing in .*b.json. Export it again, or remove it',
  ),
  'pictures of another format': (
    'coco',
    lambda x: [y.rename(y.with_suffix('.png')) for y in x.rglob('0.jpg')],
    r'1: has no picture \.jpg, only \.png: add it, or correct the name',
  ),
  'two classes of one name': (
    'yolo',
    lambda x: replace(x, 'data.yaml', '[leaf, flower]', '[leaf, leaf]'),
    'data.yaml has several classes of the name leaf, .*Rename them',
  ),
  'two categories of one name': (
    'coco',
    lambda x: edit_json(x, rename),
    'has several classes of the name leaf',
  ),
  'boxes': (
    'yolo',
    lambda x: next(x.rglob('*.txt')).write_text('1 0.5 0.5 0.2 0.2\n'),
    r'1: is a box and no outline: export for segmentation \(.*line 1\)',
  ),
  'corners in pixels': (
    'yolo',
    lambda x: next(x.rglob('0.txt')).write_text('1 10 10 50 10 50 40\n'),
    '1: lies outside of its picture: fractions, 0 to 1, are expected',
  ),
  'labels of a picture that is missing': (
    'yolo',
    lambda x: (x / 'images/train/bed/1.jpg').unlink(),
    r'1: has no picture in .*\(.*/labels/train/bed/1.txt\)',
  ),
  'a picture of YOLO that was renamed': (
    'yolo',
    lambda x: (x / 'images/val/3.jpg').rename(x / 'images/val/03.jpg'),
    r'1: has no picture in .*\(.*/labels/val/3.txt\)',
  ),
  'a mask of panoptic is missing': (
    'panoptic',
    lambda x: remove(x, 'panoptic_val/3.png'),
    r'1: has no mask panoptic_val/3.png \(panoptic_val.json, 3.jpg',
  ),
  'a segment that panoptic does not list': (
    'panoptic',
    lambda x: edit_json(x, lose_segment, 'panoptic_val.json'),
    "'segment 1 without segments_info', .* in panoptic_val.json, .*'3.png'",
  ),
  'coloured masks without classes': (
    'voc',
    lambda x: remove(x, 'labelmap.txt'),
    r'5: has colours \(RGB\) .* masks of VOC need --classes FILE with these',
  ),
  'misplaced labels': (
    'yolo',
    lambda x: (x / 'labels/val').rename(x / 'labels/Val'),
    r'1: no picture of a split has labels \(val, such as .*labels/val',
  ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_what_is_missing_is_told(convert, tmp_path, mistake):
  form, spoil, message = MISTAKES[mistake]
  write = {**WRITERS, 'labelme': annotated.labelme}[form]
  write(tmp_path / 'export')
  spoil(tmp_path / 'export')
  refused(message, convert)
  assert not (tmp_path / 'data').exists()
