"""Weights with their description, and trainings that start from them."""

import jax
import numpy as np
import pytest
import torch
from golden.reference import TINY, filled_variables
from safetensors.numpy import save_file

from resnest_jax.errors import UserError
from resnest_jax.models.classifier import create_classifier
from resnest_jax.models.segmentor import create_backbone, create_segmentor
from resnest_jax.weights.files import write_weights
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.start import start_from
from resnest_jax.weights.state_dict import export_state_dict, variable_shapes

BACKBONE = {'stem_width': 8, 'width': 8}
SEGMENTOR = TINY | {'dtype': 'float32'}


def variables_of(model, seed=0):
  return filled_variables(variable_shapes(model), seed)


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def write_safetensors(path, model, variables, kind):
  state_dict = export_state_dict(model, variables, kind)
  tensors = {k: np.ascontiguousarray(v) for k, v in state_dict.items()}
  save_file(tensors, path)
  return path


def write_pth(path, model, variables, meta):
  state_dict = export_state_dict(model, variables, 'mmseg')
  tensors = {k: torch.from_numpy(v.copy()) for k, v in state_dict.items()}
  torch.save({'meta': meta, 'state_dict': tensors}, path)
  return path


@pytest.fixture(scope='module')
def segmentor():
  model = create_segmentor(SEGMENTOR)
  return model, variables_of(model)


@pytest.fixture(scope='module')
def classifier():
  model = create_classifier('resnest14', 10, **BACKBONE)
  return model, variables_of(model)


@pytest.mark.parametrize(
  'meta',
  [
    {'CLASSES': ('a', 'b'), 'PALETTE': [[1, 2, 3], [4, 5, 6]]},
    {
      'dataset_meta': {
        'classes': ('a', 'b'),
        'palette': [(1, 2, 3), (4, 5, 6)],
      }
    },
  ],
  ids=['0.x', '1.x'],
)
def test_meta_of_mmsegmentation_goes_along(meta, segmentor, tmp_path):
  meta |= {'iter': 80000, 'time': 'today', 'config': 'x' * 5000}
  path = write_pth(tmp_path / 'iter.pth', *segmentor, meta)
  weights = load_weights(path)
  assert weights.kind == 'mmseg'
  assert weights.classes == ['a', 'b']
  assert weights.palette == [[1, 2, 3], [4, 5, 6]]
  assert weights.description.config['dilation_rule'] == 'mmseg'
  assert weights.description.config['head'] == 'pspnet'
  assert weights.normalization['mean'] == [123.675, 116.28, 103.53]
  # The whole training configuration is not copied.
  assert weights.provenance['meta'] == {'iter': 80000, 'time': 'today'}
  assert len(weights.provenance['sha256']) == 64


def test_description_is_kept_with_the_weights(segmentor, tmp_path):
  path = write_pth(tmp_path / 'x.pth', *segmentor, {'CLASSES': ['a']})
  first = load_weights(path)
  config = first.description.config | {'dilation_rule': 'official'}
  description = first.description._replace(config=config)
  about = first._replace(description=description).about()
  state_dict = export_state_dict(*segmentor, 'ours')
  write_weights(tmp_path / 'ours', 'ours', state_dict, about)
  second = load_weights(tmp_path / 'ours')
  assert second.kind == 'ours'
  assert second.description.config['dilation_rule'] == 'official'
  assert second.classes == ['a']
  assert second.provenance['from']['source'] == str(path)


def test_files_of_detectron2_say_their_normalization(classifier, tmp_path):
  model = classifier[0].backbone
  path = write_safetensors(
    tmp_path / 'resnest14_d2-1.safetensors', model, variables_of(model), 'mmseg'
  )
  weights = load_weights(path)
  assert weights.description.task == 'backbone'
  assert weights.normalization['mean'] == [123.68, 116.779, 103.939]


def test_our_names_without_a_description_are_refused(segmentor, tmp_path):
  path = write_safetensors(tmp_path / 'x.safetensors', *segmentor, 'ours')
  with pytest.raises(UserError, match='no description of its model'):
    load_weights(path)


@pytest.mark.parametrize(
  'about', [{'task': 'segmentor'}, {'task': 'segmentor', 'model': 3}]
)
def test_damaged_description_is_refused(about, segmentor, tmp_path):
  state_dict = export_state_dict(*segmentor, 'ours')
  write_weights(tmp_path / 'x', 'ours', state_dict, about)
  with pytest.raises(UserError, match=r'description in .* is damaged'):
    load_weights(tmp_path / 'x')


# Training starts


@pytest.mark.parametrize('kind', ['official', 'mmseg'])
def test_classifier_gives_its_backbone(kind, segmentor, classifier, tmp_path):
  model, fresh = segmentor
  source = write_safetensors(tmp_path / 'x.safetensors', *classifier, kind)
  variables, notes = start_from(model, fresh, str(source))
  for key, tree in variables.items():
    assert_same(tree['backbone'], classifier[1][key]['backbone'])
    for head in ('decode_head', 'auxiliary_head'):
      assert_same(tree[head], fresh[key][head])
  layer = {'official': 'fc', 'mmseg': 'head'}[kind]
  assert f"the classifier's layer {layer} is left out" in notes
  assert 'the heads are drawn anew' in notes


