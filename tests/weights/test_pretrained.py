"""Weights with their description, and trainings that start from them."""

import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden.reference import variables_of
from weights.built import (
  NETWORK,
  described,
  encoding_network,
  refused,
  saved,
  written,
)

from resnest_jax import create_classifier, create_segmentor, export_state_dict
from resnest_jax.inference.predictor import from_checkpoint
from resnest_jax.inference.protocols import Protocol
from resnest_jax.labels import PASCAL_CONTEXT
from resnest_jax.weights import published
from resnest_jax.weights.files import checksum
from resnest_jax.weights.infer import Description
from resnest_jax.weights.pretrained import (
  NORMALIZATION,
  Weights,
  load_trained,
  load_weights,
)
from resnest_jax.weights.published import Published
from resnest_jax.weights.start import start_from

# Of the published widths.
WHOLE = {'stem_width': None, 'width': None}
# Of the fixture's, as a file describes it.
CLASSIFIER = {
  **{'backbone': 'resnest14', 'stem_width': 8, 'width': 8, 'num_classes': 10},
  **{'output_stride': 32, 'dilation_rule': 'official', 'dtype': 'float32'},
  'dropout': 0.0,
}


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_meta_of_mmsegmentation_goes_along(mmseg, tmp_path):
  """As 1.x writes it; the converter's tests have that of 0.x."""
  data = {'classes': ('a', 'b'), 'palette': [(1, 2, 3), (4, 5, 6)]}
  meta = {'dataset_meta': data, 'iter': 80000, 'config': 'x' * 5000}
  content = {'meta': meta, 'state_dict': mmseg}
  weights = load_weights(saved(tmp_path / 'iter.pth', content))
  assert weights.classes == ['a', 'b']
  assert weights.palette == [[1, 2, 3], [4, 5, 6]]
  assert weights.normalization['mean'] == [123.675, 116.28, 103.53]
  # The whole training configuration is not copied.
  assert weights.provenance['meta'] == {'iter': 80000}


def test_files_of_detectron2_say_their_normalization(classifier, tmp_path):
  path = written(tmp_path / 'x', classifier)
  weights = load_weights(path.rename(tmp_path / 'resnest14_d2-1.pth'))
  assert weights.normalization['mean'] == [123.68, 116.779, 103.939]


def test_our_names_need_a_description(segmentor, tmp_path):
  path = written(tmp_path / 'x', segmentor, 'ours')
  refused('no description of its model.* workdir', load_weights, path)
  path = written(tmp_path / 'y', segmentor, 'ours', {'task': 'segmentor'})
  refused(r'description in .* is damaged', load_weights, path)


def test_classifiers_are_no_segmentors(classifier, tmp_path):
  path = written(tmp_path / 'x', classifier)
  told = 'is a classifier, which gives no label maps; a segmentor is needed'
  refused(told, load_trained, path, tasks=['segmentor'])


# The authors' own segmentors


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
  """A file of PyTorch-Encoding's FCN with 59 classes."""
  network = encoding_network('encoding_fcn', num_classes=59, **WHOLE)
  path = tmp_path_factory.mktemp('encoding') / 'theirs.pth'
  return saved(path, export_state_dict(*network, 'encoding'))


def test_files_of_encoding_say_nothing(theirs):
  weights = load_weights(theirs)
  assert weights.normalization['std'] == [58.395, 57.12, 57.375]
  assert weights.classes is None
  (note,) = weights.notes()
  said = r"stride 8, long edge 520, crops of \[480, 480\], ImageNet's norm"
  assert re.search(said, note)


def test_published_files_of_encoding(theirs, monkeypatch):
  """They are of a data set; here the second choice, which is in the cache."""
  sha1 = checksum(theirs, 'sha1')
  file = Published(('x.zip',), 'resnest14', 'theirs.pth', sha1)
  first = Published(('y.zip',), 'resnest14', 'y.pth', sha1, (file,))
  monkeypatch.setattr(published, '_FILES', {'theirs.pth': file})
  monkeypatch.setitem(published.SEGMENTORS, 'net', first)
  monkeypatch.setitem(published.PUBLISHED, 'net', first)
  monkeypatch.setenv('RESNEST_JAX_CACHE', str(theirs.parent))
  assert load_weights(theirs).notes() == []
  weights = load_weights('net')
  (note,) = weights.notes()
  assert note.startswith('note: y.pth did not come; theirs.pth is what Gluon')
  assert weights.palette == PASCAL_CONTEXT.palette.tolist()
  predictor = from_checkpoint('net')
  assert predictor.classes == PASCAL_CONTEXT.classes
  assert predictor.protocol == Protocol(
    image_scale=(520, 520), crop=(480, 480), stride=(320, 320)
  )
  weights = load_weights('net', drop=['head', 'auxlayer'])
  assert (weights.description.task, weights.classes) == ('backbone', None)


# Training starts


GIVEN_LAYER = "the classifier's layer {} is left out", 'the heads are'
GIVEN_HEADS = 'the heads {} are left out', "the classifier's layer is"
OTHERS = [
  ('classifier', 'official', 'fc'),
  ('classifier', 'mmseg', 'head'),
  ('segmentor', 'mmseg', 'auxiliary_head and decode_head'),
  ('segmentor', 'encoding', 'auxlayer and head'),
]


