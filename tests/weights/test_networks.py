"""Networks as trainings leave them: wrapped, nested, next to averages."""

import argparse
import collections
import datetime
import pathlib

import numpy as np
import pytest
import torch
from golden.reference import assert_same_bits
from safetensors.numpy import save_file

from resnest_jax.errors import UserError
from resnest_jax.weights import convert
from resnest_jax.weights.files import read_weights
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.state_dict import export_state_dict


@pytest.fixture(scope='module')
def mmseg(segmentor):
  """A segmentor in mmsegmentation's names."""
  return export_state_dict(*segmentor, 'mmseg')


@pytest.fixture(scope='module')
def timm(classifier):
  """A backbone in timm's names."""
  tensors = export_state_dict(*classifier, 'timm')
  return {k: v for k, v in tensors.items() if not k.startswith('fc.')}


def prefixed(prefix, tensors):
  return {prefix + name: value for name, value in tensors.items()}


def saved(path, content):
  """A file of a state dict, or of mappings with some."""
  if path.suffix == '.safetensors':
    # It ignores strides.
    save_file({k: np.array(v, order='C') for k, v in content.items()}, path)
    return path

  def tensors(value):
    if isinstance(value, dict):
      return {k: tensors(v) for k, v in value.items()}
    return torch.tensor(value) if isinstance(value, np.ndarray) else value

  torch.save(tensors(content), path)
  return path


@pytest.mark.parametrize('name', ['x.pth', 'x.safetensors'])
@pytest.mark.parametrize(
  'prefix',
  ['module.', '_orig_mod.', 'model.', 'net.module.', 'ema_model.module.', 'm.'],
)
def test_wrappers_are_taken_away_in_every_format(prefix, name, mmseg, tmp_path):
  path = saved(tmp_path / name, prefixed(prefix, mmseg))
  weights = load_weights(path)
  assert_same_bits(weights.state_dict, mmseg)
  assert weights.provenance['part'] == prefix.rstrip('.')


@pytest.mark.parametrize(
  'keys', [('model_state_dict',), ('net',), ('ema',), ('ema', 'module'), ('a',)]
)
def test_nested_mappings_are_gone_through(keys, mmseg, tmp_path):
  content = prefixed('module.', mmseg)
  for key in reversed(keys):
    content = {key: content, 'epoch': 3}
  weights = load_weights(saved(tmp_path / 'x.pth', content))
  assert_same_bits(weights.state_dict, mmseg)
  assert weights.provenance['part'] == '/'.join((*keys, 'module'))


def test_counters_of_averages_are_no_tensors_of_the_network(mmseg, tmp_path):
  counters = {'n_averaged': np.array(7), 'step': np.array([7.0])}
  path = saved(tmp_path / 'x.pth', prefixed('module.', mmseg) | counters)
  assert_same_bits(load_weights(path).state_dict, mmseg)


def test_settings_next_to_weights_are_not_read(mmseg, tmp_path):
  beside = {
    'args': argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath('/x')),
    'when': datetime.datetime(2026, 11, 29),
    'score': np.float64(0.5),
    'counts': collections.Counter(a=1),
    'logs': collections.defaultdict(list, loss=[0.5]),
    'random': np.random.default_rng(0).bit_generator.state,
  }
  path = saved(tmp_path / 'x.pth', {'state_dict': mmseg} | beside)
  assert_same_bits(load_weights(path).state_dict, mmseg)


# What is in the file, which part is taken, and another that can be chosen.
SEVERAL = [
  (lambda x, y: {'state_dict_ema': y, 'state_dict': x}, 'state_dict', 1),
  (lambda x, y: {'ema': {'module': y}, 'model': x}, 'model', 1),
  (lambda x, y: {'net_b': x, 'net_a': y}, 'net_b', 1),
  (
    lambda x, y: {
      'state_dict': prefixed('teacher.', y) | prefixed('student.', x)
    },
    'state_dict/student',
    1,
  ),
  (lambda x, y: x | prefixed('ema_model.', y), '', 1),
]


@pytest.mark.parametrize(('content', 'taken', 'number'), SEVERAL)
def test_which_of_several_is_said_and_can_be_chosen(
  content, taken, number, mmseg, tmp_path, capsys
):
  others = {k: v + v.dtype.type(1) for k, v in mmseg.items()}
  path = saved(tmp_path / 'x.pth', content(mmseg, others))
  convert.main([str(path), '--out', str(tmp_path / 'first')])
  said = capsys.readouterr().out
  assert f'several networks: {taken!r}, ' in said
  assert f'taken is {taken!r} (--part' in said
  assert_same_bits(load_weights(path).state_dict, mmseg)
  # The remedy of the message, with the other name in it.
  parts = [network.part for network in read_weights(path).networks]
  convert.main(
    [str(path), '--out', str(tmp_path / 'x'), '--part', parts[number]]
  )
  bias = 'params/decode_head/classifier/conv_seg/bias'
  np.testing.assert_array_equal(
    load_weights(tmp_path / 'x').state_dict[bias],
    others['decode_head.conv_seg.bias'],
  )
  with pytest.raises(UserError, match="no part 'momentum' of the file; it has"):
    load_weights(path, part='momentum')


@pytest.mark.parametrize(
  'prefix', ['encoder.', 'encoder.model.', 'model.encoder.model.']
)
def test_encoders_are_timms_backbones_and_decoders_are_refused(
  prefix, timm, tmp_path, capsys
):
  decoder = {
    'decoder.blocks.0.conv1.0.weight': np.zeros((2, 2, 3, 3), np.float32),
    'segmentation_head.0.weight': np.zeros((3, 2, 3, 3), np.float32),
  }
  outside = prefix.removesuffix('encoder.model.').removesuffix('encoder.')
  content = prefixed(prefix, timm) | prefixed(outside, decoder)
  path = saved(tmp_path / 'smp.pth', content)
  names = sorted({name.split('.')[0] for name in prefixed(outside, decoder)})
  with pytest.raises(UserError, match=r'left over \(') as refusal:
    convert.main([str(path), '--out', str(tmp_path / 'x')])
  drop = str(refusal.value).partition('--drop ')[2].partition(' (in')[0].split()
  assert sorted(drop) == names
  convert.main([str(path), '--out', str(tmp_path / 'x'), '--drop', *drop])
  weights = load_weights(tmp_path / 'x')
  assert weights.description.task == 'backbone'
  assert weights.description.config['dilation_rule'] == 'timm'
  assert_same_bits(export_state_dict(*weights.create(), 'timm'), timm)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ({'state_dict': {3: np.ones(2)}}, r'no state dict.*the keys state_dict'),
    ({}, 'no state dict'),
    ({'a': {'b': {'weight': np.ones(3)}}}, 'holds no state dict.*keys a'),
    ({'state_dict': {'weight': np.ones(3)}}, r'no known kind.*It has weight'),
  ],
)
def test_what_holds_no_network_is_refused(content, message, tmp_path):
  with pytest.raises(UserError, match=message):
    load_weights(saved(tmp_path / 'x.pth', content))


def test_mapping_in_itself_is_gone_through_once(mmseg, tmp_path):
  tensors = {k: torch.tensor(v) for k, v in mmseg.items()}
  content = {'state_dict': tensors, 'again': [tensors]}
  content['self'] = content['copy'] = content
  torch.save(content, tmp_path / 'x.pth')
  assert len(read_weights(tmp_path / 'x.pth').networks) == 1
