"""Exports of tiny networks: that they agree, run alone, and fail cleanly."""

import collections
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
from evaluation.runs import STEP, write_run
from golden.reference import TINY, filled_variables
from lengths import others_long
from PIL import Image

import resnest_jax as rj
from resnest_jax.errors import UserError
from resnest_jax.evaluation.predictor import Prediction
from resnest_jax.export import folder as export_folder
from resnest_jax.export.checks import Reference
from resnest_jax.export.folder import FORMATS, export_model
from resnest_jax.export.pictures import gather_pictures
from resnest_jax.models import convolution
from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.segmentor import HEADS, create_segmentor
from resnest_jax.weights.files import read_weights, write_weights
from resnest_jax.weights.infer import Description
from resnest_jax.weights.pretrained import NORMALIZATION, Weights, load_weights
from resnest_jax.weights.state_dict import export_state_dict, variable_shapes

# Not square, and rows that no stride divides.
SIZE = (65, 64)
NAMES = ['wall', 'sky | clouds', 'tree', 'road', 'car', 'sea', 'dog']


def write_source(path, head):
  """Weights of a tiny segmentor, as convert writes them."""
  config = TINY | {'dtype': 'float32', 'head': head}
  model = create_segmentor(config)
  variables = filled_variables(variable_shapes(model))
  state_dict = export_state_dict(model, variables, 'ours')
  about = Weights(
    state_dict,
    'ours',
    Description('segmentor', config),
    NAMES,
    [[30 * i, 7, 200] for i in range(7)],
    NORMALIZATION,
    {'source': 'drawn at random'},
  ).about()
  write_weights(path, 'ours', state_dict, about)
  return path


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """Weights of each head."""
  root = tmp_path_factory.mktemp('sources')
  return {head: write_source(root / head, head) for head in HEADS}


@pytest.fixture(scope='module')
def exported(sources, tmp_path_factory):
  """exported(head): a folder of its exports, and what was said of them."""
  made = {}

  def export(head):
    if head not in made:
      out = tmp_path_factory.mktemp('exported') / head
      all_of_it = head == 'pspnet'
      with pytest.MonkeyPatch.context() as patch:
        if all_of_it:
          # So that the CPU's ways with wide convolutions would show.
          patch.setattr(convolution, 'ENOUGH_PAIRS', 1)
          patch.setattr(convolution, 'ENOUGH_PIXELS', 1)
        exports = export_model(
          sources[head],
          out,
          formats=FORMATS if all_of_it else FORMATS[:2],
          sizes=[SIZE],
          probabilities=head == 'fcn',
          say=lambda line: None,
        )
      made[head] = out, exports
    return made[head]

  return export


@pytest.mark.parametrize('head', others_long(HEADS, 'pspnet'))
def test_head_agrees_with_its_checkpoint(head, exported, sources):
  out, exports = exported(head)
  assert [each.pictures for each in exports] == len(exports) * [20]
  assert all(each.agreement >= 0.999 for each in exports)
  # Not by its own account alone; and three pictures are as good as four.
  images = np.random.default_rng(5).integers(0, 256, (3, *SIZE, 3), np.uint8)
  model = rj.from_checkpoint(sources[head], image_scale=SIZE)
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
  out, _ = exported('pspnet')
  model = onnx.load(out / 'model_65x64.onnx')
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
  card = (out / 'README.md').read_text()
  section = card.partition(f'## Run model_65x64.{format_}\n')[2]
  code = re.search(r'```python\n(.*?)```', section, re.DOTALL)[1]
  image = gather_pictures([])[3]
  Image.fromarray(image).save(tmp_path / 'street.jpg', quality=95)
  (tmp_path / f'model_65x64.{format_}').symlink_to(
    out / f'model_65x64.{format_}'
  )
  block = f'import sys; sys.modules.update(dict.fromkeys({absent}))\n'
  save = "np.save('labels.npy', np.asarray(labels))\n"
  (tmp_path / 'run.py').write_text(block + code + save)
  subprocess.run([sys.executable, 'run.py'], cwd=tmp_path, check=True)
  labels = np.load(tmp_path / 'labels.npy')
  assert labels.shape == (1, *SIZE)
  resized = Image.open(tmp_path / 'street.jpg').resize(SIZE[::-1])
  model = rj.from_checkpoint(sources['pspnet'], image_scale=SIZE)
  assert (labels[0] == model.predict(resized).labels).mean() >= 0.999


def test_weights_come_back_with_the_same_bits(exported, sources):
  out, _ = exported('pspnet')
  original = read_weights(sources['pspnet']).state_dict
  found = read_weights(out / 'model.safetensors').state_dict
  assert found.keys() == original.keys()
  for name, value in original.items():
    assert found[name].tobytes() == value.tobytes(), name
  weights = load_weights(out / 'model.pth')
  assert weights.kind == 'mmseg'
  assert weights.classes == NAMES
  back = export_state_dict(*weights.create(), 'ours')
  assert back.keys() == original.keys()
  for name, value in original.items():
    assert back[name].tobytes() == value.tobytes(), name


