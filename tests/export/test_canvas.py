"""Canvas exports: each picture gets the labels that it gets alone."""

import json
import re
import shutil

import numpy as np
import onnxruntime
import pytest
from cards import run_card
from evaluation.class_runs import write_weights
from golden.reference import TINY, variables_of
from PIL import Image
from weights import built
from weights.built import refused

import resnest_jax as rj
from resnest_jax.export import checks, folder, stablehlo
from resnest_jax.export.renew import renew_exports
from resnest_jax.labels import IGNORE
from resnest_jax.weights.infer import Description
from resnest_jax.weights.pretrained import NORMALIZATION, Weights

CANVAS = (72, 96)
HEADS = ('fcn', 'pspnet', 'deeplabv3', 'deeplabv3plus')
NAMES = list('abcdefg')
# Two best probabilities of a pixel closer than this are equal but for rounding.
TIE = 1e-5
# Alone and not resized.
ALONE = {'protocol': 'ms_flip_1x', 'scales': [1.0], 'flip': False}


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """source(head): weights of such a network."""
  root = tmp_path_factory.mktemp('sources')

  def write(head):
    config = TINY | {'dtype': 'float32', 'head': head}
    description = Description('segmentor', config)
    more = (NAMES, None, NORMALIZATION, {'source': 'made up'})
    more += ([96, 64], [64, 48])
    about = Weights({}, 'ours', description, *more).about()
    model = description.create()
    network = model, variables_of(model)
    return built.written(root / head, network, 'ours', about)

  return write


def draw(number, seed=0):
  """Noise of random sizes, and the inputs of a canvas; noise around it, too."""
  rng = np.random.default_rng(seed)
  sizes = [rng.integers(9, n + 1, number).astype(np.int32) for n in CANVAS]
  images = rng.integers(0, 256, (number, *CANVAS, 3), np.uint8)
  pictures = [x[:h, :w] for x, h, w in zip(images, *sizes, strict=True)]
  return pictures, [images, *sizes]


def wrong_pixels(found, predictions):
  """How many have another label than predict's, all of which are ties."""
  number = 0
  for labels, predicted in zip(found, predictions, strict=True):
    height, width = predicted.labels.shape
    inside = labels[:height, :width]
    assert (labels == IGNORE).sum() == labels.size - height * width
    wrong = inside != predicted.labels
    first, second = np.sort(predicted.probabilities[wrong])[:, -2:].T
    assert (second - first < TIE).all()
    number += wrong.sum()
  return number


def runs(out, exports):
  """run(images, heights, widths) of each program, which gives labels."""
  for export in exports:
    if export.format == 'onnx':
      yield checks_of(onnxruntime.InferenceSession(out / export.file), export)
    else:
      yield stablehlo.read_stablehlo(out / export.file)


def checks_of(session, export):
  """Runs a session whose names and shapes are those that are promised."""
  size = export.size or ('h', 'w')
  told = [(x.name, x.shape, x.type) for x in session.get_inputs()]
  assert told == [
    ('images', ['b', *size, 3], 'tensor(uint8)'),
    ('heights', ['b'], 'tensor(int32)'),
    ('widths', ['b'], 'tensor(int32)'),
  ]
  told = [(x.name, x.shape, x.type) for x in session.get_outputs()]
  assert told == [('labels', ['b', *size], 'tensor(uint8)')]
  names = 'images', 'heights', 'widths'
  return lambda *x: session.run(None, dict(zip(names, x, strict=True)))


@pytest.mark.long
@pytest.mark.parametrize('head', HEADS)
def test_labels_are_those_of_the_picture_alone(head, sources, tmp_path):
  source, out = sources(head), tmp_path / 'out'
  # What these two add to fcn's has lengths of its own: bins, a finer stride.
  free = head in ('pspnet', 'deeplabv3plus')
  canvas = [CANVAS, *['free'] * free]
  exports = folder.export_model(
    source, out, formats=folder.PROGRAMS, canvas=canvas
  )
  assert [x.agreement for x in exports] == len(exports) * [1.0]
  told = [(x.canvas, x.size) for x in exports]
  assert told == 2 * [(True, CANVAS)] + 2 * free * [(True, None)]
  pictures, inputs = draw(40)
  predictor = rj.from_checkpoint(source, **ALONE)
  expected = [predictor.predict(x, probabilities=True) for x in pictures]
  assert len(np.unique(np.concatenate([x.labels for x in expected], None))) > 2
  for run, export in zip(runs(out, exports), exports, strict=True):
    wrong = 0
    # Batches of mixed sizes, and of several lengths.
    for part in (slice(0, 37), slice(37, 40)):
      images, heights, widths = (x[part] for x in inputs)
      if export.size is None:
        images = images[:, : heights.max(), : widths.max()]
      (found,) = run(images, heights, widths)
      assert found.shape == images.shape[:3]
      wrong += wrong_pixels(np.asarray(found), expected[part])
    assert wrong <= 2


@pytest.fixture(scope='module')
def exported(sources, tmp_path_factory):
  """A folder with a canvas and a size, with probabilities, and its source."""
  out = tmp_path_factory.mktemp('exported') / 'out'
  source = sources('fcn')
  more = {'formats': folder.FORMATS[:3], 'probabilities': True}
  more |= {'sizes': [(32, 40)], 'canvas': [CANVAS, 'free']}
  exports = folder.export_model(source, out, **more)
  names = [f'model_{x}' for x in ('32x40', 'canvas_72x96', 'canvas_free')]
  files = [f'{x}.{kind}' for x in names for kind in folder.PROGRAMS]
  files.insert(2, 'model.safetensors')
  assert [x.file for x in exports] == files
  return out, source