def test_bare_backbone(segmentor, tmp_path):
  model, fresh = segmentor
  backbone = create_backbone(SEGMENTOR)
  theirs = variables_of(backbone, 1)
  path = write_safetensors(
    tmp_path / 'x.safetensors', backbone, theirs, 'mmseg'
  )
  variables, _ = start_from(model, fresh, str(path))
  assert_same(variables['params']['backbone'], theirs['params'])


def test_backbone_with_a_classifiers_layer(segmentor, tmp_path):
  """A bare backbone's names, and fc beside them."""
  model, fresh = segmentor
  theirs = variables_of(model.backbone, 1)
  tensors = export_state_dict(model.backbone, theirs, 'mmseg')
  tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  tensors['fc.weight'] = np.zeros((10, 256), np.float32)
  save_file(tensors, tmp_path / 'x.safetensors')
  variables, notes = start_from(model, fresh, str(tmp_path / 'x.safetensors'))
  assert_same(variables['params']['backbone'], theirs['params'])
  assert "the classifier's layer fc is left out" in notes


def test_segmentor_gives_everything(segmentor, tmp_path):
  model, fresh = segmentor
  theirs = variables_of(model, 1)
  path = write_pth(tmp_path / 'x.pth', model, theirs, {})
  variables, notes = start_from(model, fresh, str(path))
  assert_same(variables, theirs)
  assert len(notes) == 1


def test_auxiliary_head_that_is_not_there_is_drawn_anew(segmentor, tmp_path):
  model, fresh = segmentor
  theirs = variables_of(model, 1)
  state_dict = export_state_dict(model, theirs, 'mmseg')
  kept = {k: v for k, v in state_dict.items() if k[:10] != 'auxiliary_'}
  write_weights(tmp_path / 'x', 'mmseg', kept, {})
  variables, notes = start_from(model, fresh, str(tmp_path / 'x'))
  for key, tree in variables.items():
    assert_same(tree['auxiliary_head'], fresh[key]['auxiliary_head'])
    for name in ('backbone', 'decode_head'):
      assert_same(tree[name], theirs[key][name])
  assert 'the auxiliary head is drawn anew: the weights have none' in notes


def test_other_classes_are_drawn_anew_and_said(segmentor, tmp_path):
  theirs = segmentor[1]
  path = write_pth(tmp_path / 'x.pth', *segmentor, {})
  model = create_segmentor(SEGMENTOR | {'num_classes': 3})
  fresh = variables_of(model, 1)
  variables, notes = start_from(model, fresh, str(path))
  head, new = variables['params']['decode_head'], fresh['params']['decode_head']
  assert_same(head['classifier'], new['classifier'])
  assert_same(head['bottleneck'], theirs['params']['decode_head']['bottleneck'])
  assert 'decode_head/classifier/conv_seg are drawn anew' in notes[1]


def test_another_dilation_rule_is_refused(segmentor, tmp_path):
  path = write_pth(tmp_path / 'x.pth', *segmentor, {})
  model = create_segmentor(SEGMENTOR | {'dilation_rule': 'timm'})
  with pytest.raises(UserError, match=r'--config\.model\.dilation_rule=mmseg'):
    start_from(model, variables_of(model), str(path))


def test_another_depth_is_refused(classifier, tmp_path):
  path = write_safetensors(tmp_path / 'x.safetensors', *classifier, 'official')
  model = create_segmentor(SEGMENTOR | {'stage_sizes': (1, 1, 2, 1)})
  with pytest.raises(
    UserError,
    match=r'stage_sizes is \(1, 1, 1, 1\), the model has \(1, 1, 2, 1\).* Add '
    r"'--config\.model\.stage_sizes=\(1, 1, 1, 1\)'\.",
  ):
    start_from(model, variables_of(model), str(path))


def test_another_place_of_the_average_pool_is_refused(tmp_path):
  """No shape shows it; it has to be known from a name or a description."""
  theirs = create_classifier('resnest50_fast_2s1x64d', 4)
  variables = variables_of(theirs)
  path = write_safetensors(
    tmp_path / 'x.safetensors', theirs, variables, 'timm'
  )
  model = create_segmentor(
    SEGMENTOR | {'backbone': 'resnest50', 'stem_width': None, 'width': None}
  )
  fresh = variables_of(model)
  start_from(model, fresh, str(path))
  named = load_weights(path, backbone='resnest50_fast_2s1x64d')
  state_dict = export_state_dict(theirs, variables, 'ours')
  write_weights(tmp_path / 'ours', 'ours', state_dict, named.about())
  with pytest.raises(UserError, match=r'2s1x64d, whose average pool .* before'):
    start_from(model, fresh, str(tmp_path / 'ours'))
