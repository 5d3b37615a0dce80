"""The code of docs/backbone.md runs as it stands, on a smaller network."""

import re

import cv2
import numpy as np
import pytest
from golden.reference import variables_of
from pages import ROOT, blocks_of
from weights.built import converted, written

import resnest_jax as rj
from resnest_jax.data.preprocess import STD
from resnest_jax.models.features import Features
from resnest_jax.weights.pretrained import DETECTRON_NORMALIZATION

RESNEST50 = {'backbone': 'resnest50', 'output_stride': 32, 'dtype': 'float32'}
RESNEST50 |= {'dilation_rule': 'mmseg'}


@pytest.fixture
def followed(tmp_path, monkeypatch):
  """The names after each block, in a folder with the files that they read."""
  model = rj.create_classifier('resnest14', 10, stem_width=8, width=8)
  network = model, variables_of(model)
  path = written(tmp_path / 'theirs', network, 'timm')
  converted(path, tmp_path / 'weights/resnest50')
  theirs = written(tmp_path / 'd2', network, 'detectron2')
  theirs.rename(tmp_path / 'detector.pth')
  cv2.imwrite(str(tmp_path / 'street.jpg'), np.full((70, 64, 3), 99, np.uint8))
  monkeypatch.chdir(tmp_path)
  names, after = {}, []
  for block in blocks_of('backbone.md'):
    exec(block, names)
    after.append(dict(names))
  return after


def test_blocks_run(followed):
  plain, pyramid, config, back = followed
  assert plain['features']['c2'].shape == (1, 18, 16, 32)
  assert pyramid['model'].strides['p6'] == 64
  gradients = pyramid['gradients']['backbone']['stem_conv1']['kernel']
  assert abs(gradients).max() > 0
  stem_width = rj.create_backbone(RESNEST50).stem_width
  assert config['model']['backbone']['stem_channels'] == 2 * stem_width
  assert config['model']['data_preprocessor']['std'] == list(STD)
  assert back['about']['normalization'] == DETECTRON_NORMALIZATION


def test_table_has_strides_and_channels():
  text = (ROOT / 'docs/backbone.md').read_text('utf-8')
  rows = re.findall(r'^\| (stride|channels)(.*?) \| (\d.*) \|$', text, re.M)
  found = {what + of: [*map(int, x.split(' | '))] for what, of, x in rows}
  expected = {}
  for stride in (32, 16, 8):
    key = '' if stride == 32 else f' at `output_stride` {stride}'
    model = Features(rj.create_backbone(RESNEST50 | {'output_stride': stride}))
    expected[f'stride{key}'] = list(model.strides.values())
  expected['channels of all published networks'] = [*model.channels.values()]
  assert found == expected
