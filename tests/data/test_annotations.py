"""`prepare own`: exports of annotation tools become a data set, pixel by pixel.

The exports are Datumaro's, labelme's, Ultralytics' and Hugging Face's own; the
masks are those that pycocotools, labelme and Ultralytics draw of them.
"""

import functools
import json
import os

import cv2
import numpy as np
import pyarrow.parquet
import pytest
import tifffile
from data import annotated
from data.annotated import NAMES, SAMPLES, SIZE, WRITERS
from data.fields import CONTIGUOUS
from data.refusals import refused
from data.small_archives import encode
from numpy.testing import assert_array_equal
from PIL import Image
from pycocotools import mask as coco

from resnest_jax.config import load_config
from resnest_jax.data import prepare
from resnest_jax.data.datasets import open_data
from resnest_jax.data.own.classes import read_classes

CONFIG = 'configs/folder.py:mini'


@pytest.fixture
def convert(call, tmp_path):
  words = 'own', tmp_path / 'export', '--data_dir', tmp_path / 'data'
  return functools.partial(call, prepare.main, *words)


def mask_of(path):
  return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def masks_in(data):
  return {
    x.relative_to(data / 'masks').with_suffix('').as_posix(): mask_of(x)
    for x in (data / 'masks').rglob('*.png')
  }


def by_row(masks):
  """Of parquet files, whose rows have numbers instead of names."""
  return dict(zip(SAMPLES, (masks[x] for x in sorted(masks)), strict=True))


@pytest.mark.parametrize('form', WRITERS)
def test_masks_are_those_of_the_tool(convert, tmp_path, capsys, form):
  WRITERS[form](tmp_path / 'export')
  convert('--unlabelled', 'background')
  found = masks_in(tmp_path / 'data')
  found = by_row(found) if form == 'parquet' else found
  assert {*found} == {*SAMPLES}
  assert_array_equal(
    [found[x] for x in SAMPLES],
    [annotated.expected(x, form) for x in SAMPLES],
  )
  assert 'train        3 images' in capsys.readouterr().out
  config = load_config(CONFIG, {'data.data_dir': str(tmp_path / 'data')})
  split = open_data(config.data, 'val')
  assert split.labels.classes == ('background', *NAMES)
  assert split[0]['image'].shape == (*SIZE, 3)
  assert mask_of(tmp_path / 'data' / 'sheet.png').ndim == 3


def test_labelme_draws_the_same(convert, tmp_path):
  annotated.labelme(tmp_path / 'export')
  convert('--unlabelled', 'background', '--format', 'labelme')
  (mask,) = masks_in(tmp_path / 'data').values()
  golden = annotated.GOLDEN / 'labelme_7.9.1.png'
  assert_array_equal(mask, mask_of(golden))


def test_ultralytics_differs_on_outlines_alone(convert, tmp_path):
  """It truncates corners to whole pixels, and draws the outline as well."""
  annotated.yolo(tmp_path / 'export')
  convert('--unlabelled', 'background')
  found = masks_in(tmp_path / 'data')
  differing = 0
  for name, mask in annotated.drawn_by_ultralytics().items():
    ours = [np.uint8(found[name] == k) for k in range(3)]
    # Three pixels from where a class ends.
    inside = sum(cv2.erode(x, np.ones((7, 7), np.uint8)) for x in ours) > 0
    assert_array_equal(found[name][inside], mask[inside])
    differing += (found[name] != mask).mean() / len(SAMPLES)
  assert 0 < differing < 0.05


def write_coco(folder, images, annotations, names=NAMES):
  (folder / 'images').mkdir(parents=True, exist_ok=True)
  for name in {x['file_name'] for x in images}:
    path = folder / 'images' / name
    path.write_bytes(encode(annotated.image_of(name), '.jpg'))
  categories = [{'id': i, 'name': x} for i, x in enumerate(names)]
  content = {'images': images, 'annotations': annotations}
  text = json.dumps(content | {'categories': categories})
  (folder / 'a.json').write_text(text)


def rles(masks):
  """Of each, as text and as numbers."""
  packed = [coco.encode(np.asfortranarray(x)) for x in masks]
  for i, x in enumerate(packed):
    text = x['counts'].decode()
    flat = masks[i].ravel('F')
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
    counts = np.diff(edges, prepend=0).tolist()
    yield x | {'counts': text}, x | {'counts': counts}


