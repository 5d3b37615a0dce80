"""Descriptions of weights that are damaged, hostile or of another type."""

import json

import pytest
import torch
from safetensors.numpy import save_file
from weights.built import changed, described, refused, tensors, written

from resnest_jax.untrusted import DEPTH, LENGTH, parse_json
from resnest_jax.weights.files import HEADER_KEY
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.state_dict import export_state_dict


@pytest.fixture(scope='module')
def ours(segmentor):
  return export_state_dict(*segmentor, 'ours')


def refusal(folder, state_dict, about):
  """How our weights with such a description are refused."""
  path = folder / 'x.safetensors'
  save_file(state_dict, path, {HEADER_KEY: json.dumps(about)})
  return refused('the description in .* is damaged', load_weights, path)


MANY = [[0, 0, 0]] * 100_000
WRONG = [
  ('task', ['poem', None, ['segmentor'], 3]),
  ('classes', ['abcdefg', [1, 2], {'a': 0}, [None], 7, ['x' * 10_000]]),
  ('palette', [[[0, 0, 300]], [[0, 0, -1]], [[0, 0, 0, 0]], ['abc'], MANY]),
  ('palette', ['red', [[0.5, 0, 0]], [[True, 0, 0]], {'0': [0, 0, 0]}]),
  ('model', [None, [], 'resnest50', {}]),
  ('model.num_classes', ['7', 7.0, True, 1, -1, 10**30, None]),
  ('model.backbone', [['resnest14'], 'resnet50', None, {}]),
  ('model.stage_sizes', [[1, 1, 1], [10**9, 1, 1, 1], [1, 1, 1, 0], '1111']),
  ('model.radix', [0, 10**9, '2', -2, 3]),
  ('model.width', [-8, 0, 10**12, 7.5, 7]),
  ('model.groups', [3, 0, 10**6]),
  ('model.head', ['transformer', ['pspnet'], None]),
  ('model.output_stride', [16.0, 4, '8', [8]]),
  ('model.dropout', [1, -0.1, '0.1', 10**400]),
  ('model.aux_channels', [0, '8', [8]]),
  ('image_scale', [2048, [30_000, 30_000], [1, 2], [0, 0], ['a', 'b']]),
  ('image_scale', [[64], '64', {'0': 64, '1': 48}, [64.0, 48.0]]),
  ('crop_size', [[10**6, 10**6], [32], 32, 'ab']),
  ('normalization', [None, 'ImageNet', [], {}]),
  ('normalization.std', [[1, 1, 0], [1, 1], '111', [1, 1, None], 0]),
  ('normalization.mean', [[0, 0, 10**7], 0, {'0': 1}, [0, 0, '0']]),
  ('normalization.order', ['GBR', None, ['RGB']]),
  ('provenance', [None, [], 'me']),
  ('provenance.backbone_known', ['yes', 1, None]),
]
EACH = [(where, value) for where, values in WRONG for value in values]


@pytest.mark.parametrize(('where', 'value'), EACH)
def test_what_is_no_description_is_refused(where, value, ours, tmp_path):
  message = refusal(tmp_path, ours, changed(described(), where, value))
  assert message.endswith('Convert again from the original.')
  assert len(message) < 600
  assert '\n' not in message


@pytest.mark.parametrize('key', ['task', 'model', 'classes', 'normalization'])
def test_missing_fields_are_named(key, ours, tmp_path):
  rest = {k: v for k, v in described().items() if k != key}
  assert f'is damaged: it has no {key}' in refusal(tmp_path, ours, rest)


JSON = [
  ('[' * 100_000, 'damaged'),
  ('{"a":' * (DEPTH + 1) + '0' + '}' * (DEPTH + 1), f'nested {DEPTH} times'),
  ('{"a": 1e999}', 'it has inf'),
  ('{"a": NaN}', 'it has nan'),
  ('{"a": ' + '9' * 5000 + '}', 'a huge number'),
  ('{"a": ' + '9' * 300 + '}', 'a huge number'),
  ('[]', r'is no object of JSON, but \[\]'),
  ('"x"', 'is no object'),
  ('{"a": 1', 'damaged'),
  ('{}' + ' ' * LENGTH, 'too long'),
  ('{"a": [' + '0,' * 1_000_000 + '0]}', 'over 1000000 items'),
  (b'\xff{}', 'damaged'),
]


@pytest.mark.parametrize(('text', 'said'), JSON)
def test_json_of_others_is_bounded(text, said):
  assert len(refused(said, parse_json, text, 'the header')) < 400


CYCLE = {'model': {}}
CYCLE['model']['again'] = CYCLE


@pytest.mark.parametrize('about', [CYCLE, {'a': {1: 2}}, {'a': b'bytes'}])
def test_description_in_a_pickle_has_the_types_of_json(about, mmseg, tmp_path):
  path = tmp_path / 'x.pth'
  torch.save({'state_dict': tensors(mmseg), HEADER_KEY: about}, path)
  refused(r'description in .*x\.pth is damaged', load_weights, path)


def test_good_descriptions_pass(segmentor, tmp_path):
  path = written(tmp_path / 'x', segmentor, 'ours', described())
  assert load_weights(path).image_scale == [64, 48]
