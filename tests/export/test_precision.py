"""Smaller ONNX files: how far they agree, what is kept, and when none is."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from evaluation.class_runs import write_weights
from golden.reference import TINY, variables_of
from PIL import Image
from weights import built
from weights.built import refused

import resnest_jax as rj
from resnest_jax.data.preprocess import preprocess
from resnest_jax.data.resize import resize_image
from resnest_jax.export import folder, pictures, precision
from resnest_jax.export.card import PRECISIONS, Export
from resnest_jax.export.renew import renew_exports
from resnest_jax.weights.infer import Description
from resnest_jax.weights.pretrained import NORMALIZATION, Weights

SIZE = (33, 48)
# Random weights have no clear classes: most pixels are close to a border.
AGREEMENT = 0.9
NAMES = list('abcdefg')
ONNX = {'formats': ['onnx'], 'sizes': [SIZE], 'precision': ['int8']}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A network most of whose bytes are weights, as they are of real ones."""
  config = TINY | {'dtype': 'float32', 'head': 'pspnet', 'head_channels': 128}
  description = Description('segmentor', config)
  more = (NAMES, None, NORMALIZATION, {'source': 'made up'})
  about = Weights({}, 'ours', description, *more).about()
  model = description.create()
  variables = variables_of(model)
  scenes = [resize_image(x, SIZE) for x in pictures.gather_pictures([])]
  images = preprocess(np.stack(scenes), np.int32([SIZE] * len(scenes)))
  logits = model.apply(variables, images, train=False).logits
  # Else nearly all pixels are of one class.
  last = variables['params']['decode_head']['classifier']['conv_seg']
  mean, deviation = logits.mean((0, 1, 2)), logits.std((0, 1, 2))
  last['kernel'] = last['kernel'] / deviation
  last['bias'] = (last['bias'] - mean) / deviation
  folder_ = tmp_path_factory.mktemp('source') / 'weights'
  return built.written(folder_, (model, variables), 'ours', about)


@pytest.fixture(scope='module')
def exported(source, tmp_path_factory):
  out = tmp_path_factory.mktemp('exported') / 'out'
  options = ONNX | {'precision': PRECISIONS}
  exports = folder.export_model(source, out, agreement=AGREEMENT, **options)
  names = ('', *(f'_{x}' for x in PRECISIONS))
  assert [x.file for x in exports] == [f'model_33x48{x}.onnx' for x in names]
  return out, exports


def test_agreement_is_that_of_the_held_out_pictures(exported, source):
  out, exports = exported
  model = rj.from_checkpoint(source, image_scale=SIZE)
  held = [resize_image(x, SIZE) for x in pictures.gather_pictures([])[1::2]]
  expected = np.stack([x.labels for x in model.predict_frames(held)])
  for export in exports[1:]:
    session = onnxruntime.InferenceSession(out / export.file)
    (found,) = session.run(None, {'images': np.stack(held)})
    same = found == expected
    assert export.agreement == pytest.approx(same.mean(), abs=1e-3)
    assert AGREEMENT <= export.agreement <= 1
    assert (export.pictures, export.drawn) == (10, True)
    for number, share in enumerate(export.reduced['classes']):
      there = expected == number
      assert (share is None) == (not there.any())
      if there.any():
        assert share == pytest.approx(same[there].mean(), abs=0.01)
  assert exports[1].agreement > 0.995


def test_files_are_smaller_and_take_and_give_the_same(exported):
  out, exports = exported
  for export in exports:
    whole = exports[0]
    asked, found = (
      onnxruntime.InferenceSession(out / x.file) for x in (whole, export)
    )
    for one, other in (
      (asked.get_inputs(), found.get_inputs()),
      (asked.get_outputs(), found.get_outputs()),
    ):
      told = [
        [(x.name, x.shape, x.type) for x in side] for side in (one, other)
      ]
      assert told[0] == told[1]
    if reduced := export.reduced:
      sizes = [(out / x.file).stat().st_size for x in (export, whole)]
      assert reduced['bytes'] == sizes
      most = 0.3 if export.file.endswith('int8.onnx') else 0.6
      assert sizes[0] < most * sizes[1]
      assert min(reduced['milliseconds']) > 0


def test_layers_that_are_kept_compute_in_float(exported):
  out, (*_, export) = exported
  assert_kept(out, export)