def test_probabilities_are_those_of_the_picture_and_0_around_it(exported):
  out, source = exported
  session = onnxruntime.InferenceSession(out / 'model_canvas_72x96.onnx')
  pictures, inputs = draw(3, seed=1)
  names = ('images', 'heights', 'widths')
  outputs = session.run(None, dict(zip(names, inputs, strict=True)))
  predictor = rj.from_checkpoint(source, **ALONE)
  for picture, labels, found in zip(pictures, *outputs, strict=True):
    expected = predictor.predict(picture, probabilities=True).probabilities
    height, width = picture.shape[:2]
    inside = found[:height, :width]
    np.testing.assert_allclose(inside, expected, atol=1e-5)
    assert found.sum() == pytest.approx(height * width)
    assert ((found == 0).all(-1) == (labels == IGNORE)).all()


def test_card_runs_on_a_picture_that_does_not_fit(exported, tmp_path):
  out, source = exported
  picture = np.random.default_rng(2).integers(0, 256, (20, 30, 3), np.uint8)
  picture = picture.repeat(10, 0).repeat(10, 1)
  last = "np.save('labels.npy', np.asarray(labels))\n"
  model = rj.from_checkpoint(source, **ALONE)
  for name, size in ('72x96.onnx', (64, 96)), ('free.stablehlo', (200, 300)):
    file = out / f'model_canvas_{name}'
    run_card(file, picture, last, tmp_path)
    image = Image.open(tmp_path / 'street.jpg')
    image.thumbnail(size[::-1])
    expected = model.predict(np.asarray(image))
    found = np.load(tmp_path / 'labels.npy')
    assert found.shape == (1, *size)
    assert (found[0] == expected.labels).mean() > 0.999
  text = (out / 'README.md').read_text()
  assert '| model_canvas_72x96.onnx | onnx | up to 72 high, 96 wide |' in text
  assert '| model_canvas_free.onnx | onnx | any | 100.0000% |' in text
  assert 'stretched to its size, or made smaller to fit its canvas' in text


def test_programs_are_renewed(exported, tmp_path):
  out = shutil.copytree(exported[0], tmp_path / 'out')
  before = (out / 'about.json').read_text()
  entries = json.loads(before)['exports']
  assert [x['canvas'] for x in entries] == 3 * [False] + 4 * [True]
  programs = list(out.glob('*.stablehlo'))
  for file in programs:
    file.write_bytes(b'of another time')
  renew_exports(out)
  assert (out / 'about.json').read_text() == before
  pictures, inputs = draw(2)
  for file in out.glob('*canvas*.stablehlo'):
    labels = np.asarray(stablehlo.read_stablehlo(file)(*inputs)[0])
    assert (labels != IGNORE).sum() == sum(x[..., 0].size for x in pictures)
  (out / 'model.safetensors').unlink()
  told = r'--out NEW --sizes 32x40 --canvas 72x96 free --probabilities\.'
  refused(told, renew_exports, out)


def test_only_what_does_not_fit_is_made_smaller():
  pictures = [np.full((h, w, 3), 9, np.uint8) for h, w in ((10, 96), (144, 20))]
  inputs = checks.on_canvas(pictures, CANVAS)
  assert inputs['heights'].tolist() == [10, 72]
  assert inputs['widths'].tolist() == [96, 10]
  assert inputs['images'].shape == (2, *CANVAS, 3)
  assert (inputs['images'] == 9).sum() == 3 * (10 * 96 + 72 * 10)


def test_padding_counts_only_where_it_is_taken_for_the_picture():
  expected = np.full((1, 10, 10), IGNORE, np.uint8)
  expected[0, :2] = 1
  assert checks.compare_labels('x', [([expected], [expected])]) == 1
  found = expected.copy()
  found[0, 5, 5] = 3
  given = 'x', [([found], [expected])]
  refused(r'x gives 95\.238% of the pixels', checks.compare_labels, *given)


FAILS = (
  ({'canvas': [(31, 64)]}, 'each edge must have 32 to 8192'),
  (
    {'canvas': ['free'], 'formats': ['mmseg']},
    'add one, or leave --canvas out',
  ),
  ({'canvas': ['free'], 'features': 16}, 'or a canvas; add --formats'),
  ({'canvas': ['free']}, 'a classifier sees .* leave --canvas and'),
)


@pytest.mark.parametrize(('options', 'message'), FAILS)
def test_what_has_no_canvas(options, message, tmp_path):
  write_weights(tmp_path / 'weights')
  given = tmp_path / 'weights', tmp_path / 'out'
  options = {'formats': ['stablehlo']} | options
  refused(message, folder.export_model, *given, **options)
  assert not (tmp_path / 'out').exists()


def test_command_wants_a_size(call_script, tmp_path):
  flags = ('--weights', 'x', '--out', tmp_path / 'out', '--canvas', '1024')
  refused(
    re.escape('--canvas 1024 is no size'), call_script, 'export.py', *flags
  )