def test_run_lengths_of_both_kinds_are_exact(convert, tmp_path):
  mask = annotated.expected(SAMPLES[0])
  image = {'id': 7, 'file_name': 'a.jpg', 'height': SIZE[0], 'width': SIZE[1]}
  forms = list(rles([np.uint8(mask == k + 1) for k in range(2)]))
  for kind in range(2):
    rows = [
      {'id': k, 'image_id': 7, 'category_id': k, 'segmentation': x[kind]}
      for k, x in enumerate(forms)
    ]
    write_coco(tmp_path / 'export', [image], rows)
    convert('--unlabelled=background', '--data_dir', tmp_path / str(kind))
    assert_array_equal(masks_in(tmp_path / str(kind))['a'], mask)


def square(left, top, right, low):
  return [left, top, right, top, right, low, left, low]


IMAGE = {'id': 1, 'file_name': 'a.jpg', 'height': SIZE[0], 'width': SIZE[1]}
BIG = {'id': 1, 'image_id': 1, 'category_id': 0}
BIG['segmentation'] = [square(10, 10, 50, 50)]
SMALL = BIG | {'id': 2, 'category_id': 1}
SMALL['segmentation'] = [square(20, 20, 30, 30)]


@pytest.mark.parametrize(
  ('flags', 'values'),
  [
    ('background', [0, 1, 2]),
    ('ignore', [255, 0, 1]),
    ('leaf', [0, 0, 1]),
    ('background --overlaps later', [0, 1, 1]),
  ],
)
def test_overlaps_and_unlabelled_pixels(convert, tmp_path, flags, values):
  write_coco(tmp_path / 'export', [IMAGE], [SMALL, BIG])
  convert('--unlabelled', *flags.split())
  mask = masks_in(tmp_path / 'data')['a']
  assert mask[[5, 15, 25], [5, 15, 25]].tolist() == values


def test_what_is_bad_is_named_and_counted(convert, tmp_path, capsys):
  line = SMALL | {'id': 3, 'segmentation': [[1, 2, 3, 4]]}
  lost = SMALL | {'id': 4, 'image_id': 9}
  unknown = SMALL | {'id': 5, 'category_id': 7}
  write_coco(tmp_path / 'export', [IMAGE], [BIG, line, line, lost, unknown])
  said = refused('nothing was written: 4 bad', convert, '--unlabelled=leaf')
  assert '2: has fewer than 3 points (a.json, annotation 3,' in said
  assert '1: belongs to no image of the file (a.json, annotation 4)' in said
  assert os.listdir(tmp_path) == ['export']
  convert('--unlabelled=background', '--skip')
  assert 'left out: 4 bad annotations' in capsys.readouterr().out
  # What can be drawn is ignored, and no background.
  mask = masks_in(tmp_path / 'data')['a']
  assert mask[[5, 15, 25], [5, 15, 25]].tolist() == [0, 1, 255]


def test_pictures_without_a_shape_or_annotation_are_told(
  convert, tmp_path, capsys
):
  more = [IMAGE | {'id': i, 'file_name': f'{i}.jpg'} for i in (2, 3)]
  write_coco(tmp_path / 'export', more, [])  # Written over, but for pictures.
  write_coco(tmp_path / 'export', [IMAGE, more[0]], [BIG])
  convert('--unlabelled', 'background')
  said = capsys.readouterr().out
  assert '\n1 picture without a shape: a.json, 2.jpg\n' in said
  assert '\n1 picture without annotation, left out: images/3.jpg\n' in said
  assert sorted(masks_in(tmp_path / 'data')) == ['2', 'a']


@pytest.mark.parametrize(('used', 'names'), [(1, NAMES), (0, ('all', *NAMES))])
def test_the_category_above_all_others_may_be_a_class(
  convert, tmp_path, used, names
):
  """Roboflow's first is none, as long as no shape is of it."""
  rows = [BIG | {'category_id': used}]
  write_coco(tmp_path / 'export', [IMAGE], rows, ('all', *NAMES))
  for name in NAMES:
    old, new = f'"{name}"', f'"{name}", "supercategory": "all"'
    spoil(tmp_path / 'export' / 'a.json', old.encode(), new.encode())
  convert('--unlabelled', 'background')
  labels = read_classes(tmp_path / 'data' / 'classes.txt').labels
  assert labels.classes == ('background', *names)