def assert_kept(out, export):
  nodes = onnx.load(out / export.file).graph.node
  rounded = {x.output[0] for x in nodes if x.op_type == 'DequantizeLinear'}
  layers = [x for x in nodes if x.op_type in ('Conv', 'MatMul')]
  kept = [x for x in layers if x.input[0] not in rounded]
  assert export.reduced['layers'] == [len(kept), len(layers)]
  assert len(kept) < len(layers)


@pytest.fixture(scope='module')
def rounding(exported):
  """A network with its layers and their ranges, and runs that give scores."""
  out, (whole, *_) = exported
  model = precision._prepared(out / whole.file)
  scenes = pictures.gather_pictures([])
  images = np.stack([resize_image(x, SIZE) for x in scenes])
  reference = SimpleNamespace(
    inputs={'images': images}, part=lambda x: [images[x]]
  )
  ranges = precision._ranges(model, reference, range(0, 20, 2))

  def scores(model):
    copied = onnx.ModelProto.FromString(model.SerializeToString())
    graph = copied.graph
    (last,) = (x.input[0] for x in graph.node if x.op_type == 'ArgMax')
    graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    # Products of floats and weights in 8 bits otherwise round the floats, too.
    options = onnxruntime.SessionOptions()
    level = 'session.qdq_matmulnbits_accuracy_level'
    options.add_session_config_entry(level, '1')
    session = onnxruntime.InferenceSession(copied.SerializeToString(), options)
    return session.run(None, {'images': images[:1]})[-1]

  return model, ranges, reference, scores


def test_deviations_are_those_of_files_with_one_layer_in_8_bits(rounding):
  model, ranges, reference, scores = rounding
  moved = precision._deviations(model, ranges, reference, [0])
  assert list(moved) == list(precision._layers(model))
  whole = scores(model)
  for name in list(moved)[::6]:
    found = scores(precision._rounded(model, ranges, [name]))
    expected = np.square(found - whole).mean()
    assert moved[name] == pytest.approx(expected, rel=0.05, abs=1e-9)
  assert max(moved.values()) > 10 * np.median([*moved.values()])


def vectors_of(model):
  """Layers behind a mean over the picture, by a run of the model."""
  inputs = {x.name: x.input[0] for x in model.graph.node if x.input}
  names = {x: inputs[x] for x in precision._layers(model)}
  copied = onnx.ModelProto.FromString(model.SerializeToString())
  copied.graph.output.extend(
    onnx.helper.make_empty_tensor_value_info(x)
    for x in {*names.values()} - {x.name for x in model.graph.input}
  )
  session = onnxruntime.InferenceSession(copied.SerializeToString())
  images = np.zeros((2, *SIZE, 3), np.uint8)
  found = [x.name for x in session.get_outputs()]
  sizes = dict(zip(found, session.run(None, {'images': images}), strict=True))
  single = [
    k for k, v in names.items() if sizes[v].size == 2 * max(sizes[v].shape[1:])
  ]
  assert 2 < len(single) < len(names) / 2
  return single


def test_layers_of_vectors_compute_in_float(rounding):
  model, ranges, _, _ = rounding
  rounded = precision._rounded(model, ranges, [*precision._layers(model)])
  given = {x.name: x.input[0] for x in rounded.graph.node if x.input}
  kinds = {x.output[0]: x.op_type for x in rounded.graph.node}
  found = [
    x
    for x in precision._layers(model)
    if kinds.get(given[x]) != 'DequantizeLinear'
  ]
  assert found == vectors_of(model)


def test_what_is_not_in_8_bits_sees_no_rounded_values(rounding):
  model, ranges, _, scores = rounding
  names = list(precision._layers(model))
  kept = names[::2]
  mixed = precision._rounded(model, ranges, names, kept)
  kept += vectors_of(model)
  nodes = {x.name: x for x in mixed.graph.node}
  rounded = {
    x.output[0] for x in nodes.values() if x.op_type == 'DequantizeLinear'
  }
  convs = {nodes[x].output[0] for x in names if nodes[x].op_type == 'Conv'}
  for name, node in nodes.items():
    seen = [x for x in node.input if x in rounded]
    if name in names:  # Weights of all, inputs of those that are not kept.
      assert node.input[1] in rounded
      assert (node.input[0] in rounded) == (name not in kept)
    elif node.op_type not in ('QuantizeLinear', 'DequantizeLinear'):
      assert {x.removesuffix(precision.ROUNDED) for x in seen} <= convs
  moved = [
    np.square(scores(x) - scores(model)).mean()
    for x in (precision._rounded(model, ranges, names, y) for y in (names, ()))
  ]
  assert 0 < moved[0] < moved[1]


