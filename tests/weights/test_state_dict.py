"""State dicts in and out, bit for bit, and what is refused."""

import re
import zlib

import jax
import numpy as np
import pytest
from golden.reference import (
  TINY,
  assert_same_bits,
  backbone_of,
  manifest,
  manifest_names,
  variables_of,
)

from resnest_jax.errors import UserError
from resnest_jax.models.segmentor import HEADS, create_segmentor
from resnest_jax.weights.infer import describe
from resnest_jax.weights.state_dict import (
  COUNTER,
  export_state_dict,
  import_state_dict,
  reinitialised,
)


def noise(name, shape):
  """Random bits, NaNs among them, or a counter."""
  if name.endswith(COUNTER):
    return np.zeros((), np.int64)
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  return rng.integers(0, 2**32, shape, np.uint32).view(np.float32)


@pytest.mark.parametrize('name', manifest_names())
def test_every_reference_goes_in_and_comes_out_bit_for_bit(name):
  state_dict = {key: noise(key, s) for key, s in manifest(name).items()}
  kind = name.split('/')[0]
  backbone = None if kind == 'mmseg' else backbone_of(name)
  model = describe(state_dict, kind, backbone).create()
  variables = import_state_dict(model, state_dict)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    np.dtype(np.float32)
  }
  assert_same_bits(export_state_dict(model, variables, kind), state_dict)


def varied(**changes):
  return create_segmentor(TINY | {'dtype': 'float32'} | changes)


@pytest.fixture
def tiny(segmentor):
  """A segmentor, and a state dict (float32) that fits it."""
  return segmentor[0], export_state_dict(*segmentor, 'mmseg')


def imported(model, tensors, gone='-', **more):
  """With some names left out and others added."""
  kept = {k: v for k, v in tensors.items() if not k.startswith(gone)}
  return import_state_dict(model, kept | more)


# A function of a segmentor and a state dict that fits it, and how it fails.
REFUSED = [
  (
    lambda model, tensors: imported(
      model,
      tensors,
      'decode_head.conv_seg.bias',
      **{'backbone.layer5.0.conv1.weight': np.zeros(1)},
    ),
    r'1 missing \(decode_head.conv_seg.bias\); 1 left over \(backbone.layer5',
  ),
  (
    lambda _, tensors: imported(varied(stage_sizes=(1, 2, 1, 1)), tensors),
    r'\(1, 1, 1, 1\) blocks a stage, the model \(1, 2, 1, 1\); 23 missing',
  ),
  (
    lambda model, tensors: imported(model, tensors, 'auxiliary_'),
    r'auxiliary_head is missing; \d+ missing .* no auxiliary_head: cr',
  ),
  (
    lambda model, tensors: imported(model.backbone, tensors),
    r'by name: --drop decode_head auxiliary_head \(in Python',
  ),
  (
    lambda *tiny: import_state_dict(*tiny, drop=('fc',)),
    "named 'fc' to drop; it has auxiliary_h",
  ),
  (
    lambda model, _: imported(model, {'encoder.weight': np.zeros(1)}),
    r'no known kind.*encoder\.weight',
  ),
  # The authors' and timm's names have no heads.
  *(
    (
      lambda model, _, call=call: call(
        model,
        export_state_dict(model.backbone, variables_of(model.backbone), 'timm'),
      ),
      r'no place for decode_head and auxiliary_head\. .*for model\.backbone',
    )
    for call in (import_state_dict, reinitialised)
  ),
  # Fresh variables excuse the number of classes alone.
  (
    lambda model, tensors: import_state_dict(
      model,
      tensors | {'backbone.layer1.0.conv1.weight': np.zeros((3, 16, 1, 1))},
      fresh=variables_of(model),
    ),
    'backbone.layer1.0.conv1.weight',
  ),
  (
    lambda model, _: export_state_dict(model, {}, 'keras'),
    "kind 'keras' is not one of mmseg",
  ),
  (
    lambda model, _: export_state_dict(
      model, variables_of(model.clone(auxiliary_head=None)), 'mmseg'
    ),
    r"not this model's.*auxiliary_head",
  ),
]


@pytest.mark.parametrize(('call', 'message'), REFUSED)
def test_what_does_not_fit_is_refused(tiny, call, message):
  with pytest.raises(UserError, match=message):
    call(*tiny)


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('kind', ['mmseg', 'ours'])
def test_another_head_is_said_first(head, kind):
  other = 'fcn' if head == 'pspnet' else 'pspnet'
  source = varied(head=head)
  state_dict = export_state_dict(source, variables_of(source), kind)
  said = rf'the head of the weights is {head}, the model has {other}; \d+ missi'
  with pytest.raises(UserError, match=said):
    import_state_dict(varied(head=other), state_dict)


@pytest.mark.parametrize(
  ('kind', 'name', 'theirs', 'ours'),
  [
    ('mmseg', 'decode_head.conv_seg.weight', (7, 16, 1, 1), (4, 16, 1, 1)),
    (
      'ours',
      'params/decode_head/classifier/conv_seg/kernel',
      *((1, 1, 16, 7), (1, 1, 16, 4)),
    ),
  ],
)
def test_other_classes_are_told(segmentor, kind, name, theirs, ours):
  model = segmentor[0]
  source = export_state_dict(*segmentor, kind)
  target = varied(num_classes=4)
  assert reinitialised(model, source) == []
  assert reinitialised(target, source) == [
    'auxiliary_head/classifier/conv_seg',
    'decode_head/classifier/conv_seg',
  ]
  # With the axes of the file.
  message = re.escape(f'{name} is {theirs}, the model has {ours}')
  with pytest.raises(UserError, match=rf'{message}.*\. Check num_classes'):
    import_state_dict(target, source)
