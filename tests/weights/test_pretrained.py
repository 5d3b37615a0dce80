"""Weights with their description, and trainings that start from them."""

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from golden.reference import TINY, variables_of

from resnest_jax.errors import UserError
from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.files import write_weights
from resnest_jax.weights.pretrained import load_segmentor, load_weights
from resnest_jax.weights.start import start_from
from resnest_jax.weights.state_dict import export_state_dict

SEGMENTOR = TINY | {'dtype': 'float32'}


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def written(folder, model, variables, kind='mmseg', about=None):
  """The file of a state dict."""
  state_dict = export_state_dict(model, variables, kind)
  return write_weights(folder, kind, state_dict, about or {})[0]


def test_meta_of_mmsegmentation_goes_along(segmentor, tmp_path):
  """As 1.x writes it; the converter's tests have that of 0.x."""
  data = {'classes': ('a', 'b'), 'palette': [(1, 2, 3), (4, 5, 6)]}
  meta = {'dataset_meta': data, 'iter': 80000, 'config': 'x' * 5000}
  state_dict = export_state_dict(*segmentor, 'mmseg')
  tensors = {k: torch.from_numpy(v.copy()) for k, v in state_dict.items()}
  torch.save({'meta': meta, 'state_dict': tensors}, tmp_path / 'iter.pth')
  weights = load_weights(tmp_path / 'iter.pth')
  assert weights.classes == ['a', 'b']
  assert weights.palette == [[1, 2, 3], [4, 5, 6]]
  assert weights.normalization['mean'] == [123.675, 116.28, 103.53]
  # The whole training configuration is not copied.
  assert weights.provenance['meta'] == {'iter': 80000}


def test_files_of_detectron2_say_their_normalization(classifier, tmp_path):
  model = classifier[0].backbone
  path = written(tmp_path / 'x', model, variables_of(model))
  path = path.rename(tmp_path / 'resnest14_d2-1.pth')
  weights = load_weights(path)
  assert weights.normalization['mean'] == [123.68, 116.779, 103.939]


@pytest.mark.parametrize(
  ('about', 'message'),
  [
    ({}, 'no description of its model'),
    ({'task': 'segmentor'}, r'description in .* is damaged'),
  ],
)
def test_our_names_need_a_description(about, message, segmentor, tmp_path):
  written(tmp_path / 'x', *segmentor, 'ours', about)
  with pytest.raises(UserError, match=message):
    load_weights(tmp_path / 'x')


def test_classifiers_are_no_segmentors(classifier, tmp_path):
  with pytest.raises(UserError, match='is a classifier, which gives no label'):
    load_segmentor(written(tmp_path / 'x', *classifier))


# Training starts


@pytest.mark.parametrize(
  ('kind', 'layer'), [('official', 'fc'), ('mmseg', 'head')]
)
def test_classifier_gives_its_backbone(
  kind, layer, segmentor, classifier, tmp_path
):
  model, fresh = segmentor
  source = written(tmp_path / 'x', *classifier, kind)
  variables, notes = start_from(model, fresh, str(source))
  for key, tree in variables.items():
    assert_same(tree['backbone'], classifier[1][key]['backbone'])
    for head in ('decode_head', 'auxiliary_head'):
      assert_same(tree[head], fresh[key][head])
  assert f"the classifier's layer {layer} is left out" in notes
  assert 'the heads are freshly initialised' in notes


@pytest.mark.parametrize('layer', [False, True])
def test_bare_backbone(layer, segmentor, tmp_path):
  """A bare backbone's names, and maybe a classifier's layer next to them."""
  model, fresh = segmentor
  theirs = variables_of(model.backbone, 1)
  tensors = export_state_dict(model.backbone, theirs, 'mmseg')
  assert 'stem.0.weight' in tensors  # As mmpretrain has it.
  if layer:
    tensors['fc.weight'] = np.zeros((10, 256), np.float32)
  path, _ = write_weights(tmp_path / 'x', 'official', tensors, {})
  variables, notes = start_from(model, fresh, str(path))
  assert_same(variables['params']['backbone'], theirs['params'])
  assert ("the classifier's layer fc is left out" in notes) == layer


@pytest.mark.parametrize(
  ('changes', 'anew', 'said'),
  [
    ({}, None, 'starting from'),
    (
      *({'aux_channels': None}, 'auxiliary_head'),
      'the auxiliary head is freshly initialised: the weights have none',
    ),
    (
      *({'num_classes': 3}, 'classifier'),
      'decode_head/classifier/conv_seg are freshly initialised',
    ),
  ],
)
def test_segmentor_gives_what_fits(changes, anew, said, segmentor, tmp_path):
  source = create_segmentor(SEGMENTOR | changes)
  theirs = variables_of(source, 1)
  path = written(tmp_path / 'x', source, theirs)
  variables, notes = start_from(*segmentor, str(path))
  assert notes[1].startswith('note: assumed, as the file does not say: output')
  assert said in notes[-1 if anew else 0]
  assert len(notes) == (3 if anew else 2)
  trees = (variables, theirs, segmentor[1])
  variables, theirs, fresh = map(flatten_dict, trees)
  assert variables.keys() == fresh.keys()
  for path, value in variables.items():
    expected = fresh if anew in path else theirs
    np.testing.assert_array_equal(value, expected[path])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'dilation_rule': 'timm'}, r'--config\.model\.dilation_rule=mmseg'),
    (
      {'stage_sizes': (1, 1, 2, 1)},
      r"has \(1, 1, 2, 1\).* '--config\.model\.stage_sizes=\(1, 1, 1, 1\)'",
    ),
  ],
)
def test_another_network_is_refused(changes, message, segmentor, tmp_path):
  path = written(tmp_path / 'x', *segmentor)
  model = create_segmentor(SEGMENTOR | changes)
  with pytest.raises(UserError, match=message):
    start_from(model, variables_of(model), str(path))


def test_another_place_of_the_average_pool_is_refused(tmp_path):
  """No shape shows it; it has to be known from a name or a description."""
  theirs = create_classifier('resnest50_fast_2s1x64d', 4)
  variables = variables_of(theirs)
  path = written(tmp_path / 'x', theirs, variables, 'timm')
  model = create_segmentor(
    SEGMENTOR | {'backbone': 'resnest50', 'stem_width': None, 'width': None}
  )
  fresh = variables_of(model)
  start_from(model, fresh, str(path))
  about = load_weights(path, backbone='resnest50_fast_2s1x64d').about()
  path = written(tmp_path / 'ours', theirs, variables, 'ours', about)
  with pytest.raises(UserError, match=r'2s1x64d, whose average pool .* before'):
    start_from(model, fresh, str(path))
