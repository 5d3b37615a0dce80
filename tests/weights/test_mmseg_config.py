"""Configurations that mmsegmentation stores: obeyed, or refused by name."""

import json

import pytest
import torch

from resnest_jax.errors import UserError
from resnest_jax.weights import convert
from resnest_jax.weights.mmseg_config import read_stored
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.state_dict import export_state_dict

STRIDE_8 = (
  'strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True'
)
STRIDE_16 = (
  'strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), contract_dilation=True'
)
HEAD = "type='PSPHead', pool_scales=(1, 2, 3, 6), align_corners=False"
NORM = 'mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]'


def text(backbone=STRIDE_8, head=HEAD, more='', after=''):
  """A configuration as mmengine and mmcv write it."""
  return f"""norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder', {more}
    backbone=dict(type='ResNeSt', {backbone}, norm_cfg=norm_cfg),
    decode_head=dict({head}),
    auxiliary_head=dict(type='FCNHead', align_corners=False))
{after}
"""


@pytest.mark.parametrize(
  ('backbone', 'stride'),
  [(STRIDE_8, 8), (STRIDE_16, 16), ('depth=50', 32)],
)
def test_strides_are_obeyed(backbone, stride):
  assert read_stored({'cfg': text(backbone)}, True).output_stride == stride


NOT_OURS = ([0.5, 1, 2], [255, 127.5, 1.0])


@pytest.mark.parametrize(
  ('config', 'expected'),
  [
    # 1.x, in the model or next to it, whose default order is OpenCV's.
    (
      text(more=f'data_preprocessor=dict({NORM}, bgr_to_rgb=True),'),
      ('RGB', [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    ),
    (
      text(
        after='data_preprocessor = dict(mean=[0.5, 1, 2], std=[255, 127.5, 1.])'
      ),
      ('BGR', *NOT_OURS),
    ),
    # Without numbers the network sees grey levels.
    (
      text(more='data_preprocessor=dict(size=(8, 8)),'),
      ('BGR', [0] * 3, [1] * 3),
    ),
    # 0.x, whose default is RGB; and only in a pipeline.
    (
      text(
        after='img_norm_cfg = dict(mean=[0.5, 1, 2], std=[255, 127.5, 1.0])'
      ),
      ('RGB', *NOT_OURS),
    ),
    (
      text(
        after="data = dict(test=dict(pipeline=[dict(type='Normalize', "
        'mean=[0.5, 1, 2], std=[255, 127.5, 1.0], to_rgb=False)]))'
      ),
      ('BGR', *NOT_OURS),
    ),
    (text(), None),
  ],
)
def test_normalisation_is_obeyed(config, expected):
  found = read_stored({'config': config}, True).normalization
  if expected is None:
    assert found is None
    return
  order, mean, std = expected
  assert found == {'order': order, 'mean': mean, 'std': std}


def test_json_and_mappings_are_read_like_text():
  content = {'model': {'backbone': {'strides': [1, 2, 2, 2]}}}
  for config in (content, json.dumps(content)):
    assert read_stored({'cfg': config}, True).output_stride == 32


@pytest.mark.parametrize(
  ('config', 'named'),
  [
    (text(head="type='FCNHead', align_corners=True"), 'align_corners is True'),
    (text(head='pool_scales=(1, 2, 4, 8)'), r'pool_scales is \(1, 2, 4, 8\)'),
    (text(head="type='ASPPHead'"), r'dilations is \(1, 6, 12, 18\), here'),
    (text(head="act_cfg=dict(type='GELU')"), r"act_cfg\.type is 'GELU'"),
    (
      text('strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)'),
      'contract_dilation is not True',
    ),
    (text('strides=([1], {}, 1, 1)'), r'strides are \(\[1\], \{\}, 1, 1\) and'),
    (text('strides=(1, 1, 1, 1)'), r'strides are \(1, 1, 1, 1\) and dilations'),
  ],
)
def test_other_heads_are_refused_and_the_backbone_can_be_taken(
  config, named, segmentor, tmp_path
):
  path = stored(tmp_path, segmentor, {'cfg': config})
  with pytest.raises(UserError, match=named) as refusal:
    load_weights(path)
  drop = str(refusal.value).partition('--drop ')[2].rstrip('.').split()
  convert.main([str(path), '--out', str(tmp_path / 'x'), '--drop', *drop])
  assert load_weights(tmp_path / 'x').description.task == 'backbone'


@pytest.mark.parametrize(
  ('backbone', 'named'),
  [
    ('avg_down_stride=False', 'avg_down_stride is False, here it is True'),
    ("style='caffe'", "style is 'caffe'"),
    ("norm_cfg=dict(type='BN', eps=1e-3)", r'norm_cfg\.eps is 0\.001'),
    ('multi_grid=(1, 2, 4)', r'multi_grid is \(1, 2, 4\)'),
  ],
)
@pytest.mark.parametrize('heads', [True, False])
def test_other_backbones_are_refused(backbone, named, heads):
  config = text(backbone).replace(', norm_cfg=norm_cfg', '')
  with pytest.raises(UserError, match=named) as refusal:
    read_stored({'cfg': config}, heads)
  assert '--drop' not in str(refusal.value)


@pytest.mark.parametrize(
  'config',
  [
    *(None, 5, '', 'model = 5', 'model = dict(', '{"model": '),
    '(' * 100_000,
    'model = ' + '[' * 90 + ']' * 90,
    'x = 1\n' * 1_000_000,
    'model = __import__("os").system("true")',
  ],
)
def test_what_is_no_configuration_says_nothing(config):
  assert not read_stored({'cfg': config}, True).found


def stored(folder, segmentor, meta):
  state_dict = export_state_dict(*segmentor, 'mmseg')
  tensors = {k: torch.tensor(v) for k, v in state_dict.items()}
  torch.save({'meta': meta, 'state_dict': tensors}, folder / 'iter.pth')
  return folder / 'iter.pth'


def test_weights_keep_what_was_stored(segmentor, tmp_path, capsys):
  more = 'data_preprocessor=dict(mean=[0, 0, 0], std=[255, 255, 255]),'
  path = stored(tmp_path, segmentor, {'cfg': text(STRIDE_16, more=more)})
  convert.main([str(path), '--out', str(tmp_path / 'ours')])
  assert 'note:' not in capsys.readouterr().out
  for source in (path, tmp_path / 'ours'):
    weights = load_weights(source)
    assert weights.description.config['output_stride'] == 16
    assert weights.normalized() == ((0, 0, 0), (255, 255, 255), 'BGR')


@pytest.mark.parametrize(
  ('meta', 'said'),
  [
    ({}, 'output stride 8, align_corners False, ImageNet'),
    ({'cfg': text()}, "not say: ImageNet's normalisation (RGB, mean [123.675"),
    ({'cfg': 'model = '}, 'output stride 8, align_corners False'),
  ],
)
def test_assumptions_are_printed(meta, said, segmentor, tmp_path, capsys):
  path = stored(tmp_path, segmentor, meta)
  convert.main([str(path), '--out', str(tmp_path / 'ours')])
  assert said in capsys.readouterr().out