def test_the_split_test_is_evaluated_if_there_is_no_val(
  convert, tmp_path, capsys
):
  annotated.yolo(tmp_path / 'export')
  spoil(tmp_path / 'export/data.yaml', b'val: images/val\n', b'')
  spoil(tmp_path / 'export/data.yaml', b'../test/images', b'images/val')
  convert('--unlabelled', 'background')
  said = capsys.readouterr().out
  assert said.count(' --config.data.eval_split=test ') == 2


def test_names_that_are_no_plain_line_are_kept(convert, tmp_path):
  names = ['1: a, b', 'route 1 2 3', 'ignore']
  rows = [BIG, SMALL, SMALL | {'category_id': 2}]
  write_coco(tmp_path / 'export', [IMAGE], rows, names)
  convert('--unlabelled', 'ignore')
  labels = read_classes(tmp_path / 'data' / 'classes.txt').labels
  assert list(labels.classes) == names[:2]
  # What is called so counts as little as what nobody has drawn.
  mask = masks_in(tmp_path / 'data')['a']
  assert mask[[5, 15, 25], [5, 15, 25]].tolist() == [255, 0, 255]


def test_pictures_are_links_or_copies(convert, tmp_path):
  write_coco(tmp_path / 'export', [IMAGE], [BIG, SMALL])
  source = tmp_path / 'export' / 'images' / 'a.jpg'
  convert('--unlabelled', 'ignore')
  assert (tmp_path / 'data/images/a.jpg').readlink() == source
  copies = tmp_path / 'copies'
  convert('--unlabelled=ignore', '--copy', '--data_dir', copies)
  copy = copies / 'images/a.jpg'
  assert not copy.is_symlink()
  assert copy.read_bytes() == source.read_bytes()


def test_pictures_may_have_bands_that_pillow_does_not_know(convert, tmp_path):
  write_coco(tmp_path / 'export', [IMAGE], [BIG, SMALL])
  folder = tmp_path / 'export' / 'images'
  (folder / 'a.jpg').unlink()
  pixels = np.zeros((*SIZE, 6), np.uint16)
  tifffile.imwrite(folder / 'a.tif', pixels, **CONTIGUOUS)
  spoil(tmp_path / 'export' / 'a.json', b'a.jpg', b'a.tif')
  convert('--unlabelled', 'background')
  data = tmp_path / 'data'
  assert_array_equal(tifffile.imread(data / 'images' / 'a.tif'), pixels)
  assert masks_in(data)['a'][[5, 15, 25], [5, 15, 25]].tolist() == [0, 1, 2]


def test_pictures_may_be_arrays(convert, tmp_path):
  """Next to a picture of the same name one is none."""
  write_coco(tmp_path / 'export', [IMAGE], [BIG, SMALL])
  folder = tmp_path / 'export' / 'images'
  np.save(folder / 'a.npy', np.zeros((9, 9)))
  spoil(tmp_path / 'export' / 'a.json', b'a.jpg', b'a')
  words = '--unlabelled', 'background'
  convert(*words, '--data_dir', tmp_path / 'picture')
  assert masks_in(tmp_path / 'picture')['a'].shape == SIZE
  (folder / 'a.jpg').unlink()
  refused(r'a picture of another size .* \[9, 9\] instead', convert, *words)
  pixels = np.random.default_rng(0).random((*SIZE, 6))
  np.save(folder / 'a.npy', pixels)
  spoil(tmp_path / 'export' / 'a.json', b'"a"', b'"a.npy"')
  convert(*words)
  data = tmp_path / 'data'
  assert_array_equal(np.load(data / 'images' / 'a.npy'), pixels)
  assert masks_in(data)['a'][[5, 15, 25], [5, 15, 25]].tolist() == [0, 1, 2]


