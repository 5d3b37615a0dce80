"""Configurations that mmsegmentation stores: obeyed, or refused by name."""

import pytest
from weights.built import converted, refused, saved

from resnest_jax.weights.mmseg_config import read_stored
from resnest_jax.weights.pretrained import load_weights

CONTRACTED = 'contract_dilation=True'
UNCONTRACTED = 'strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)'
STRIDE_8 = f'{UNCONTRACTED}, {CONTRACTED}'
STRIDE_16 = f'strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), {CONTRACTED}'
HEAD = "type='PSPHead', pool_scales=(1, 2, 3, 6), align_corners=False"
OTHER = 'mean=[0.5, 1, 2], std=[255, 127.5, 1.]'
TO_RGB = f'data_preprocessor=dict({OTHER}, bgr_to_rgb=True),'
PIPELINE = f"data = dict(x=[dict(type='Normalize', {OTHER}, to_rgb=False)])"
SCALES = ([0.5, 1, 2], [255, 127.5, 1.0])


def text(backbone=STRIDE_8, head=HEAD, more='', after=''):
  """A configuration as mmengine and mmcv write it."""
  return f"""norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder', {more}
    backbone=dict(type='ResNeSt', {backbone}, norm_cfg=norm_cfg),
    decode_head=dict({head}),
    auxiliary_head=dict(type='FCNHead', align_corners=False))
{after}"""


STRIDES = [
  (text(STRIDE_8), 8),
  (text(STRIDE_16), 16),
  (text('depth=50'), 32),
  # JSON and mappings are read like text.
  ({'model': {'backbone': {'strides': [1, 2, 2, 2]}}}, 32),
  ('{"model": {"backbone": {"strides": [1, 2, 2, 2]}}}', 32),
]


@pytest.mark.parametrize(('config', 'stride'), STRIDES)
def test_strides_are_obeyed(config, stride):
  assert read_stored({'cfg': config}, ['decode_head']).output_stride == stride


NORMALIZATIONS = [
  # 1.x, in the model or next to it, whose default order is OpenCV's.
  (text(more=TO_RGB), ('RGB', *SCALES)),
  (text(after=f'data_preprocessor = dict({OTHER})'), ('BGR', *SCALES)),
  # Without numbers the network sees grey levels.
  (text(more='data_preprocessor=dict(size=8),'), ('BGR', [0] * 3, [1] * 3)),
  # 0.x, whose default is RGB; and only in a pipeline.
  (text(after=f'img_norm_cfg = dict({OTHER})'), ('RGB', *SCALES)),
  (text(after=PIPELINE), ('BGR', *SCALES)),
]


@pytest.mark.parametrize(('config', 'expected'), NORMALIZATIONS)
def test_normalisation_is_obeyed(config, expected):
  found = read_stored({'config': config}, ['decode_head']).normalization
  assert found == dict(zip(('order', 'mean', 'std'), expected, strict=True))


HEADS = [
  # The auxiliary head is in the weights alone.
  ('model = dict(decode_head=dict(align_corners=True))', 'ners is True'),
  (text(head='pool_scales=(1, 2, 4, 8)'), r'pool_scales is \(1, 2, 4, 8\)'),
  (text(head="type='ASPPHead'"), r'dilations is \(1, 6, 12, 18\), here'),
  (text(head="act_cfg=dict(type='GELU')"), r"act_cfg\.type is 'GELU'"),
  (text(UNCONTRACTED), 'contract_dilation is not True'),
  (text('strides=([1], {}, 1, 1)'), r'strides are \(\[1\], \{\}, 1, 1\) and'),
  (text('strides=(1, 1, 1, 1)'), r'strides are \(1, 1, 1, 1\) and dilations'),
]


@pytest.mark.parametrize(('config', 'named'), HEADS)
def test_other_heads_can_be_dropped_alone(config, named, mmseg, tmp_path):
  path = stored(tmp_path, mmseg, {'cfg': config})
  message = refused(named, load_weights, path)
  drop = message.partition('--drop ')[2].rstrip('.').split()
  weights = converted(path, tmp_path / 'x', '--drop', *drop)
  assert weights.description.task == 'backbone'


BACKBONES = [
  ('avg_down_stride=False', 'avg_down_stride is False, here it is True'),
  ("style='caffe'", "style is 'caffe'"),
  ("norm_cfg=dict(type='BN', eps=1e-3)", r'norm_cfg\.eps is 0\.001'),
  ('multi_grid=(1, 2, 4)', r'multi_grid is \(1, 2, 4\)'),
]


@pytest.mark.parametrize(('backbone', 'named'), BACKBONES)
@pytest.mark.parametrize('heads', [['decode_head'], []])
def test_other_backbones_are_refused(backbone, named, heads):
  config = text(backbone).replace(', norm_cfg=norm_cfg', '')
  assert '--drop' not in refused(named, read_stored, {'cfg': config}, heads)


NONE = [
  *(None, 5, '', 'model = 5', 'model = dict(', '{"model": '),
  '(' * 100_000,
  'model = ' + '[' * 90 + ']' * 90,
  'x = 1\n' * 1_000_000,
  'model = __import__("os").system("true")',
]


@pytest.mark.parametrize('config', NONE)
def test_what_is_no_configuration_says_nothing(config):
  assert not read_stored({'cfg': config}, ['decode_head']).found


def stored(folder, mmseg, meta):
  return saved(folder / 'iter.pth', {'meta': meta, 'state_dict': mmseg})


def test_weights_keep_what_was_stored(mmseg, tmp_path, capsys):
  more = 'data_preprocessor=dict(mean=[0, 0, 0], std=[255, 255, 255]),'
  path = stored(tmp_path, mmseg, {'cfg': text(STRIDE_16, more=more)})
  ours = converted(path, tmp_path / 'ours')
  assert 'note:' not in capsys.readouterr().out
  for weights in (load_weights(path), ours):
    assert weights.description.config['output_stride'] == 16
    assert weights.normalized()[:3] == ((0, 0, 0), (255, 255, 255), 'BGR')


ASSUMED = [
  ({}, 'output stride 8, align_corners False, ImageNet'),
  ({'cfg': text()}, "not say: ImageNet's normalisation (RGB, mean [123.675"),
  ({'cfg': 'model = '}, 'output stride 8, align_corners False'),
]


@pytest.mark.parametrize(('meta', 'said'), ASSUMED)
def test_assumptions_are_printed(meta, said, mmseg, tmp_path, capsys):
  converted(stored(tmp_path, mmseg, meta), tmp_path / 'ours')
  assert said in capsys.readouterr().out
