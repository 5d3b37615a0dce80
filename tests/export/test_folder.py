"""Exports of tiny networks: that they agree, run alone, and fail cleanly."""

import collections
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from evaluation.runs import STEP
from golden.reference import TINY, filled_variables
from lengths import others_long
from PIL import Image

import resnest_jax as rj
from resnest_jax.errors import UserError
from resnest_jax.export import folder as export_folder
from resnest_jax.export.checks import Reference
from resnest_jax.export.folder import FORMATS, export_model
from resnest_jax.export.pictures import gather_pictures
from resnest_jax.inference.predictor import Prediction
from resnest_jax.models import convolution
from resnest_jax.models.segmentor import HEADS
from resnest_jax.weights.files import read_weights, write_weights
from resnest_jax.weights.infer import Description
from resnest_jax.weights.pretrained import NORMALIZATION, Weights, load_weights
from resnest_jax.weights.state_dict import export_state_dict, variable_shapes

# Not square, and rows that no stride divides.
SIZE = (65, 64)
NAMES = ['wall', 'sky | clouds', 'tree', 'road', 'car', 'sea', 'dog']
PALETTE = [[30 * i, 7, 200] for i in range(7)]


def write_source(path, description, kind='ours'):
  """Weights of a tiny network, as convert writes them."""
  model = description.create()
  variables = filled_variables(variable_shapes(model))
  state_dict = export_state_dict(model, variables, kind)
  weights = Weights(
    *(state_dict, kind, description, NAMES, PALETTE, NORMALIZATION),
    {'source': 'drawn at random'},
  )
  write_weights(path, kind, state_dict, weights.about())


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """Weights of each head."""
  root = tmp_path_factory.mktemp('sources')
  for head in HEADS:
    config = TINY | {'dtype': 'float32', 'head': head}
    write_source(root / head, Description('segmentor', config))
  return root


@pytest.fixture(scope='module')
def exported(sources, tmp_path_factory):
  """exported(head): a folder of its exports, and what was said of them."""

  @functools.cache
  def export(head):
    out = tmp_path_factory.mktemp('exported') / head
    all_of_it = head == 'pspnet'
    with pytest.MonkeyPatch.context() as patch:
      if all_of_it:
        # So that the CPU's ways with wide convolutions would show.
        patch.setattr(convolution, 'ENOUGH_PAIRS', 1)
        patch.setattr(convolution, 'ENOUGH_PIXELS', 1)
      formats = FORMATS if all_of_it else FORMATS[:2]
      options = {'sizes': [SIZE], 'probabilities': head == 'fcn'}
      return out, export_model(sources / head, out, formats=formats, **options)

  return export