def test_shapes_of_cvat(convert, tmp_path):
  """Boxes, turned ones and masks, in their layers."""
  annotated.write_pictures(tmp_path / 'export')
  about = '<image id="0" name="train/0.jpg" width="80" height="60">{}</image>'
  shapes = (
    '<mask label="leaf" rle="1, 2, 3" left="70" top="1" width="3" height="2"/>'
    '<box label="leaf" xtl="10" ytl="10" xbr="20" ybr="14" z_order="1"/>'
    '<box label="flower" xtl="10" ytl="10" xbr="20" ybr="30"/>'
    '<box label="leaf" xtl="40" ytl="10" xbr="60" ybr="20" rotation="90"/>'
    '<tag label="x"/>'
  )
  labels = ''.join(f'<label><name>{x}</name></label>' for x in NAMES)
  text = f'<annotations>{labels}{about.format(shapes)}</annotations>'
  (tmp_path / 'export' / 'a.xml').write_text(text)
  convert('--unlabelled', 'background')
  (mask,) = masks_in(tmp_path / 'data').values()
  assert_array_equal(mask[1:3, 70:73], [[0, 1, 1], [0, 0, 0]])
  assert_array_equal(mask[10:30, 15], np.repeat([1, 2], [4, 16]))
  assert_array_equal(mask[5:25, 45:55], 1)
  assert (mask == 1).sum() == 2 + 40 + 200
  assert (mask == 2).sum() == 160


def test_voc_without_a_label_map_has_palette_indices(convert, tmp_path, capsys):
  """255 is the border of objects; a mask of another size is left out whole."""
  folder = tmp_path / 'export' / 'VOC2012'
  for kind in ('JPEGImages', 'SegmentationClass'):
    (folder / kind).mkdir(parents=True)
  mask = np.zeros(SIZE, np.uint8)
  mask[:9], mask[9:20] = 20, 255
  for name, of in (('a', mask), ('b', mask[1:])):
    (folder / f'JPEGImages/{name}.jpg').write_bytes(
      encode(annotated.image_of(name), '.jpg')
    )
    picture = Image.fromarray(of)
    picture.putpalette(np.random.default_rng(0).bytes(768))
    picture.save(folder / f'SegmentationClass/{name}.png')
  stopped(convert, tmp_path, '1: has a mask of another size', '--copy')
  convert('--skip')
  assert "no labelmap.txt: Pascal VOC's 21 classes" in capsys.readouterr().out
  (name, found), *rest = masks_in(tmp_path / 'data').items()
  assert_array_equal(found, mask)
  assert (name, rest) == ('VOC2012/a', [])
  labels = read_classes(tmp_path / 'data' / 'classes.txt').labels
  assert (len(labels.classes), labels.classes[20]) == (21, 'tvmonitor')


# ---- Bad inputs --------------------------------------------------------------

COCO = [
  ({'annotations': 3}, 'annotations is 3; it must be a list of objects'),
  ({'images': [{'id': 1}]}, 'it has no file_name'),
  ({'images': [IMAGE | {'id': []}]}, r'id is \[\]; it must be a whole number'),
  ({'categories': [{'id': 1}]}, 'it has no name'),
  ({'categories': []}, 'the classes background; .* two. Annotate another'),
  ({'images': [IMAGE | {'width': 9}]}, '1: has a picture of another size'),
  ({'images': [IMAGE | {'file_name': '../../a.png'}]}, '1: has no picture'),
  (
    {'images': [IMAGE, IMAGE | {'id': 2}]},
    '1: has a picture of the same name',
  ),
  ({'annotations': []}, '1: no picture has a shape'),
  ({'annotations': [BIG | {'category_id': 7}]}, "the class 'category 7'"),
  ({'annotations': [BIG | {'category_id': {}}]}, "the class 'category {}'"),
  ({'annotations': [BIG | {'image_id': None}]}, 'image_id is None'),
]
OUTLINES = [
  (None, 'has no outline'),
  ([], 'has no outline'),
  (5, 'has no outline'),
  ([[1, 2, 3, 4]], 'has fewer than 3 points'),
  ([[1, 2, 3, 4, 5]], 'points that are no pairs of numbers'),
  ([['a', 'b', 'c', 'd', 'e', 'f']], 'no pairs of numbers'),
  ([[1e9, 2, 3, 4, 5, 6]], 'lies outside of its picture'),
  ([[float('nan'), 2, 3, 4, 5, 6]], 'has points that are NaN'),
  ([square(90, 5, 99, 9)], 'lies outside of its picture'),
  ([[0, 0, 80, 60] * 2**16], 'has an outline that is too long'),
  ({'counts': [3, 9999]}, 'run lengths for another size'),
  ({'counts': [5, -5, 4800]}, 'run lengths for another size'),
  ({'counts': [2**63]}, 'run lengths'),
  ({'counts': 'zz~~'}, 'run lengths that are damaged'),
  ({'counts': '1'}, 'run lengths for another size'),
  ({'counts': [4800], 'size': [80, 60]}, 'run lengths for another size'),
  ({}, 'run lengths'),
]
COCO += [({'annotations': [BIG | {'segmentation': x}]}, y) for x, y in OUTLINES]