def test_description_and_card(exported):
  out, exports = exported('pspnet')
  assert sorted(path.name for path in out.iterdir()) == [
    'README.md',
    'about.json',
    'model.pth',
    'model.safetensors',
    'model_65x64.onnx',
    'model_65x64.stablehlo',
  ]
  about = json.loads((out / 'about.json').read_text())
  assert about['classes'] == NAMES
  assert about['palette'][6] == [180, 7, 200]
  assert about['protocol'] == {'name': 'whole', 'image_scale': [2048, 512]}
  assert about['provenance']['from']['source'] == 'drawn at random'
  assert [each['file'] for each in about['exports']] == [
    each.file for each in exports
  ]
  card = (out / 'README.md').read_text()
  assert '\n# A ResNeSt of (1, 1, 1, 1) blocks with pspnet\n' in card
  assert '| 1 | sky \\| clouds | #1e07c8 |' in card
  assert '123.675' in card
  assert str(out.parent) not in card
  # predict.py takes the folder as it is.
  assert load_weights(out).description.config['head'] == 'pspnet'


def assert_nothing_left(folder):
  assert os.listdir(folder) == []


def test_wrong_export_leaves_nothing(sources, monkeypatch, tmp_path):
  def make_wrong(*arguments, **more):
    return lambda images: (images[..., 0] * 0 + 7,)

  monkeypatch.setattr(export_folder, 'make_program', make_wrong)
  with pytest.raises(UserError, match=r'gives 0\.000% of the pixels of 20'):
    export_model(sources['fcn'], tmp_path / 'out', sizes=[SIZE])
  assert_nothing_left(tmp_path)


@pytest.mark.parametrize('wrong', [10, 11])
def test_one_in_a_thousand_pixels_may_differ(wrong):
  labels = np.arange(10_000).reshape(4, 50, 50) % 7
  reference = Reference.__new__(Reference)
  reference.images = np.zeros((4, 50, 50, 3), np.uint8)
  reference.predictions = [
    Prediction(each, tuple(NAMES), None, None) for each in labels
  ]
  found = np.where(np.arange(10_000).reshape(labels.shape) < wrong, 8, labels)
  if wrong == 10:
    assert reference.compare('x', lambda images: [found]) == 0.999
  else:
    with pytest.raises(UserError, match=r'x gives 99\.890% .* class; 99\.9%'):
      reference.compare('x', lambda images: [found])


def test_wrong_probabilities_are_told():
  reference = Reference.__new__(Reference)
  reference.images = np.zeros((1, 2, 2, 3), np.uint8)
  labels, even = np.zeros((2, 2), np.uint8), np.full((2, 2, 7), 1 / 7)
  reference.predictions = [Prediction(labels, tuple(NAMES), None, None, even)]
  for off, said in ((0.02, '0.020'), (np.nan, '1.000')):
    with pytest.raises(UserError, match=f'differ by up to {said}'):
      reference.compare('x', lambda images, off=off: [[labels], [even + off]])
  assert reference.compare('x', lambda images: [[labels], [even + 0.009]]) == 1


def test_nothing_is_overwritten(sources, tmp_path):
  (tmp_path / 'mine.txt').write_text('mine')
  with pytest.raises(UserError, match='is there already'):
    export_model(sources['fcn'], tmp_path)
  assert os.listdir(tmp_path) == ['mine.txt']


@pytest.mark.parametrize(
  ('package', 'format_', 'message'),
  [
    ('flatbuffers', 'stablehlo', 'pip install flatbuffers'),
    ('jax2onnx', 'onnx', 'runtime && pip install --no-deps jax2onnx==0.17.1'),
    ('torch', 'mmseg', 'pip install torch'),
  ],
)
def test_missing_package_is_named(
  package, format_, message, sources, monkeypatch, tmp_path
):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name: None if name == package else find(name),
  )
  with pytest.raises(UserError, match=message):
    export_model(sources['fcn'], tmp_path / 'out', formats=[format_])
  assert_nothing_left(tmp_path)


@pytest.mark.parametrize('size', [(31, 64), (64, 8193)])
def test_size_out_of_bounds(size, sources, tmp_path):
  with pytest.raises(UserError, match='neither is among the formats'):
    export_model(
      tmp_path, tmp_path / 'out', formats=['mmseg'], probabilities=True
    )
  with pytest.raises(UserError, match='each edge must have 32 to 8192'):
    export_model(sources['fcn'], tmp_path / 'out', sizes=[size])
  assert_nothing_left(tmp_path)


def test_classifier_is_refused(tmp_path):
  model = create_classifier('resnest14', 10, stem_width=8, width=8)
  variables = filled_variables(variable_shapes(model))
  state_dict = export_state_dict(model, variables, 'official')
  about = {
    'task': 'classifier',
    'model': {'backbone': 'resnest14', 'stem_width': 8, 'width': 8},
  }
  about['model'] |= {'num_classes': 10, 'output_stride': 32}
  about['model'] |= {'dilation_rule': 'official', 'dtype': 'float32'}
  about |= {'classes': None, 'palette': None, 'normalization': NORMALIZATION}
  about['provenance'] = {'source': 'drawn at random'}
  source = tmp_path / 'source'
  write_weights(source, 'official', state_dict, about)
  with pytest.raises(UserError, match='is a classifier'):
    export_model(source, tmp_path / 'out')
  assert os.listdir(tmp_path) == ['source']


def test_command(run_script, tmp_path):
  workdir = write_run(tmp_path / 'run')
  out = tmp_path / 'out'
  picture = tmp_path / 'one.png'
  Image.fromarray(gather_pictures([])[0]).save(picture)
  process = run_script(
    *('export.py', '--weights', workdir, '--out', out),
    *('--sizes', '65x64', '--formats', 'safetensors', '--pictures', picture),
  )
  assert f'checkpoint {STEP} of {workdir}\n' in process.stdout
  assert 'model.safetensors' in process.stdout
  assert '100.0000% of the pixels of 1 picture agree' in process.stdout
  assert f'written: {out}' in process.stdout
