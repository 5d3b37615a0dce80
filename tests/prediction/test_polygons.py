"""Label maps as polygons, and back by the rules of annotation tools."""

import json

import cv2
import numpy as np
import pytest
from data.pictures import blocks
from data.refusals import refused
from evaluation.drawn import smooth_picture, write_video
from matplotlib.path import Path as Outline
from PIL import Image

from resnest_jax.data.annotations import raster
from resnest_jax.data.annotations.command import main as own
from resnest_jax.data.datasets import PreparedSplit
from resnest_jax.inference.predictions import Prediction
from resnest_jax.prediction.polygons import (
  COCO,
  LABELME,
  outline,
  regions,
  write_coco,
  write_labelme,
)
from resnest_jax.prediction.sources import (
  check_names,
  find_sources,
  with_files,
)

CLASSES = tuple(f'class {k}' for k in range(151))


def predicted(labels, confidence=None):
  if confidence is None:
    confidence = np.full(labels.shape, 0.5, np.float32)
  return Prediction(labels, CLASSES, np.zeros((151, 3)), '', confidence)


def filled(ring, shape):
  """The pixels whose centres lie inside."""
  y, x = np.indices(shape) + 0.5
  inside = Outline(ring).contains_points(np.stack([x.ravel(), y.ravel()], 1))
  return inside.reshape(shape)


@pytest.fixture(scope='module')
def scenes(mini_data_dir):
  """Label maps of drawn scenes; what is to be ignored is one class more."""
  split = PreparedSplit('ade20k_mini', mini_data_dir, 'validation')
  labels = [split[i]['label'] for i in range(4)]
  return [np.where(x == 255, 150, x).astype(np.uint8) for x in labels]


@pytest.fixture(scope='module')
def coco(scenes, tmp_path_factory):
  file = tmp_path_factory.mktemp('coco') / 'coco.json'
  pictures = [
    (f'{k}.jpg', x.shape, regions(predicted(x))) for k, x in enumerate(scenes)
  ]
  write_coco(file, pictures, CLASSES)
  return file


def test_polygons_cover_the_pixels_of_their_regions_and_no_others(scenes, coco):
  about = json.loads(coco.read_text())
  assert [x['id'] for x in about['images']] == [1, 2, 3, 4]
  found = about['annotations']
  assert [x['id'] for x in found] == list(range(1, len(found) + 1))
  drawn = [np.full(x.shape, 255, np.uint8) for x in scenes]
  loaded = [x.copy() for x in drawn]
  for each in found:
    canvas = drawn[each['image_id'] - 1]
    (corners,) = each['segmentation']
    x, y, width, height = each['bbox']
    ring = np.reshape(corners, (-1, 2)) - (x, y)
    mask = filled(ring, (height, width))
    assert each['area'] == mask.sum()
    place = canvas[y : y + height, x : x + width]
    assert (place[mask] == 255).all()  # Each pixel once.
    place[mask] = each['category_id'] - 1
    theirs = raster.polygons(each['segmentation'], *canvas.shape)
    loaded[each['image_id'] - 1][theirs] = each['category_id'] - 1
  for one, labels in zip(drawn, scenes, strict=True):
    np.testing.assert_array_equal(one, labels)
  # As pycocotools draws them: the IoU of each class.
  pixels, labels = (
    np.concatenate([*map(np.ravel, x)]) for x in (loaded, scenes)
  )
  for k in np.unique(labels):
    both, either = (pixels == k) & (labels == k), (pixels == k) | (labels == k)
    assert both.sum() >= 0.99 * either.sum()
  corners = sum(len(x['segmentation'][0]) / 2 for x in found)
  sides = sum((np.diff(x, axis=k) != 0).sum() for x in scenes for k in (0, 1))
  assert corners < 0.5 * sides


def test_labelme_gives_the_mask_within_a_pixel_of_the_outline(scenes, tmp_path):
  for labels in scenes:
    file = tmp_path / 'out' / 'deep' / 'a.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    write_labelme(predicted(labels), tmp_path / 'pictures/a.jpg', file)
    about = json.loads(file.read_text())
    assert about['imagePath'] == '../../pictures/a.jpg'
    canvas = np.full((about['imageHeight'], about['imageWidth']), 255)
    for shape in about['shapes']:
      mask = raster.labelme(shape, *canvas.shape)
      canvas[mask] = CLASSES.index(shape['label'])
    wrong = canvas != labels
    near = np.ones((3, 3), np.uint8)
    outlines = cv2.dilate(labels, near) != cv2.erode(labels, near)
    assert not (wrong & ~outlines).any()
    assert wrong.mean() < 0.02


