"""Exports of C2 to C5: they are the checkpoint's, and say what they are."""

import json
import re
from unittest import mock

import numpy as np
import onnxruntime
import pytest
from cards import run_card
from golden.reference import quick_jit, variables_of
from PIL import Image
from weights.built import refused, written

import resnest_jax as rj
from resnest_jax.export import checks, folder, pictures
from resnest_jax.export.renew import renew_exports

SIZE = (65, 96)
STRIDES = {'c2': 4, 'c3': 8, 'c4': 16, 'c5': 16}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A file of a classifier with the normalisation of detectron2."""
  model = rj.create_classifier('resnest14', 10, stem_width=8, width=8)
  network = model, variables_of(model)
  path = tmp_path_factory.mktemp('source')
  return written(path / 'x', network, 'detectron2')


@pytest.fixture(scope='module')
def exported(source, tmp_path_factory):
  out = tmp_path_factory.mktemp('exported') / 'out'
  more = {'formats': ['stablehlo', 'onnx'], 'sizes': [SIZE], 'features': 16}
  said = []
  exports = folder.export_model(source, out, say=said.append, **more)
  return out, exports, said


def features_of(source, images):
  """Those of the checkpoint, of pictures normalised here."""
  model, variables, about = rj.load_backbone(source, output_stride=16)
  mean, std = (np.array(about['normalization'][x]) for x in ('mean', 'std'))
  assert mean[0] == 123.68
  x = ((images - mean) / std).astype(np.float32)
  return quick_jit(lambda v: model.apply(v, x, train=False))(variables)


def test_files_give_the_features_of_the_checkpoint(exported, source):
  out, exports, said = exported
  names = ['features_65x96.stablehlo', 'features_65x96.onnx']
  assert [x.file for x in exports] == names
  assert min(x.agreement for x in exports) > 1 - 1e-4
  line = r'onnx .* features of 20 pictures are within \d\.\de-'
  assert re.search(line, '\n'.join(said))
  assert 'note: trained at output stride 32' in said
  session = onnxruntime.InferenceSession((out / names[1]).read_bytes())
  images = np.random.default_rng(5).integers(0, 256, (3, *SIZE, 3), np.uint8)
  found = session.run(None, {'images': images})
  assert [x.name for x in session.get_outputs()] == list(STRIDES)
  expected = features_of(source, images)
  for level, (name, stride) in zip(found, STRIDES.items(), strict=True):
    assert level.shape[1:3] == (-(-65 // stride), -(-96 // stride))
    most = abs(np.asarray(expected[name])).max()
    np.testing.assert_allclose(level, expected[name], atol=1e-4 * most)


def test_card_says_what_they_are_and_runs(exported, source, tmp_path):
  out, _, _ = exported
  about = json.loads((out / 'about.json').read_text())
  assert about['features']['c5'] == {'stride': 16, 'channels': 256}
  text = (out / 'README.md').read_text()
  assert '# Features of a ResNeSt of (1, 1, 1, 1) blocks\n' in text
  assert '| c4 | 16 | (b, ceil(H / 16), ceil(W / 16), 128) |' in text
  assert 'as RGB, mean [123.68, 116.779, 103.939], deviation [58.3' in text
  assert 'classes' not in text
  file = out / 'features_65x96.stablehlo'
  last = "np.save('c4.npy', np.asarray(c4))\n"
  run_card(file, pictures.gather_pictures([])[3], last, tmp_path)
  resized = Image.open(tmp_path / 'street.jpg').resize(SIZE[::-1])
  expected = features_of(source, np.asarray(resized)[None])['c4']
  np.testing.assert_allclose(np.load(tmp_path / 'c4.npy'), expected, atol=1e-3)


def compare(*levels):
  expected = [np.full((1, 2), 4.0), np.ones((1, 2))]
  return checks.compare_features('x', [(levels, expected)])


def test_one_in_a_thousand_of_the_largest_may_differ():
  ones = np.ones((1, 2))
  assert compare(4 * ones, ones) == 1
  assert compare(4.002 * ones, ones) == pytest.approx(1 - 5e-4)
  for wrong in (1.002 * ones, np.nan * ones, np.inf * ones):
    refused('features of x differ from the ch', compare, 4 * ones, wrong)


WRONG = [
  ({'formats': ['safetensors']}, 'StableHLO and ONNX alone, .* --formats stab'),
  ({'formats': ['onnx'], 'probabilities': True}, 'without probabilities'),
  ({'formats': ['stablehlo'], 'features': 4}, 'accepted are 8, 16, 32'),
]


@pytest.mark.parametrize(('options', 'said'), WRONG)
def test_what_is_no_export_of_features(options, said, source, tmp_path):
  options = {'features': 32} | options
  refused(said, folder.export_model, source, tmp_path / 'x', **options)
  assert not (tmp_path / 'x').exists()


def test_features_are_not_renewed(exported):
  refused(r'has features.* --features --out NEW', renew_exports, exported[0])


def test_command(call_script, source, tmp_path, monkeypatch):
  export = mock.Mock()
  monkeypatch.setattr(folder, 'export_model', export)
  command = ('export.py', '--weights', source, '--out', tmp_path / 'x')
  given = []
  for more in ((), ('--features',), ('--features', '8')):
    call_script(*command, *more)
    options = export.call_args.kwargs
    given.append((options['features'], options['formats']))
  formats = ['stablehlo', 'safetensors']
  assert given == [(None, formats), (32, formats[:1]), (8, formats[:1])]
