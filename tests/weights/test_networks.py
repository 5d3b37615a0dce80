"""Networks as trainings leave them: wrapped, nested, next to averages."""

import argparse
import collections
import datetime
import pathlib

import numpy as np
import pytest
import torch
from golden.reference import assert_same_bits
from weights.built import converted, refused, saved, tensors

from resnest_jax.weights.files import read_weights
from resnest_jax.weights.pretrained import load_weights
from resnest_jax.weights.state_dict import export_state_dict


def prefixed(prefix, tensors):
  return {prefix + name: value for name, value in tensors.items()}


PARTS = ['module', '_orig_mod', 'model', 'net.module', 'ema_model.module', 'm']
KEYS = ['model_state_dict', 'net', 'ema', 'ema/module', 'a']
WAYS = [*PARTS, *(f'{x}/module' for x in KEYS), 'state_dict']


@pytest.mark.parametrize('kind', ['mmseg', 'encoding'])
@pytest.mark.parametrize('way', WAYS)
def test_wrappers_are_gone_through(way, kind, request, tmp_path):
  theirs = request.getfixturevalue(kind)
  *keys, wrapper = way.split('/') if way != 'state_dict' else (way, '')
  # Of averages, no tensors of the network.
  counters = {'n_averaged': np.array(7), 'step': np.array([7.0])}

  content = prefixed(f'{wrapper}.', theirs) | counters if wrapper else theirs
  for key in reversed(keys):
    content = {key: content, 'epoch': 3}
  weights = load_weights(saved(tmp_path / 'x.pth', content))
  assert_same_bits(weights.state_dict, theirs)
  assert (weights.kind, weights.provenance['part']) == (kind, way)


@pytest.mark.parametrize('wrapper', PARTS)
def test_wrappers_in_safetensors(wrapper, segmentor, mmseg, tmp_path):
  path, prefix = tmp_path / 'x.safetensors', f'{wrapper}.'
  for kind in ('mmseg', 'ours'):
    theirs = export_state_dict(*segmentor, kind)
    saved(path, prefixed(prefix, theirs))
    assert_same_bits(read_weights(path).state_dict, theirs)
  # The backbone alone has such a prefix.
  other = {k.replace('backbone.', prefix): v for k, v in mmseg.items()}
  assert read_weights(saved(path, other)).state_dict.keys() <= mmseg.keys()


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


def pair(x, y):
  return {'state_dict': prefixed('teacher.', y) | prefixed('student.', x)}


# What is in the file, and which part is taken.
SEVERAL = [
  (lambda x, y: {'state_dict_ema': y, 'state_dict': x}, 'state_dict'),
  (lambda x, y: {'ema': {'module': y}, 'model': x}, 'model'),
  (lambda x, y: {'net_b': x, 'net_a': y}, 'net_b'),
  (pair, 'state_dict/student'),
  (lambda x, y: x | prefixed('ema_model.', y), ''),
]


@pytest.mark.parametrize(('content', 'taken'), SEVERAL)
def test_one_of_several_is_taken(content, taken, mmseg, tmp_path, capsys):
  others = {k: v + v.dtype.type(1) for k, v in mmseg.items()}
  path = saved(tmp_path / 'x.pth', content(mmseg, others))
  converted(path, tmp_path / 'first')
  said = capsys.readouterr().out
  assert f'several networks: {taken!r}, ' in said
  assert f'taken is {taken!r} (--part' in said
  assert_same_bits(load_weights(path).state_dict, mmseg)
  # The remedy of the message, with the other name in it.
  part = read_weights(path).networks[1].part
  chosen = converted(path, tmp_path / 'x', '--part', part).state_dict
  bias = chosen['params/decode_head/classifier/conv_seg/bias']
  np.testing.assert_array_equal(bias, others['decode_head.conv_seg.bias'])
  said = "no part 'momentum' of the file; it has"
  refused(said, load_weights, path, part='momentum')


# Prefixes of backbone and decoder, and which modules are to be dropped.
ENCODERS = [
  ('encoder.', '', ['decoder', 'segmentation_head']),
  ('encoder.model.', '', ['decoder', 'segmentation_head']),
  ('model.encoder.model.', 'model.', ['model']),
]


@pytest.mark.parametrize(('prefix', 'outside', 'names'), ENCODERS)
def test_encoders_are_timms(prefix, outside, names, classifier, tmp_path):
  whole = export_state_dict(*classifier, 'timm')
  timm = {k: v for k, v in whole.items() if not k.startswith('fc.')}
  modules = ('decoder.blocks.0.conv1.0', 'segmentation_head.0')
  kernel = np.zeros((3, 2, 3, 3), np.float32)
  decoder = {f'{outside}{module}.weight': kernel for module in modules}
  path = saved(tmp_path / 'smp.pth', prefixed(prefix, timm) | decoder)
  message = refused(r'left over \(', converted, path, tmp_path / 'x')
  drop = message.partition('--drop ')[2].partition(' (in')[0].split()
  assert sorted(drop) == names
  weights = converted(path, tmp_path / 'x', '--drop', *drop)
  assert weights.description.task == 'backbone'
  assert weights.description.config['dilation_rule'] == 'timm'
  assert_same_bits(export_state_dict(*weights.create(), 'timm'), timm)


NO_NETWORK = [
  ({'state_dict': {3: np.ones(2)}}, r'no state dict.*the keys state_dict'),
  ({}, 'no state dict'),
  ({'a': {'b': {'weight': np.ones(3)}}}, 'holds no state dict.*keys a'),
  ({}, r'there is an empty one\. Save model\.state_dict\(\)'),
  ({'state_dict': {'weight': np.ones(3)}}, r'no known kind.*It has weight'),
]


@pytest.mark.parametrize(('content', 'message'), NO_NETWORK)
def test_what_holds_no_network_is_refused(content, message, tmp_path):
  refused(message, load_weights, saved(tmp_path / 'x.pth', content))


def test_mapping_in_itself_is_gone_through_once(mmseg, tmp_path):
  whole = tensors(mmseg)
  content = {'state_dict': whole, 'again': [whole]}
  content['self'] = content['copy'] = content
  torch.save(content, tmp_path / 'x.pth')
  assert len(read_weights(tmp_path / 'x.pth').networks) == 1
