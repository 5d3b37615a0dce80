"""The model of a state dict, from names and shapes alone."""

import jax
import numpy as np
import pytest
from golden.reference import manifest, manifest_names

from resnest_jax.errors import UserError
from resnest_jax.models.classifier import create_classifier
from resnest_jax.weights.infer import describe
from resnest_jax.weights.state_dict import export_state_dict, variable_shapes

TIMM = {
  'resnest50d_4s2x40d': 'resnest50_fast_4s2x40d',
  'resnest50d_1s4x24d': 'resnest50_fast_1s4x24d',
}


def structs(name):
  return {
    key: jax.ShapeDtypeStruct(shape, np.float32)
    for key, shape in manifest(name).items()
  }


@pytest.mark.parametrize('name', manifest_names())
def test_every_reference_is_recognised(name):
  kind, row = name.split('/')
  task, config = describe(structs(name), kind)
  if kind == 'mmseg':
    data, head = row.split('_')
    assert task == 'segmentor'
    assert config == {
      'backbone': 'resnest101',
      'output_stride': 8,
      'dilation_rule': 'mmseg',
      'dtype': 'float32',
      'head': head,
      'head_channels': 512,
      'aux_channels': 256,
      'num_classes': {'ade20k': 150, 'cityscapes': 19}[data],
      'dropout': 0.1,
    }
    return
  backbone = TIMM.get(row, row.removesuffix('d').removesuffix('e'))
  if kind == 'official':
    backbone = row
  if backbone == 'resnest50_fast_2s1x64d':
    # The same shapes; the average pool stands elsewhere.
    assert config['backbone'] == 'resnest50'
    _, config = describe(structs(name), kind, backbone)
  assert task == 'classifier'
  assert config == {
    'backbone': backbone,
    'output_stride': 32,
    'dilation_rule': kind,
    'dtype': 'float32',
    'num_classes': 1000,
    'dropout': 0.0,
  }


def test_other_widths_and_depths_are_measured():
  varied = {
    'stage_sizes': (1, 2, 1, 3),
    'stem_width': 8,
    'width': 16,
    'radix': 4,
    'groups': 2,
    'base_width': 32,
  }
  model = create_classifier('resnest101', 12, **varied)
  shapes = variable_shapes(model)
  variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  state_dict = export_state_dict(model, variables, 'mmseg')
  description = describe(state_dict, 'mmseg')
  assert description.task == 'classifier'
  assert {key: description.config[key] for key in varied} == varied
  found = variable_shapes(description.create())
  assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, shapes)


@pytest.mark.parametrize(
  'name', ['mmseg/ade20k_deeplabv3plus', 'timm/resnest26d']
)
def test_described_model_has_the_shapes_that_were_described(name):
  model = describe(structs(name), name.split('/')[0]).create()
  sizes = [leaf.size for leaf in jax.tree.leaves(variable_shapes(model))]
  reference = [
    np.prod(shape)
    for key, shape in manifest(name).items()
    if not key.endswith('num_batches_tracked')
  ]
  assert sum(sizes) == sum(reference)


def test_backbone_without_a_classifier():
  bare = {
    key: value
    for key, value in structs('official/resnest200').items()
    if not key.startswith('fc.')
  }
  task, config = describe(bare, 'official')
  assert (task, config['backbone']) == ('backbone', 'resnest200')
  assert 'num_classes' not in config


def test_another_named_backbone_is_refused():
  with pytest.raises(
    UserError, match=r'not that of resnest101.* fit resnest50'
  ):
    describe(structs('timm/resnest50d'), 'timm', 'resnest101')
  with pytest.raises(UserError, match=r'resnest50d.* is not one of resnest14'):
    describe(structs('timm/resnest50d'), 'timm', 'resnest50d')


def test_other_networks_are_refused():
  with pytest.raises(UserError, match='no state dict of a ResNeSt'):
    describe({'conv1.0.weight': np.zeros((8, 3, 3, 3))}, 'official')
  resnet = structs('timm/resnest50d')
  resnet = {k: v for k, v in resnet.items() if '.conv2.conv.' not in k}
  with pytest.raises(UserError, match=r'ResNeSt.*conv2\.conv'):
    describe(resnet, 'timm')


def test_unknown_head_is_refused():
  shapes = structs('mmseg/ade20k_fcn')
  other = {
    key.replace('conv_cat', 'lateral'): value for key, value in shapes.items()
  }
  with pytest.raises(
    UserError,
    match=r'heads of this .* not known.*--drop decode_head auxiliary_head ',
  ):
    describe(other, 'mmseg')
  # One of several, as mmsegmentation numbers them.
  other = {
    key.replace('auxiliary_head.', 'auxiliary_head.0.'): value
    for key, value in shapes.items()
  }
  with pytest.raises(
    UserError, match=r'auxiliary_head .*--drop auxiliary_head '
  ):
    describe(other, 'mmseg')


def test_auxiliary_head_may_be_absent():
  shapes = structs('mmseg/ade20k_fcn')
  bare = {k: v for k, v in shapes.items() if k[:10] != 'auxiliary_'}
  whole, without = describe(shapes, 'mmseg'), describe(bare, 'mmseg')
  assert without.task == 'segmentor'
  assert without.config == whole.config | {'aux_channels': None}