@pytest.mark.parametrize(('change', 'message'), COCO)
def test_bad_coco(convert, tmp_path, change, message):
  write_coco(tmp_path / 'export', [IMAGE], [BIG])
  path = tmp_path / 'export' / 'a.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  stopped(convert, tmp_path, message)


def stopped(convert, root, message, *flags):
  """One clear error, and nothing is written."""
  flags = flags or ('--unlabelled', 'background')
  said = refused(message, convert, *flags)
  assert 'fault of resnest-jax' not in said
  assert [x for x in os.listdir(root) if x != 'export'] == []


SHAPES = {'label': 'leaf', 'points': [[1, 2], [30, 4], [5, 30]]}
LABELME = [
  ([{'label': 3}], 'no list of shapes with labels'),
  ([[]], 'no list of shapes with labels'),
  ([SHAPES | {'points': [[1, 2]]}], 'has fewer than 3 points'),
  ([SHAPES | {'points': 'abc'}], 'no pairs of numbers'),
  ([SHAPES | {'shape_type': 'blob'}], 'of the kind blob, which is not drawn'),
  ([SHAPES | {'shape_type': 'mask', 'mask': 'AAAA'}], 'a mask that cannot be'),
  ([SHAPES | {'shape_type': 'mask', 'mask': 5}], 'a mask that is damaged'),
  (None, 'no list of shapes with labels'),
]


@pytest.mark.parametrize(('shapes', 'message'), LABELME)
def test_bad_labelme(convert, tmp_path, shapes, message):
  (tmp_path / 'export').mkdir()
  picture = encode(annotated.image_of('a'), '.jpg')
  for name, of in (('good', [SHAPES]), ('bad', shapes)):
    (tmp_path / 'export' / f'{name}.jpg').write_bytes(picture)
    text = json.dumps({'shapes': of})
    (tmp_path / 'export' / f'{name}.json').write_text(text)
  stopped(convert, tmp_path, f'1: .*{message}.*bad.json')


def spoil(path, old, new):
  path.write_bytes(path.read_bytes().replace(old, new))


DAMAGED = [
  ('cvat', 'train.xml', b'</image>', b'', r'as XML of .*Export it again'),
  ('cvat', 'train.xml', b'polygon', b'polyline', 'polyline, which is not'),
  ('cvat', 'train.xml', b'n label="leaf', b'n label="tree', "the class 'tree'"),
  ('cvat', 'train.xml', b'points="', b'points="a,b;', 'missing or damaged'),
  ('cvat', 'train.xml', b'<image ', b'<track/><image ', 'CVAT for video'),
  (
    'yolo',
    'data.yaml',
    b'names: [leaf, flower]',
    b'names: 3',
    'no list "names',
  ),
  (
    'yolo',
    'data.yaml',
    b'images/val',
    b'images/test',
    'no ../images/test|no im',
  ),
  ('yolo', 'data.yaml', b'[leaf', b'[[leaf', 'no list "names'),
  ('yolo', 'labels/train/0.txt', b'0 ', b'7 ', "the class 'number 7'"),
  ('yolo', 'labels/train/0.txt', b'.', b'x', 'no pairs of numbers'),
  ('roboflow', 'val/_classes.csv', b'leaf', b'tree', 'the classes differ'),
  (
    'coloured',
    'classes.txt',
    b'34 139',
    b'35 139',
    r"5: .* the class '\(34, 139, 34\)'",
  ),
  ('coloured', 'classes.txt', b' 34 139 34', b'', 'gives no colour for leaf'),
  ('voc', 'labelmap.txt', b'34,139', b'35,139', r"the class '\(34, 139"),
  ('voc', 'ImageSets/Segmentation/val.txt', b'3', b'9', 'has no mask'),
  ('parquet', 'val-00000-of-00001.parquet', b'PAR1', b'PAR2', 'no parquet'),
  (
    'panoptic',
    'annotations/panoptic_val.json',
    b'"id":',
    b'"i":',
    'no categ|id',
  ),
]