@pytest.mark.long
def test_canvas_is_made_smaller(source, tmp_path):
  options = ONNX | {'sizes': [], 'canvas': [(48, 64)]}
  given = source, tmp_path / 'out'
  _, export = folder.export_model(*given, agreement=AGREEMENT, **options)
  assert export.file == 'model_canvas_48x64_int8.onnx'
  assert AGREEMENT <= export.agreement <= 1
  assert_kept(tmp_path / 'out', export)


def test_float16_may_keep_weights_alone(exported):
  out, exports = exported
  file = out / exports[0].file
  *_, (stored, kept) = precision._halves(precision._prepared(file))
  assert exports[1].reduced['layers'] == [0, kept]
  assert stored.ByteSize() < 0.6 * file.stat().st_size
  images = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), np.uint8)
  found = [
    onnxruntime.InferenceSession(x).run(None, {'images': images})[0]
    for x in (file.read_bytes(), stored.SerializeToString())
  ]
  assert (found[0] == found[1]).mean() > 0.99


def test_card_and_description(exported, tmp_path):
  out, exports = exported
  about = json.loads((out / 'about.json').read_text())
  found = map(Export.of, about['exports'])
  assert [x.reduced for x in found] == [x.reduced for x in exports]
  text = (out / 'README.md').read_text()
  assert text.count('## Run ') == 1
  for export in (x for x in exports if x.reduced):
    share = f'{export.agreement:.4%} | 10 held-out drawn scenes |'
    assert re.search(rf'{export.file} \| onnx \|.*{share}', text)
    megabytes = export.reduced['bytes'][0] / 1e6
    assert f'| {export.file} | {megabytes:.1f} |' in text
  kept = '{} of {} layers'.format(*exports[2].reduced['layers'])
  assert kept in text
  about['exports'][1]['reduced']['layers'] = ['`x`', 1]
  (tmp_path / 'about.json').write_text(json.dumps(about))
  refused('does not list them .*Unknown format code', renew_exports, tmp_path)


def test_without_agreement_nothing_is_written(exported, tmp_path):
  out, (whole, *_) = exported
  file = Path(shutil.copy(out / whole.file, tmp_path))
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (10, *SIZE, 3), np.uint8)
  labels = rng.integers(0, len(NAMES), images.shape[:3])
  net = SimpleNamespace(labels=SimpleNamespace(classes=NAMES))
  other = SimpleNamespace(net=net, number=10, part=lambda x: [images[x]])
  other.expected = lambda part: [labels[part]]
  told = (
    r'_float16\.onnx gives at best 1\d\.\d+% .* of 5 held-out pictures .* 99\.5'
  )
  given = 'float16', file, other, whole, 0.995
  refused(told, precision.write_reduced, *given)
  assert list(tmp_path.iterdir()) == [file]


FAILS = (
  ({'precision': ['int4']}, 'float16 or int8'),
  ({'formats': ['stablehlo']}, 'add --formats onnx'),
  ({'agreement': 99.5}, r'--agreement 99\.5 is not above 0 and below 1'),
  ({'precision': [], 'agreement': 0.9}, 'add --precision as well'),
  ({'features': 16}, 'leave --precision out'),
)


@pytest.mark.parametrize(('options', 'message'), FAILS)
def test_what_has_no_precision(options, message, source, tmp_path):
  given = source, tmp_path / 'out'
  refused(message, folder.export_model, *given, **ONNX | options)


def test_classifier_has_no_precision(tmp_path):
  write_weights(tmp_path / 'weights')
  given = tmp_path / 'weights', tmp_path / 'out'
  refused('and --precision out', folder.export_model, *given, **ONNX)


def test_few_pictures_are_too_few(source, tmp_path):
  for name in 'abc':
    Image.new('RGB', (40, 40)).save(tmp_path / f'{name}.png')
  given = source, tmp_path / 'out'
  told = '3 pictures are too few for --precision: .* Give 10 or more'
  options = ONNX | {'pictures': [tmp_path]}
  refused(told, folder.export_model, *given, **options)