@pytest.mark.parametrize(('task', 'kind', 'names'), OTHERS)
def test_another_task_gives_its_backbone(
  task, kind, names, segmentor, classifier, tmp_path
):
  given = encoding_network() if kind == 'encoding' else segmentor
  model, said = classifier[0], GIVEN_HEADS
  if task == 'classifier':
    given, model, said = classifier, segmentor[0], GIVEN_LAYER
  fresh = variables_of(model, 1)
  source = written(tmp_path / 'x', given, kind)
  found, notes = start_from(model, fresh, str(source))
  for key, tree in fresh.items():
    assert_same(found[key], tree | {'backbone': given[1][key]['backbone']})
  assert said[0].format(names) in notes
  assert notes[-1] == f'{said[1]} freshly initialised'


# Next to its names there may be a classifier's layer.
@pytest.mark.parametrize('layer', [{}, {'fc.weight': np.zeros((10, 256))}])
def test_bare_backbone(layer, segmentor, tmp_path):
  backbone = segmentor[0].backbone
  theirs = variables_of(backbone, 1)
  tensors = export_state_dict(backbone, theirs, 'mmseg')
  assert 'stem.0.weight' in tensors  # As mmpretrain has it.
  path = saved(tmp_path / 'x.pth', tensors | layer)
  variables, notes = start_from(*segmentor, str(path))
  assert_same(variables['params']['backbone'], theirs['params'])
  assert ("the classifier's layer fc is left out" in notes) == bool(layer)


@pytest.mark.parametrize('kind', ['timm', 'mmseg', 'ours'])
@pytest.mark.parametrize('classes', [10, 4])
def test_classifier_gives_what_fits(kind, classes, classifier, tmp_path):
  """To another; its layer, too, if the number of classes is the same."""
  model = create_classifier('resnest14', classes, stem_width=8, width=8)
  fresh, theirs = variables_of(model, 1), classifier[1]
  about = Weights(
    *({}, 'ours', Description('classifier', CLASSIFIER), None, None),
    *(NORMALIZATION, {'source': 'x'}),
  ).about()
  about = about if kind == 'ours' else {}
  source = written(tmp_path / 'x', classifier, kind, about)
  found, notes = start_from(model, fresh, str(source))
  layer = (fresh if classes == 4 else theirs)['params']['fc']
  assert_same(found['params'], theirs['params'] | {'fc': layer})
  assert_same(found['batch_stats'], theirs['batch_stats'])
  said = 'fc is freshly initialised: the number of classes differs'
  assert (said in notes) == (classes == 4)


NO_HEAD = 'the auxiliary head is freshly initialised: the weights have none'
NO_LAYER = 'decode_head/classifier/conv_seg are freshly initialised'
GIVEN = [
  ({}, None, 'starting from'),
  ({'aux_channels': None}, 'auxiliary_head', NO_HEAD),
  ({'num_classes': 3}, 'classifier', NO_LAYER),
]


@pytest.mark.parametrize(('changes', 'anew', 'said'), GIVEN)
def test_segmentor_gives_what_fits(changes, anew, said, segmentor, tmp_path):
  source = create_segmentor(NETWORK | changes)
  theirs = variables_of(source, 1)
  path = written(tmp_path / 'x', (source, theirs))
  found, notes = start_from(*segmentor, str(path))
  assert notes[1].startswith('note: assumed, as the file does not say: output')
  assert said in notes[-1 if anew else 0]
  assert len(notes) == (3 if anew else 2)
  found, theirs, fresh = map(flatten_dict, (found, theirs, segmentor[1]))
  assert found.keys() == fresh.keys()
  for path, value in found.items():
    expected = fresh if anew in path else theirs
    np.testing.assert_array_equal(value, expected[path])


STAGES = r"has \(1, 1, 2, 1\).* '--config\.model\.stage_sizes=\(1, 1, 1, 1\)'"
HEAD = r"PyTorch-Encoding's networks: .*--config\.model\.head=pspnet"
DIFFERENT = [
  ({'head': 'encoding_pspnet'}, HEAD),
  ({'dilation_rule': 'timm'}, r'--config\.model\.dilation_rule=mmseg'),
  ({'stage_sizes': (1, 1, 2, 1)}, STAGES),
]


@pytest.mark.parametrize(('changes', 'message'), DIFFERENT)
def test_another_network_is_refused(changes, message, segmentor, tmp_path):
  path = written(tmp_path / 'x', segmentor, 'ours', described())
  model = create_segmentor(NETWORK | changes)
  refused(message, start_from, model, variables_of(model), str(path))


def test_another_place_of_the_average_pool_is_refused(tmp_path):
  """No shape shows it; it has to be known from a name or a description."""
  theirs = create_classifier('resnest50_fast_2s1x64d', 4)
  network = theirs, variables_of(theirs)
  path = written(tmp_path / 'x', network, 'timm')
  model = create_segmentor(NETWORK | WHOLE | {'backbone': 'resnest50'})
  fresh = variables_of(model)
  start_from(model, fresh, str(path))
  about = load_weights(path, backbone='resnest50_fast_2s1x64d').about()
  path = written(tmp_path / 'ours', network, 'ours', about)
  said = r'2s1x64d, whose average pool .* before'
  refused(said, start_from, model, fresh, str(path))