def assert_same_bits(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize('head', others_long(HEADS, 'pspnet'))
def test_head_agrees_with_its_checkpoint(head, exported, sources):
  out, exports = exported(head)
  assert [each.pictures for each in exports] == len(exports) * [20]
  assert all(each.agreement >= 0.999 for each in exports)
  # Not by its own account alone; and three pictures are as good as four.
  images = np.random.default_rng(5).integers(0, 256, (3, *SIZE, 3), np.uint8)
  model = rj.from_checkpoint(sources / head, image_scale=SIZE)
  expected = list(model.predict_frames(images, probabilities=head == 'fcn'))
  path = out / 'model_65x64.onnx'
  found = onnxruntime.InferenceSession(path).run(None, {'images': images})
  assert found[0].dtype == np.uint8
  labels = np.stack([each.labels for each in expected])
  assert len(np.unique(labels)) > 2
  assert (found[0] == labels).mean() >= 0.999
  if head == 'fcn':
    probabilities = np.stack([each.probabilities for each in expected])
    np.testing.assert_allclose(found[1], probabilities, atol=1e-4)


def test_onnx_has_folded_what_is_constant(exported):
  model = onnx.load(exported('pspnet')[0] / 'model_65x64.onnx')
  assert model.opset_import[0].version >= 17
  operations = collections.Counter(node.op_type for node in model.graph.node)
  # Normalisations: neither their roots nor, but for the four fc1, which have a
  # bias before it, their gains; two more weigh the splits of each block. That
  # of the bottleneck follows a sum, of the convolutions of map and pyramid.
  assert not operations.keys() & {'BatchNormalization', 'Sqrt', 'Reciprocal'}
  assert operations['Mul'] == 4 + 2 * 4 + 1
  assert operations['Conv'] == 3 + 2 * 4 + 1  # Stem, splits, head.
  shapes = [
    [dim.dim_value or dim.dim_param for dim in each.type.tensor_type.shape.dim]
    for each in [*model.graph.input, *model.graph.output]
  ]
  assert shapes == [['b', 65, 64, 3], ['b', 65, 64]]


@pytest.mark.parametrize(
  ('format_', 'absent'),
  [
    ('stablehlo', ['resnest_jax', 'flax', 'ml_collections', 'cv2']),
    ('onnx', ['resnest_jax', 'flax', 'jax', 'jaxlib', 'cv2']),
  ],
)
def test_card_runs_without_this_project(
  format_, absent, exported, sources, tmp_path
):
  out, _ = exported('pspnet')
  name = f'model_65x64.{format_}'
  section = (out / 'README.md').read_text().partition(f'## Run {name}\n')[2]
  code = re.search(r'```python\n(.*?)```', section, re.DOTALL)[1]
  image = gather_pictures([])[3]
  Image.fromarray(image).save(tmp_path / 'street.jpg', quality=95)
  (tmp_path / name).symlink_to(out / name)
  block = f'import sys; sys.modules.update(dict.fromkeys({absent}))\n'
  save = "np.save('labels.npy', np.asarray(labels))\n"
  command = [sys.executable, '-c', block + code + save]
  subprocess.run(command, cwd=tmp_path, check=True)
  labels = np.load(tmp_path / 'labels.npy')
  assert labels.shape == (1, *SIZE)
  resized = Image.open(tmp_path / 'street.jpg').resize(SIZE[::-1])
  model = rj.from_checkpoint(sources / 'pspnet', image_scale=SIZE)
  assert (labels[0] == model.predict(resized).labels).mean() >= 0.999


def test_weights_come_back_with_the_same_bits(exported, sources):
  out, _ = exported('pspnet')
  original = read_weights(sources / 'pspnet').state_dict
  assert_same_bits(read_weights(out / 'model.safetensors').state_dict, original)
  weights = load_weights(out / 'model.pth')
  assert weights.kind == 'mmseg'
  assert weights.classes == NAMES
  assert_same_bits(export_state_dict(*weights.create(), 'ours'), original)


def test_description_and_card(exported):
  out, exports = exported('pspnet')
  files = ['model.pth', 'model.safetensors']
  files += ['model_65x64.onnx', 'model_65x64.stablehlo']
  assert sorted(os.listdir(out)) == ['README.md', 'about.json', *files]
  about = json.loads((out / 'about.json').read_text())
  assert about['classes'] == NAMES
  assert about['palette'] == PALETTE
  assert about['protocol'] == {'name': 'whole', 'image_scale': [2048, 512]}
  assert about['provenance']['from']['source'] == 'drawn at random'
  told = [each['file'] for each in about['exports']]
  assert told == [each.file for each in exports]
  card = (out / 'README.md').read_text()
  assert '\n# A ResNeSt of (1, 1, 1, 1) blocks with pspnet\n' in card
  assert '| 1 | sky \\| clouds | #1e07c8 |' in card
  assert '123.675' in card
  assert str(out.parent) not in card
  # predict.py takes the folder as it is.
  assert load_weights(out).description.config['head'] == 'pspnet'


# --- What goes wrong ---------------------------------------------------------


def reference_of(labels, probabilities=None):
  reference = Reference.__new__(Reference)
  reference.images = np.zeros((*labels.shape, 3), np.uint8)
  reference.predictions = [
    Prediction(each, tuple(NAMES), None, None, probabilities) for each in labels
  ]
  return reference


@pytest.mark.parametrize('wrong', [10, 11])
def test_one_in_a_thousand_pixels_may_differ(wrong):
  labels = np.arange(10_000).reshape(4, 50, 50) % 7
  found = np.where(np.arange(10_000).reshape(labels.shape) < wrong, 8, labels)
  reference = reference_of(labels)
  if wrong == 10:
    assert reference.compare('x', lambda images: [found]) == 0.999
  else:
    with pytest.raises(UserError, match=r'x gives 99\.890% .* class; 99\.9%'):
      reference.compare('x', lambda images: [found])


def test_wrong_probabilities_are_told():
  labels, even = np.zeros((1, 2, 2), np.uint8), np.full((2, 2, 7), 1 / 7)
  reference = reference_of(labels, even)
  for off, said in ((0.02, '0.020'), (np.nan, '1.000')):
    with pytest.raises(UserError, match=f'differ by up to {said}'):
      reference.compare('x', lambda images, off=off: [labels, [even + off]])
  assert reference.compare('x', lambda images: [labels, [even + 0.009]]) == 1


def all_seven(images):
  return (images[..., 0] * 0 + 7,)


@pytest.mark.parametrize(
  ('broken', 'options', 'message'),
  [
    ('', {'sizes': [(31, 64)]}, 'each edge must have 32 to 8192'),
    ('', {'sizes': [(64, 8193)]}, 'each edge must have 32 to 8192'),
    (
      '',
      {'formats': ['mmseg'], 'probabilities': True},
      'neither is among the formats',
    ),
    ('program', {'sizes': [SIZE]}, r'gives 0\.000% of the pixels of 20'),
    ('flatbuffers', {'formats': ['stablehlo']}, 'pip install flatbuffers'),
    (
      'jax2onnx',
      {'formats': ['onnx']},
      'runtime && pip install --no-deps jax2onnx==0.17.1',
    ),
    ('torch', {'formats': ['mmseg']}, 'pip install torch'),
  ],
)
def test_what_fails_leaves_nothing(
  broken, options, message, sources, monkeypatch, tmp_path
):
  find = importlib.util.find_spec
  absent = {broken: None}
  monkeypatch.setattr(
    'importlib.util.find_spec', lambda name: absent.get(name, find(name))
  )
  if broken == 'program':
    monkeypatch.setattr(
      export_folder, 'make_program', lambda *_, **__: all_seven
    )
  with pytest.raises(UserError, match=message):
    export_model(sources / 'fcn', tmp_path / 'out', **options)
  assert os.listdir(tmp_path) == []


def test_nothing_is_overwritten(sources, tmp_path):
  (tmp_path / 'mine.txt').write_text('mine')
  with pytest.raises(UserError, match='is there already'):
    export_model(sources / 'fcn', tmp_path)
  assert os.listdir(tmp_path) == ['mine.txt']


def test_classifier_is_refused(tmp_path):
  config = {'backbone': 'resnest14', 'stem_width': 8, 'width': 8}
  config |= {'num_classes': 10, 'output_stride': 32}
  config |= {'dilation_rule': 'official', 'dtype': 'float32'}
  description = Description('classifier', config)
  write_source(tmp_path / 'source', description, 'official')
  with pytest.raises(UserError, match='is a classifier'):
    export_model(tmp_path / 'source', tmp_path / 'out')
  assert os.listdir(tmp_path) == ['source']


def test_command(call_script, written_run, tmp_path, capsys):
  out, picture = tmp_path / 'out', tmp_path / 'one.png'
  Image.fromarray(gather_pictures([])[0]).save(picture)
  call_script(
    *('export.py', '--weights', written_run, '--out', out),
    *('--sizes', '65x64', '--formats', 'safetensors', '--pictures', picture),
  )
  said = capsys.readouterr().out
  assert f'checkpoint {STEP} of {written_run}\n' in said
  assert 'model.safetensors' in said
  assert '100.0000% of the pixels of 1 picture agree' in said
  assert f'written: {out}' in said
