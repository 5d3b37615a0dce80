"""The model of a state dict, from names and shapes alone."""

import numpy as np
import pytest
from golden import reference
from golden.reference import CONFIG, manifest, manifest_names
from weights.built import refused

from resnest_jax.models.classifier import create_classifier
from resnest_jax.weights.infer import describe
from resnest_jax.weights.state_dict import export_state_dict, variable_shapes


def structs(name, old='', new=''):
  """Of a reference's tensors, with a part of their names replaced."""
  return {
    key.replace(old, new): np.broadcast_to(0, shape)
    for key, shape in manifest(name).items()
  }


def without(shapes, part):
  return {key: value for key, value in shapes.items() if part not in key}


@pytest.mark.parametrize('name', manifest_names())
def test_every_reference_is_recognised(name):
  kind, row = name.split('/')
  task, config = describe(structs(name), kind)
  backbone = reference.backbone_of(name)
  if kind in ('mmseg', 'encoding'):
    data, head = row.split('_') if kind == 'mmseg' else row.split('_')[::-2]
    classes = {'ade20k': 150, 'cityscapes': 19, 'ade': 150, 'pcontext': 59}
    expected = {'head': head, 'num_classes': classes[data], 'dtype': 'float32'}
    expected['backbone'] = backbone
    if kind == 'encoding':
      expected['dilation_rule'] = 'official'
      expected['head'] = f'encoding_{head}{"v3" * (head == "deeplab")}'
      expected['head_channels'] = {'fcn': 512, 'deeplab': 256}[head]
    assert (task, config) == ('segmentor', CONFIG | expected)
    return
  if backbone == 'resnest50_fast_2s1x64d':
    # The same shapes; the average pool stands elsewhere.
    assert config['backbone'] == 'resnest50'
    _, config = describe(structs(name), kind, backbone)
  assert task == 'classifier'
  assert config == {
    **{'backbone': backbone, 'output_stride': 32, 'dilation_rule': kind},
    **{'dtype': 'float32', 'num_classes': 1000, 'dropout': 0.0},
  }


def test_other_widths_and_depths_are_measured():
  varied = {'stage_sizes': (1, 2, 1, 3), 'stem_width': 8, 'width': 16}
  varied |= {'radix': 4, 'groups': 2, 'base_width': 32}
  model = create_classifier('resnest101', 12, **varied)
  variables = reference.variables_of(model)
  state_dict = export_state_dict(model, variables, 'mmseg')
  description = describe(state_dict, 'mmseg')
  assert description.task == 'classifier'
  assert {key: description.config[key] for key in varied} == varied
  assert variable_shapes(description.create()) == variable_shapes(model)


TIMM = structs('timm/resnest50d')
FCN = 'mmseg/ade20k_fcn'
ENCODING = 'encoding/deeplab_resnest50_ade'


OTHERS = [
  (TIMM, ['timm', 'resnest101'], r'not that of resnest101.* fit resnest50'),
  (TIMM, ['timm', 'resnest50d'], r'resnest50d.* is not one of resnest14'),
  (without(TIMM, 'layer1.'), ['timm'], r'ResNeSt.*stages are \[2, 3, 4\]'),
  (without(TIMM, '.conv2.conv.'), ['timm'], r'ResNeSt.*conv2\.conv'),
  (structs(FCN, 'conv_cat', 'lateral'), ['mmseg'], '--drop decode_head aux'),
  # One of several, as mmsegmentation numbers them.
  (structs(FCN, 'iliary_head', 'iliary_head.0'), ['mmseg'], '--drop au'),
  (structs(ENCODING, 'head.block', 'head.last'), ['encoding'], 'op head au'),
  (structs(ENCODING, 'layer.conv5', 'layer.x'), ['encoding'], '--drop auxl'),
]


@pytest.mark.parametrize(('shapes', 'arguments', 'message'), OTHERS)
def test_other_networks_are_refused(shapes, arguments, message):
  refused(message, describe, shapes, *arguments)
