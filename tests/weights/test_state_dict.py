"""State dicts in and out, bit for bit, and what is refused."""

import re
import zlib

import jax
import numpy as np
import pytest
from golden import reference
from golden.reference import assert_same_bits, variables_of
from numpy.testing import assert_array_equal as assert_equal
from weights.built import NETWORK, encoding_network, refused

from resnest_jax import create_segmentor, export_state_dict, import_state_dict
from resnest_jax.models.segmentor import HEADS
from resnest_jax.weights.infer import describe
from resnest_jax.weights.state_dict import reinitialised


def noise(name, shape):
  """Random bits, NaNs among them, or a counter."""
  if name.endswith('num_batches_tracked'):
    return np.zeros((), np.int64)
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  return rng.integers(0, 2**32, shape, np.uint32).view(np.float32)


@pytest.mark.parametrize('name', reference.manifest_names())
def test_every_reference_goes_in_and_comes_out_bit_for_bit(name):
  shapes, kind = reference.manifest(name), name.split('/')[0]
  state_dict = {key: noise(key, shape) for key, shape in shapes.items()}
  model = describe(state_dict, kind, reference.backbone_of(name)).create()
  variables = import_state_dict(model, state_dict)
  assert {str(x.dtype) for x in jax.tree.leaves(variables)} == {'float32'}
  assert_same_bits(export_state_dict(model, variables, kind), state_dict)


# Whose names the heads have.
KIND_OF = {x: 'encoding' if x[:9] == 'encoding_' else 'mmseg' for x in HEADS}


def varied(**changes):
  return create_segmentor(NETWORK | changes)


def test_names_that_do_not_fit_are_told(segmentor, mmseg):
  model, variables = segmentor
  other = mmseg | {'backbone.layer5.0.conv1.weight': np.zeros(1)}
  del other['decode_head.conv_seg.bias']
  said = '1 missing .decode_head.conv_seg.bias.; 1 left over .backbone.layer5'
  refused(said, import_state_dict, model, other)
  said = r'\(1, 1, 1, 1\) blocks a stage, the model \(1, 2, 1, 1\); 23 missing'
  refused(said, import_state_dict, varied(stage_sizes=(1, 2, 1, 1)), mmseg)
  kept = {k: v for k, v in mmseg.items() if not k.startswith('auxiliary_')}
  said = r'auxiliary_head is missing; \d+ missing .* no auxiliary_head: cr'
  refused(said, import_state_dict, model, kept)
  said = r'convert .* --drop decode_head auxiliary_head \(in Python'
  refused(said, import_state_dict, model.backbone, mmseg)
  # Without the backbone nothing would be left.
  other = {k.removeprefix('backbone.'): v for k, v in mmseg.items()}
  refused(r'\(layer1.* is whole\.$', import_state_dict, model, other)
  said = "named 'fc' to drop; it has auxiliary_h"
  refused(said, import_state_dict, model, mmseg, drop=['fc'])
  refused('are whole', import_state_dict, model, jax.tree.map(np.int64, mmseg))
  # Fresh variables excuse the number of classes alone.
  name = 'backbone.layer1.0.conv1.weight'
  other = mmseg | {name: np.zeros((3, 16, 1, 1))}
  refused(name, import_state_dict, model, other, fresh=variables)


def test_other_kinds_and_variables_are_refused(segmentor):
  (model, variables), other = segmentor, {'x.weight': np.zeros(1)}
  refused(r'no known kind.*x\.weight', import_state_dict, model, other)
  said = "kind 'keras' is not one of mmseg"
  refused(said, export_state_dict, model, {}, 'keras')
  less = variables_of(model.clone(auxiliary_head=None))
  said = "not this model's.*auxiliary_head"
  refused(said, export_state_dict, model, less, 'mmseg')
  # The authors' and timm's names have no heads.
  theirs = {key: tree['backbone'] for key, tree in variables.items()}
  timm = export_state_dict(model.backbone, theirs, 'timm')
  said = r'decode_head and auxiliary_head of pspnet\. .*for model\.backbone'
  for call in (import_state_dict, reinitialised):
    refused(said, call, model, timm)


