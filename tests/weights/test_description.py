"""Descriptions of weights that are damaged, hostile or of another type."""

import copy
import json

import pytest
import torch
from golden.reference import TINY
from safetensors.numpy import load_file, save_file

from resnest_jax.errors import UserError
from resnest_jax.untrusted import DEPTH, LENGTH, parse_json
from resnest_jax.weights.files import HEADER_KEY, write_weights
from resnest_jax.weights.infer import Description
from resnest_jax.weights.pretrained import NORMALIZATION, Weights, load_weights
from resnest_jax.weights.state_dict import export_state_dict

CONFIG = TINY | {'dtype': 'float32'}


@pytest.fixture(scope='module')
def good(segmentor, tmp_path_factory):
  """The folder of our weights, and their description."""
  state_dict = export_state_dict(*segmentor, 'ours')
  about = Weights(
    *(state_dict, 'ours', Description('segmentor', CONFIG)),
    *(list('abcdefg'), [[i] * 3 for i in range(7)], NORMALIZATION),
    *({'source': 'x'}, [64, 48], [32, 32]),
  ).about()
  folder = tmp_path_factory.mktemp('good') / 'ours'
  write_weights(folder, 'ours', state_dict, about)
  # As JSON has it: no tuples.
  return folder, json.loads(json.dumps(about))


def changed(about, where, value):
  about = copy.deepcopy(about)
  *outer, last = where.split('.')
  section = about
  for key in outer:
    section = section[key]
  section[last] = value
  return about


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


@pytest.mark.parametrize(
  ('where', 'value'),
  [
    pytest.param(where, value, id=f'{where}-{number}-{repr(value)[:20]}')
    for number, (where, values) in enumerate(WRONG)
    for value in values
  ],
)
def test_what_is_no_description_is_refused(where, value, good, tmp_path):
  folder, about = good
  path = tmp_path / 'x.safetensors'
  header = {HEADER_KEY: json.dumps(changed(about, where, value))}
  save_file(load_file(folder / 'model.safetensors'), path, header)
  with pytest.raises(UserError, match=r'the description in .* is damaged') as x:
    load_weights(path)
  message = str(x.value)
  assert message.endswith('Convert again from the original.')
  assert len(message) < 600
  assert '\n' not in message


@pytest.mark.parametrize('key', ['task', 'model', 'classes', 'normalization'])
def test_missing_fields_are_named(key, good, tmp_path):
  folder, about = good
  path = tmp_path / 'x.safetensors'
  rest = json.dumps({k: v for k, v in about.items() if k != key})
  save_file(load_file(folder / 'model.safetensors'), path, {HEADER_KEY: rest})
  with pytest.raises(UserError, match=f'is damaged: it has no {key}'):
    load_weights(path)


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('[' * 100_000, 'damaged'),
    ('{"a":' * (DEPTH + 1) + '0' + '}' * (DEPTH + 1), f'nested {DEPTH} times'),
    ('{"a": 1e999}', 'it has inf'),
    ('{"a": NaN}', 'it has nan'),
    ('{"a": ' + '9' * 5000 + '}', 'damaged'),
    ('{"a": ' + '9' * 300 + '}', 'a huge number'),
    ('[]', r'is no object of JSON, but \[\]'),
    ('"x"', 'is no object'),
    ('{"a": 1', 'damaged'),
    ('{}' + ' ' * LENGTH, 'too long'),
    ('{"a": [' + '0,' * 1_000_000 + '0]}', 'over 1000000 items'),
    (b'\xff{}', 'damaged'),
  ],
)
def test_json_of_others_is_bounded(text, said):
  with pytest.raises(UserError, match=said) as error:
    parse_json(text, 'the header')
  assert len(str(error.value)) < 400


def cycle():
  about = {'model': {}}
  about['model']['again'] = about
  return about


@pytest.mark.parametrize('about', [cycle(), {'a': {1: 2}}, {'a': b'bytes'}])
def test_description_in_a_pickle_has_the_types_of_json(
  about, segmentor, tmp_path
):
  state_dict = export_state_dict(*segmentor, 'mmseg')
  tensors = {k: torch.tensor(v) for k, v in state_dict.items()}
  torch.save({'state_dict': tensors, HEADER_KEY: about}, tmp_path / 'x.pth')
  with pytest.raises(UserError, match=r'description in .*x\.pth is damaged'):
    load_weights(tmp_path / 'x.pth')


def test_good_descriptions_pass(good):
  assert load_weights(good[0]).about()['image_scale'] == [64, 48]
