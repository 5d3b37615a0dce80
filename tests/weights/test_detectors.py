"""Backbones under detectron2's and mmdetection's names, there and back."""

import numpy as np
import pytest
from golden.reference import assert_same_bits, variables_of
from weights.built import refused, saved

import resnest_jax as rj
from resnest_jax.models.resnest import BACKBONES
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.start import start_from

WIDTHS = {'stem_width': 8, 'width': 8}
NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


def norm(name, channels):
  shapes = {f'{name}.{x}': (channels,) for x in NORM}
  return shapes | {f'{name}.num_batches_tracked': ()}


def split_attention(name, width):
  """What both libraries call the tensors of a radix of 2, alike."""
  hidden = max(width * 2 // 4, 32)
  shapes = {f'{name}.conv.weight': (2 * width, width // 2, 3, 3)}
  for layer, out, given in (('fc1', hidden, width), ('fc2', 2 * width, hidden)):
    shapes[f'{name}.{layer}.weight'] = (out, given, 1, 1)
    shapes[f'{name}.{layer}.bias'] = (out,)
  return shapes | norm(f'{name}.bn0', 2 * width) | norm(f'{name}.bn1', hidden)


def theirs(kind, sizes):
  """Names and shapes in detectron2's and mmdetection's ResNeSt.

  The pools of the latter count in `downsample`.
  """
  shapes, d2 = {}, kind == 'detectron2'

  def add(conv, norm_after, kernel):
    shapes[f'{conv}.weight'] = kernel
    shapes.update(norm(f'{conv}.norm' if d2 else norm_after, kernel[0]))

  channels = 3
  for index, width in enumerate((8, 8, 16)):
    conv = f'stem.conv1_{index + 1}' if d2 else f'stem.{3 * index}'
    add(conv, f'stem.{3 * index + 1}', (width, channels, 3, 3))
    channels = width
  for stage, blocks in enumerate(sizes):
    width = 8 * 2**stage
    for index in range(blocks):
      block = f'res{stage + 2}' if d2 else f'layer{stage + 1}'
      block += f'.{index}.'
      add(f'{block}conv1', f'{block}bn1', (width, channels, 1, 1))
      add(f'{block}conv3', f'{block}bn3', (4 * width, width, 1, 1))
      if index == 0:
        conv = block + ('shortcut' if d2 else 'downsample.1')
        add(conv, f'{block}downsample.2', (4 * width, channels, 1, 1))
      shapes |= split_attention(f'{block}conv2', width)
      channels = 4 * width
  return shapes


# What a detector has around its backbone, and in front of its names.
AROUND = {
  'detectron2': ('backbone.bottom_up.', 'backbone.fpn_lateral2', 'roi_heads.x'),
  'mmdet': ('backbone.', 'neck.lateral_convs.0.conv', 'roi_head.bbox_head.fc'),
}


@pytest.fixture(scope='module')
def backbone():
  config = {'backbone': 'resnest26', 'output_stride': 32, **WIDTHS}
  config |= {'dilation_rule': 'mmseg', 'dtype': 'float32'}
  model = rj.create_backbone(config)
  return model, variables_of(model)


@pytest.mark.parametrize('kind', AROUND)
def test_names_and_shapes_are_theirs(kind, backbone):
  state_dict = rj.export_state_dict(*backbone, kind)
  expected = theirs(kind, BACKBONES['resnest26'].stage_sizes)
  assert {name: value.shape for name, value in state_dict.items()} == expected
  back = rj.import_state_dict(backbone[0], state_dict)
  assert_same_bits(rj.export_state_dict(backbone[0], back, kind), state_dict)


@pytest.mark.parametrize('kind', AROUND)
def test_detectors_give_their_backbone(kind, backbone, tmp_path):
  state_dict = rj.export_state_dict(*backbone, kind)
  prefix, *around = AROUND[kind]
  inside = {prefix + name: value for name, value in state_dict.items()}
  other = {f'{name}.weight': np.ones((2, 3, 1, 1), 'f') for name in around}
  path = saved(tmp_path / 'detector.pth', {'model': inside | other})
  weights = load_weights(path)
  means = {'detectron2': [123.68, 116.779, 103.939]}
  mean = means.get(kind, [123.675, 116.28, 103.53])
  assert weights.normalization['mean'] == mean
  assert weights.description.config['stage_sizes'] == (2, 2, 2, 2)
  assert weights.description.config['stem_width'] == 8
  # A training takes it as well.
  model = rj.create_classifier('resnest26', 3, **WIDTHS)
  found, notes = start_from(model, variables_of(model, 1), str(path))
  found = {key: tree['backbone'] for key, tree in found.items()}
  assert_same_bits(rj.export_state_dict(backbone[0], found, kind), state_dict)
  left = {'detectron2': 'fpn_lateral2, roi_heads', 'mmdet': 'neck, roi_head'}
  assert f'{left[kind]} are left out' in notes


def test_what_detectors_do_not_have_is_refused(backbone):
  def varied(**changes):
    model = backbone[0].clone(**changes)
    return model, variables_of(model)

  said = "mmdetection's ResNeSt has no backbone with avd_first"
  refused(said, rj.export_state_dict, *varied(avd_first=True), 'mmdet')
  said = "detectron2's ResNeSt has no backbone with radix 1"
  refused(said, rj.export_state_dict, *varied(radix=1), 'detectron2')
  assert rj.export_state_dict(*varied(radix=1), 'mmdet')