# All but the PSPNet of PyTorch-Encoding, which has the names of the other one.
OWN = [(head, 'ours') for head in HEADS if head != 'encoding_pspnet']


@pytest.mark.parametrize(('head', 'kind'), [*OWN, *KIND_OF.items()])
def test_another_head_is_said_first(head, kind):
  prefix = 'encoding_' if kind == 'encoding' else ''
  other = prefix + ('fcn' if head.endswith('pspnet') else 'pspnet')
  source = varied(head=head)
  state_dict = export_state_dict(source, variables_of(source), kind)
  said = rf'the head of the weights is {head}, the model has {other}; \d+ missi'
  refused(said, import_state_dict, varied(head=other), state_dict)


@pytest.mark.parametrize(('head', 'kind'), KIND_OF.items())
def test_networks_called_alike_are_told_apart(head, kind):
  """mmsegmentation's and PyTorch-Encoding's of one name are two networks."""
  twins = {f'encoding_{x}': x for x in ('fcn', 'pspnet', 'deeplabv3')}
  twins |= {x: y for y, x in twins.items()} | {'deeplabv3plus': 'encoding_fcn'}
  source, target = varied(head=head), varied(head=twins[head])
  variables = variables_of(source)
  state_dict = export_state_dict(source, variables, kind)
  said = f"of {twins[head]}. The weights have {head}; set the model's head to"
  for call in (import_state_dict, reinitialised):
    refused(f'no place for .* {said}', call, target, state_dict)
  other = 'mmseg' if kind == 'encoding' else 'encoding'
  said = rf'of {head}\. Leave them out .*, or write .* names \(--to {kind}\)'
  refused(said, export_state_dict, source, variables, other)


def test_names_of_encoding_without_counters_and_in_part(encoding):
  """As old files of PyTorch have them; and a backbone by itself."""
  (model, variables), whole = encoding_network(), encoding
  bare = {k: v for k, v in whole.items() if not k.endswith('_tracked')}
  assert len(bare) < len(whole)
  jax.tree.map(assert_equal, import_state_dict(model, bare), variables)
  backbone = {key: tree['backbone'] for key, tree in variables.items()}
  drop = ['head', 'auxlayer']
  found = import_state_dict(model.backbone, whole, drop=drop)
  jax.tree.map(assert_equal, found, backbone)
  # PyTorch-Encoding's backbones have the names of the authors'.
  alone = export_state_dict(model.backbone, backbone, 'encoding')
  official = export_state_dict(model.backbone, backbone, 'official')
  assert_same_bits(alone, official)
  less = {k: v for k, v in whole.items() if not k.startswith('auxlayer.')}
  said = r'auxlayer is missing; .* no auxlayer: create it with aux_channels'
  refused(said, import_state_dict, model, less)


OF_OURS = 'params/decode_head/classifier/conv_seg/kernel'
# With the axes of the file.
LAYERS = [
  ('mmseg', 'decode_head.conv_seg.weight', (7, 16, 1, 1), (4, 16, 1, 1)),
  ('encoding', 'head.conv5.5.weight', (7, 16, 1, 1), (4, 16, 1, 1)),
  ('ours', OF_OURS, (1, 1, 16, 7), (1, 1, 16, 4)),
]


@pytest.mark.parametrize(('kind', 'name', 'theirs', 'ours'), LAYERS)
def test_other_classes_are_told(kind, name, theirs, ours):
  network = {'head': 'encoding_pspnet' if kind == 'encoding' else 'pspnet'}
  model, target = varied(**network), varied(**network, num_classes=4)
  source = export_state_dict(model, variables_of(model), kind)
  assert reinitialised(model, source) == []
  heads = ('auxiliary_head', 'decode_head')
  layers = [f'{head}/classifier/conv_seg' for head in heads]
  assert reinitialised(target, source) == layers
  message = re.escape(f'{name} is {theirs}, the model has {ours}')
  said = rf'{message}.*\. Check num_classes'
  refused(said, import_state_dict, target, source)
