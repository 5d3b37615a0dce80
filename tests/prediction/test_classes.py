"""`predict.py` with a classifier."""

import json

import cv2
import numpy as np
import pytest
from evaluation import class_runs
from evaluation.drawn import smooth_picture, write_video
from scipy.special import softmax

import resnest_jax as rj
from resnest_jax.data import crops
from resnest_jax.errors import UserError
from resnest_jax.inference import predictor
from resnest_jax.inference.protocols import CenterCrop
from resnest_jax.labels import IMAGENET
from resnest_jax.prediction.files import predict_files
from resnest_jax.weights import infer, pretrained


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """Weights, and a folder of 23 pictures with the probabilities of each."""
  root = tmp_path_factory.mktemp('source')
  class_runs.write_weights(root / 'weights')
  paths, images = [], []
  for i in range(23):
    folder = root / 'pictures' / ('a' if i % 2 else 'b')
    folder.mkdir(parents=True, exist_ok=True)
    paths.append(folder / f'{i // 2}.png')
    images.append(smooth_picture(50 + i % 3, 70 + i % 4, i))
    cv2.imwrite(str(paths[-1]), images[-1][..., ::-1])
  cropped = [crops.center_crop(x, class_runs.EDGE, 'encoding') for x in images]
  logits = class_runs.logits_of(*class_runs.network(), np.stack(cropped))
  return root / 'weights', dict(zip(paths, softmax(logits, 1), strict=True))


def test_pictures_get_the_classes_of_their_middle(source, tmp_path, capsys):
  weights, expected = source
  out, folders = tmp_path / 'out', {str(path.parent) for path in expected}
  (bad := tmp_path / 'bad.jpg').write_text('no picture')
  with pytest.raises(UserError, match='1 of 24 could not be read'):
    predict_files([*sorted(folders), bad], weights, out, batch_size=5)
  assert [path.name for path in out.iterdir()] == ['predictions.json']
  about = json.loads((out / 'predictions.json').read_text())
  assert about['protocol']['name'] == 'center_crop'
  assert [x['source'] for x in about['failed']] == [str(bad)]
  found = {x['source']: x['best'] for x in about['predictions']}
  assert set(found) == {str(path) for path in expected}
  for path, probabilities in expected.items():
    best = found[str(path)]
    order = np.argsort(-probabilities)[:5]
    assert [x['class'] for x in best] == [class_runs.NAMES[i] for i in order]
    given = [x['probability'] for x in best]
    np.testing.assert_allclose(given, probabilities[order], atol=1e-5)
  lines = capsys.readouterr().out.splitlines()
  first = next(iter(found))
  name, share = found[first][0].values()
  assert f'{first}: {name} {100 * share:.1f} %, ' in '\n'.join(lines)
  assert 'and 3 more' in lines


def test_predictor_takes_arrays_lists_and_streams(source):
  weights, expected = source
  model, paths = rj.from_checkpoint(weights, batch_size=4), [*expected]
  assert isinstance(model, rj.ClassPredictor)
  edge = class_runs.EDGE
  assert model.protocol == CenterCrop(edge, 'encoding')
  images = [cv2.imread(str(x))[..., ::-1] for x in paths]
  many = model.predict(images)
  streamed = list(model.predict_frames(images))
  wanted = np.stack([*expected.values()])
  for found in (many, streamed, [model.predict(paths[0])]):
    given = np.stack([x.probabilities for x in found])
    np.testing.assert_allclose(given, wanted[: len(given)], atol=1e-5)
    assert [x.label for x in found] == wanted[: len(given)].argmax(1).tolist()
  assert many[0].top(1) == [
    (class_runs.NAMES[many[0].label], many[0].probabilities.max())
  ]
  assert repr(many[0]).startswith(f'<ClassPrediction: {many[0].top(1)[0][0]} ')
  assert rj.from_checkpoint(weights, image_scale=(64, 64)).protocol.size == 64


REFUSED = (
  ({'save': ['masks']}, '--save is for segmentors'),
  ({'confidence': True}, '--confidence is for segmentors'),
  ({'legend': True}, '--legend is for segmentors'),
  ({'opacity': 0.2}, '--opacity is for segmentors'),
  ({'protocol': 'slide'}, "protocol is 'slide', which is for segmentors"),
  ({'flip': False}, 'flip is False, which is for segmentors'),
  ({'image_scale': (64, 32)}, 'twice one number of pixels'),
  ({}, r'and \S*/x\.avi is a video'),
)


@pytest.mark.parametrize(('options', 'message'), REFUSED)
def test_what_means_nothing_is_refused(options, message, source, tmp_path):
  weights, expected = source
  video = 'video' in message and write_video(tmp_path / 'x.avi')
  given = [video or next(iter(expected))]
  with pytest.raises(UserError, match=message):
    predict_files(given, weights, tmp_path / 'o', **options)
  assert not (tmp_path / 'o').exists()


def published(backbone, **fields):
  config = {'backbone': backbone, 'num_classes': 1000}
  description = infer.Description('classifier', config)
  more = None, None, pretrained.NORMALIZATION, {}
  return pretrained.Weights({}, 'official', description, *more, **fields)


def test_published_classifiers_see_what_they_were_evaluated_on():
  edges = {'resnest50': 224, 'resnest101': 256, 'resnest200': 320}
  edges |= {'resnest269': 416, 'resnest50_fast_2s1x64d': 224}
  for backbone, edge in edges.items():
    crop = predictor.center_crop_of(published(backbone))
    assert crop == CenterCrop(edge, 'encoding')
  assert predictor.center_crop_of(published('resnest26')).rule == 'gluon'
  trained = {'image_scale': [96, 96], 'center_crop': 'gluon'}
  crop = predictor.center_crop_of(published('resnest50', **trained))
  assert crop == CenterCrop(96, 'gluon')
  assert predictor.class_labels(published('resnest50')) is IMAGENET