def test_holes_are_cut_into_the_outline():
  inside = blocks(np.random.default_rng(3), 60, 60, 3, 4, ignored=0) > 0
  inside[:1], inside[-1:], inside[:, :1], inside[:, -1:] = [True] * 4
  _, numbers = cv2.connectedComponents(np.uint8(inside), connectivity=4)
  inside = numbers == numbers[0, 0]
  holes, _ = cv2.connectedComponents(np.uint8(~inside), connectivity=8)
  assert holes > 8
  for level in COCO, LABELME:
    ring = outline(inside, level).ravel().tolist()
    drawn = raster.polygons([ring], *inside.shape)
    np.testing.assert_array_equal(drawn, inside)
  pixel = outline(np.ones((1, 1), bool), LABELME).tolist()
  assert sorted(pixel) == [[0.25, 0.5], [0.5, 0.25], [0.5, 0.75], [0.75, 0.5]]


def test_confidence_is_the_mean_of_the_region(tmp_path):
  labels = np.uint8([[0, 0, 1], [0, 2, 2]])
  confidence = np.float32([[0.9, 0.8, 0.5], [0.7, 0.4, 0.6]])
  write_labelme(predicted(labels, confidence), tmp_path, tmp_path / 'a.json')
  shapes = json.loads((tmp_path / 'a.json').read_text())['shapes']
  assert [(x['label'], x['score']) for x in shapes] == [
    *(('class 0', 0.8), ('class 2', 0.5), ('class 1', 0.5))
  ]


def test_names_that_polygons_cannot_have(tmp_path):
  for name in 'classes.jpg', 'a.jpg':
    Image.fromarray(smooth_picture()).save(tmp_path / name)
  (a,) = with_files(find_sources([tmp_path / 'a.jpg']), (), 'labelme')
  assert {k: str(x) for k, x in a.files.items()} == {'labelme': 'a.json'}
  both = find_sources([tmp_path])
  check_names(with_files(both, None, 'coco'), 'coco')
  told = 'classes.jpg would both be written to classes.json'
  refused(told, check_names, with_files(both, None, 'labelme'), 'labelme')
  write_video(tmp_path / 'clip.avi', 2, 5, size=(32, 32))
  told = 'polygons is for pictures, and .*clip.avi is a video'
  refused(told, check_names, find_sources([tmp_path]), 'coco')
  named = with_files(find_sources([tmp_path]), ['confidence'])
  refused('confidence is for pictures, and .*clip.avi', check_names, named)


@pytest.mark.parametrize('kind', ['coco', 'labelme'])
def test_predict_writes_polygons(written_run, call_script, tmp_path, kind):
  pictures = tmp_path / 'pictures'
  pictures.mkdir()
  Image.fromarray(smooth_picture(77, 123)).save(pictures / 'a.png')
  flags = '--weights', written_run, '--image_scale', 256, 64, '--save', 'masks'
  out = tmp_path / 'out'
  bad = tmp_path / 'bad.png'
  bad.touch()
  words = *flags, '--polygons', kind, '--out', tmp_path / 'none', bad
  refused('1 of 1 could not be read', call_script, 'predict.py', *words)
  assert not [*tmp_path.glob('none/*')]
  words = *flags, '--polygons', kind, '--out', out, pictures
  call_script('predict.py', *words)
  labels = np.asarray(Image.open(out / 'a.png'))
  classes = json.loads((out / 'classes.json').read_text())['classes']
  drawn = np.full(labels.shape, 255, np.uint8)
  if kind == 'coco':
    found = json.loads((out / 'coco.json').read_text())['annotations']
    rings = [x['segmentation'] for x in found]
    values = [x['category_id'] - 1 for x in found]
  else:
    found = json.loads((out / 'a.json').read_text())['shapes']
    rings = [[np.ravel(x['points']).tolist()] for x in found]
    values = [classes.index(x['label']) for x in found]
  for ring, value in zip(rings, values, strict=True):
    drawn[raster.polygons(ring, *labels.shape)] = value
  np.testing.assert_array_equal(drawn, labels)
  assert all(1 / 150 < x['score'] <= 1 for x in found)
  # As after corrections in an annotation tool.
  words = str(out), '--data_dir', f'{tmp_path}/data', '--unlabelled=ignore'
  refused('are no photographs. Give .* --pictures', own, words)
  own([*words, f'--pictures={pictures}'])
  mask = np.asarray(Image.open(tmp_path / 'data/masks/a.png'))
  assert (mask != labels).mean() <= (0.02 if kind == 'labelme' else 0)
  assert (tmp_path / 'data/images/a.png').readlink() == pictures / 'a.png'