@pytest.mark.parametrize(('form', 'file', 'old', 'new', 'message'), DAMAGED)
def test_damaged_exports(convert, tmp_path, form, file, old, new, message):
  WRITERS[form](tmp_path / 'export')
  spoil(tmp_path / 'export' / file, old, new)
  stopped(convert, tmp_path, message)


def test_what_cannot_be_meant(convert, tmp_path):
  stopped(convert, tmp_path, 'there is no .*export; give the export')
  (tmp_path / 'export').mkdir()
  inside = '--data_dir', tmp_path / 'export' / 'data'
  stopped(convert, tmp_path, 'lies in .*export; give another', *inside)
  stopped(convert, tmp_path, 'may be anything; say what it is')
  write_coco(tmp_path / 'export', [IMAGE], [BIG])
  stopped(convert, tmp_path, 'Say what they are', '--skip')
  stopped(
    convert,
    tmp_path,
    'tree is none of the classes leaf',
    '--unlabelled',
    'tree',
  )
  stopped(convert, tmp_path, 'no files of the format cvat', '--format', 'cvat')
  stopped(convert, tmp_path, 'no folder x; correct', '--pictures', 'x')
  inside = '--data_dir', tmp_path / 'export' / 'a.json' / 'data'
  stopped(convert, tmp_path, 'or give another --data_dir.$', *inside)
  annotated.yolo(tmp_path / 'export')
  stopped(convert, tmp_path, 'may be .* or ')


HINTS = [
  ('a.zip', 'Unpack the archive first'),
  ('train/a_mask.png', 'come with _classes.csv'),
  ('train/labels/a.txt', 'data.yaml, which is missing there: .*names'),
  ('data.yaml', 'has a list "names" of its classes'),
  ('masks/a.jpg', 'export them as PNG'),
]


@pytest.mark.parametrize(('file', 'hint'), HINTS)
def test_what_is_nearly_a_format_gets_a_hint(convert, tmp_path, file, hint):
  path = tmp_path / 'export' / file
  path.parent.mkdir(parents=True)
  path.write_text('x')
  stopped(convert, tmp_path, rf'may be anything\. .*{hint}.*\. Or say what it')
  form = '--format', 'yolo'
  stopped(convert, tmp_path, rf'no files of the format yolo\. .*{hint}', *form)


def test_a_package_that_is_missing_is_named(convert, tmp_path, monkeypatch):
  write_coco(tmp_path / 'export', [IMAGE], [BIG])
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  stopped(convert, tmp_path, 'pip install pycocotools')


def test_parquet_without_names(convert, tmp_path):
  """A class of the whole picture is no name of a mask's value."""
  annotated.parquet(tmp_path / 'export')
  features = {'image': {'_type': 'Image'}, 'scene': {'names': ['in', 'out']}}
  about = json.dumps({'info': {'features': features}})
  for path in (tmp_path / 'export').iterdir():
    table = pyarrow.parquet.read_table(path)
    table = table.replace_schema_metadata({'huggingface': about})
    pyarrow.parquet.write_table(table, path)
  stopped(convert, tmp_path, 'a name in each line')
  stopped(convert, tmp_path, 'Name those of', '--columns', 'image', 'x')
  names = {str(i): x for i, x in enumerate(('sky', *NAMES))}
  (tmp_path / 'export' / 'id2label.json').write_text(json.dumps(names))
  convert()
  labels = read_classes(tmp_path / 'data' / 'classes.txt').labels
  assert labels.classes == ('sky', *NAMES)
