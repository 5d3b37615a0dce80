"""Exports of a classifier: that they agree, run alone, and are renewed."""

import json
import os
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from cards import run_card
from evaluation.class_runs import EDGE, NAMES, logits_of, write_weights
from evaluation.drawn import smooth_picture
from golden.reference import assert_same_bits
from PIL import Image
from scipy.special import softmax
from weights.built import refused

import resnest_jax as rj
from resnest_jax.data.crops import center_crop
from resnest_jax.export import folder, stablehlo
from resnest_jax.export.renew import renew_exports
from resnest_jax.weights import pretrained
from resnest_jax.weights.state_dict import export_state_dict

SIZE = (EDGE, EDGE)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """All exports of weights: their folder, the model and its variables."""
  root = tmp_path_factory.mktemp('classes')
  network = write_weights(root / 'weights')
  out = root / 'out'
  folder.export_model(root / 'weights', out, formats=folder.CLASS_FORMATS)
  return out, *network


def test_programs_give_the_checkpoints_probabilities(exported):
  out, *network = exported
  images = np.stack([smooth_picture(*SIZE, i) for i in range(5)])
  wanted = softmax(logits_of(*network, images), 1)
  assert len({*wanted.argmax(1)}) > 1
  session = onnxruntime.InferenceSession(f'{out}/model_48x48.onnx')
  program = stablehlo.read_stablehlo(out / 'model_48x48.stablehlo')
  for found in (session.run(None, {'images': images}), program(images)):
    (probabilities,) = map(np.asarray, found)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, wanted, atol=1e-5)


def test_weights_go_out_and_come_back_by_other_names(exported):
  out, *network = exported
  original = export_state_dict(*network, 'ours')
  for kind in ('timm', 'official'):
    file = out / f'model_{kind}.pth'
    theirs = torch.load(file)['state_dict']
    theirs = {name: tensor.numpy() for name, tensor in theirs.items()}
    assert_same_bits(theirs, export_state_dict(*network, kind))
    assert theirs['fc.weight'].shape == (len(NAMES), 256)
    weights = pretrained.load_weights(file)
    assert (weights.kind, weights.classes) == ('official', NAMES)
    assert_same_bits(export_state_dict(*weights.create(), 'ours'), original)


def test_card_classifies_as_the_predictor(exported, tmp_path):
  out, *_ = exported
  text = (out / 'README.md').read_text()
  assert '| 1 | bee \\| wasp |' in text
  show = 'print([best.tolist(), probabilities[0].tolist()])'
  given = out / 'model_48x48.onnx', smooth_picture(97, 75), show, tmp_path
  best, probabilities = json.loads(run_card(*given, ['jax']))
  # The exported folder is a source of weights, too.
  found = rj.from_checkpoint(out).predict(tmp_path / 'street.jpg')
  np.testing.assert_allclose(probabilities, found.probabilities, atol=1e-5)
  assert [NAMES[i] for i in best] == [name for name, _ in found.top()]


@pytest.mark.parametrize(('rule', 'size'), [('encoding', 64), ('gluon', 48)])
def test_card_cuts_pictures_as_the_evaluation_at_each_size(
  rule, size, tmp_path
):
  source, out = tmp_path / 'source', tmp_path / 'out'
  write_weights(source, rule)
  folder.export_model(source, out, formats=['onnx'], sizes=[(size, size)])
  rng = np.random.default_rng(3)
  picture = rng.integers(0, 256, (150, 131, 3), np.uint8)  # Sharp.
  show = 'image.save("seen.png"); print(probabilities[0].tolist())'
  given = out / f'model_{size}x{size}.onnx', picture, show, tmp_path
  probabilities = json.loads(run_card(*given, ['jax']))
  seen = np.array(Image.open(tmp_path / 'seen.png'), np.int32)
  street = np.array(Image.open(tmp_path / 'street.jpg'))
  assert np.abs(seen - center_crop(street, size, rule)).max() <= 1
  model = rj.from_checkpoint(source, image_scale=(size, size))
  expected = model.predict(tmp_path / 'street.jpg').probabilities
  np.testing.assert_allclose(probabilities, expected, atol=0.01)


def wrong_program(images):
  return (np.full((len(images), len(NAMES)), 1 / len(NAMES), np.float32),)


FAILS = (
  ({'formats': ['mmseg']}, 'mmseg is no format of a classifier; accepted are'),
  ({'probabilities': True}, 'leave --probabilities out'),
  ({}, r'of 20 pictures the checkpoint.s class, and prob'),
)


@pytest.mark.parametrize(('options', 'message'), FAILS)
def test_what_fails_leaves_nothing(
  options, message, exported, monkeypatch, tmp_path
):
  wrong = mock.Mock(return_value=wrong_program)
  monkeypatch.setattr(stablehlo, 'read_stablehlo', wrong)
  given = exported[0], tmp_path / 'out'
  refused(message, folder.export_model, *given, **options)
  assert os.listdir(tmp_path) == []


def test_programs_are_renewed(exported):
  out, *network = exported
  before = (out / 'about.json').read_text()
  (out / 'model_48x48.stablehlo').write_bytes(b'of another time')
  renew_exports(out, say=print)
  assert (out / 'about.json').read_text() == before
  images = np.zeros((1, *SIZE, 3), np.uint8)
  program = stablehlo.read_stablehlo(out / 'model_48x48.stablehlo')
  wanted = softmax(logits_of(*network, images), 1)
  np.testing.assert_allclose(program(images)[0], wanted, atol=1e-5)
