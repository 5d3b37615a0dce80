"""Exports of tiny networks: that they agree, run alone, and fail cleanly."""

import collections
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from evaluation.runs import STEP
from golden.reference import TINY, assert_same_bits, variables_of
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
from resnest_jax.weights.files import public, read_weights, write_weights
from resnest_jax.weights.infer import Description
from resnest_jax.weights.pretrained import NORMALIZATION, Weights, load_weights
from resnest_jax.weights.state_dict import export_state_dict

# Not square, and rows that no stride divides.
SIZE = (65, 64)
NAMES = ['wall', 'sky | clouds', 'tree', 'road', 'car', 'sea', 'dog']
PALETTE = [[30 * i, 7, 200] for i in range(7)]


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """Weights of each head."""
  root = tmp_path_factory.mktemp('sources')
  for head in HEADS:
    config = TINY | {'dtype': 'float32', 'head': head}
    description = Description('segmentor', config)
    model = description.create()
    state_dict = export_state_dict(model, variables_of(model), 'ours')
    about = Weights(
      *(state_dict, 'ours', description, NAMES, PALETTE, NORMALIZATION),
      {'source': 'drawn at random'},
    ).about()
    write_weights(root / head, 'ours', state_dict, about)
  return root


@pytest.fixture(scope='module')
def exported(sources, tmp_path_factory):
  """exported(head): a folder of its exports, and what was said of them."""

  @functools.cache
  def export(head):
    # ONNX's libraries read names in UTF-8 alone.
    odd = os.fsdecode(b'[x] \xdf')
    out = tmp_path_factory.mktemp('exported') / odd / head
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
  found = onnxruntime.InferenceSession(path.read_bytes()).run(
    None, {'images': images}
  )
  assert found[0].dtype == np.uint8
  labels = np.stack([each.labels for each in expected])
  assert len(np.unique(labels)) > 2
  assert (found[0] == labels).mean() >= 0.999
  if head == 'fcn':
    probabilities = np.stack([each.probabilities for each in expected])
    np.testing.assert_allclose(found[1], probabilities, atol=1e-4)


def test_onnx_has_folded_what_is_constant(exported):
  model = onnx.load(exported('pspnet')[0] / 'model_65x64.onnx')
  operations = collections.Counter(node.op_type for node in model.graph.node)
  # Normalisations: neither their roots nor, but for the four fc1, which have a
  # bias before it, their gains; two more weigh the splits of each block. That
  # of the bottleneck follows a sum, of the convolutions of map and pyramid.
  assert not operations.keys() & {'BatchNormalization', 'Sqrt', 'Reciprocal'}
  assert operations['Mul'] == 4 + 2 * 4 + 1
  assert operations['Conv'] == 3 + 2 * 4 + 1  # Stem, splits, head.


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
  assert weights.classes == NAMES
  assert_same_bits(export_state_dict(*weights.create(), 'ours'), original)


def test_description_and_card(exported):
  out, exports = exported('pspnet')
  files = {'README.md', 'about.json', *(each.file for each in exports)}
  assert set(os.listdir(out)) == files
  about = json.loads((out / 'about.json').read_text())
  assert about['palette'] == PALETTE
  assert about['protocol'] == {'name': 'whole', 'image_scale': [2048, 512]}
  assert about['provenance']['from']['source'] == 'drawn at random'
  card = (out / 'README.md').read_text()
  assert '\n# A ResNeSt of (1, 1, 1, 1) blocks with pspnet\n' in card
  assert '| 1 | sky \\| clouds | #1e07c8 |' in card
  assert '123.675' in card


def test_no_file_names_a_folder_of_this_machine(exported, sources, root):
  out, _ = exported('pspnet')
  about = json.loads((out / 'about.json').read_text())
  assert about['provenance']['source'] == 'pspnet'
  folders = out.parent, sources, root, Path(sys.prefix).parent
  for file in out.iterdir():
    content = file.read_bytes()
    assert [x for x in folders if os.fsencode(x) in content] == []


@pytest.mark.parametrize(
  ('said', 'published'),
  [
    ('runs/own', 'own'),
    ('/home/somebody/runs/own/', 'own'),
    ('~/runs/own', 'own'),
    ('.', '{here}'),
    (r'C:\Users\somebody\own.pth', 'own.pth'),
    # Neither is a file of this machine.
    ('hf://owner/repository/model.safetensors', None),
    ('ade20k_pspnet', None),
    ('0.x/1.x', None),
  ],
)
def test_provenance_is_published_without_folders(
  said, published, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs/own').mkdir(parents=True)
  about = {'classes': [said], 'provenance': {'from': {'x': [said]}, 'step': 3}}
  expected = (published or said).format(here=tmp_path.name)
  assert public(about) == {
    'classes': [said],
    'provenance': {'from': {'x': [expected]}, 'step': 3},
  }


def compare(expected, *found):
  """How one picture's labels and probabilities compare with those found."""
  reference = Reference.__new__(Reference)
  reference.images = np.zeros((1, *expected[0].shape, 3), np.uint8)
  labels, probabilities = expected
  prediction = Prediction(labels, tuple(NAMES), None, None, probabilities)
  reference.predictions = [prediction]
  return reference.compare('x', lambda images: [[each] for each in found])


def test_one_in_a_thousand_pixels_may_differ():
  labels = np.arange(10_000).reshape(100, 100) % 7
  found = labels.copy()
  found[0, :10] = 8
  assert compare((labels, None), found) == 0.999
  found[0, 10] = 8
  with pytest.raises(UserError, match=r'x gives 99\.890% .* class; 99\.9%'):
    compare((labels, None), found)


def test_wrong_probabilities_are_told():
  labels, even = np.zeros((2, 2), np.uint8), np.full((2, 2, 7), 1 / 7)
  for off, said in ((0.02, '0.020'), (np.nan, '1.000')):
    with pytest.raises(UserError, match=f'differ by up to {said}'):
      compare((labels, even), labels, even + off)
  assert compare((labels, even), labels, even + 0.009) == 1


@pytest.mark.parametrize(
  ('broken', 'options', 'message'),
  [
    ('', {'sizes': [(31, 64)]}, 'each edge must have 32 to 8192'),
    ('', {'sizes': [(64, 8193)]}, 'each edge must have 32 to 8192'),
    ('', {'formats': ['mmseg'], 'probabilities': True}, 'neither is among'),
    ('program', {'sizes': [SIZE]}, r'gives 0\.000% of the pixels of 20'),
    ('jax2onnx', {'formats': ['onnx']}, 'pip install --no-deps jax2onnx=='),
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
      *(export_folder, 'make_program'),
      lambda *_, **__: lambda images: (images[..., 0] * 0 + 7,),
    )
  with pytest.raises(UserError, match=message):
    export_model(sources / 'fcn', tmp_path / 'out', **options)
  assert os.listdir(tmp_path) == []


def test_command(call_script, written_run, tmp_path, capsys):
  out, picture = tmp_path / 'out', tmp_path / 'one.png'
  Image.fromarray(gather_pictures([])[0]).save(picture)
  command = ('export.py', '--weights', written_run, '--out', out)
  more = ('--sizes', '65x64', '--formats', 'safetensors')
  call_script(*command, *more, '--pictures', picture)
  said = capsys.readouterr().out
  assert f'checkpoint {STEP} of {written_run}\n' in said
  assert 'model.safetensors' in said
  assert '100.0000% of the pixels of 1 picture agree' in said
  assert f'written: {out}' in said
  with pytest.raises(UserError, match='out is there already'):
    call_script(*command)
