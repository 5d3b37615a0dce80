"""Reads heads and depths off the names of any state dict."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from resnest_jax.errors import UserError
from resnest_jax.text import listed

WHOSE = {
  'mmseg': "mmsegmentation's",
  'mmdet': "mmdetection's",
  'encoding': "PyTorch-Encoding's",
  'official': "the authors'",
  'timm': "timm's",
  'detectron2': "detectron2's",
  'ours': 'our own',
}
# Kinds of `recognise`, which cannot tell names that are equal.
WHOSE_READ = WHOSE | {'official': "the authors' / timm's"}
# In messages, before the names. No other command drops anything.
DROP = 'python -m resnest_jax.weights.convert SOURCE --out DIR --drop'
# PyTorch's normalisations count batches, but none of these networks reads it.
COUNTER = 'num_batches_tracked'
# What only one head's names begin with, others' and ours, which are equal for
# the two PSPNets. The first match wins: DeepLabV3+ has all names of DeepLabV3.
HEAD_MARKS = (
  ('encoding_pspnet', r'head\.conv5\.0\.conv1\.'),
  ('encoding_deeplabv3', r'head\.aspp\.|decode_head/refine/'),
  ('encoding_fcn', r'head\.conv5\.'),
  ('pspnet', r'decode_head(\.psp_modules\.|/pyramid_\d/)'),
  (
    'deeplabv3plus',
    r'decode_head(\.aspp_modules\.1\.depthwise_conv\.|/low_level/)',
  ),
  ('deeplabv3', r'decode_head(\.aspp_modules\.|/pyramid/)'),
  ('fcn', r'decode_head[./]conv_cat[./]'),
  ('encoding_fcn', r'decode_head/'),
)
# What others, and ours, put before a backbone's names.
_WRAPPER = re.compile(
  r'((?:params/|batch_stats/)?)(?:backbone[./](?:bottom_up\.)?|pretrained\.)'
)
_OF_BACKBONE = re.compile(
  r'((params|batch_stats)/)?(stem|conv1|bn1|layer\d|res\d)[._]'
)
# Of a classifier's last layer.
CLASS_MODULES = ('fc', 'head', 'linear')
# The classifier's layer has the first module's name, too.
_HEADS = re.compile(
  r'(?:(?:params|batch_stats)/)?(\w+_head|head(?!\.fc)|auxlayer)[./]'
)


def top_module(name: str) -> str:
  """The outermost module in a name of any kind."""
  name = re.sub(r'^(params|batch_stats)/', '', name)
  return re.split(r'[./]', name)[0]


def unwrapped(name: str) -> str:
  """The name of a backbone's tensor in a state dict of the backbone alone."""
  found = _WRAPPER.match(name)
  return found[1] + name[found.end() :] if found else name


def backbone_part(
  state_dict: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
  """The tensors of the backbone, and the modules that the others are of."""
  inner = {name: unwrapped(name) for name in state_dict}
  kept = {k: v for k, v in state_dict.items() if _OF_BACKBONE.match(inner[k])}
  rest = {top_module(inner[name]) for name in state_dict.keys() - kept.keys()}
  return kept, sorted(rest)


def head_modules(names: Iterable[str]) -> list[str]:
  """Modules with the name of a head, the main one first."""
  return sorted({x[1] for x in map(_HEADS.match, names) if x}, reverse=True)


def head_of(names: Iterable[str]) -> str | None:
  """The decode head's `config.model.head`, or None if it is unknown."""
  text = '\n'.join(names)
  for head, mark in HEAD_MARKS:
    if re.search(rf'(?:^|/)(?:{mark})', text, re.MULTILINE):
      return head
  return None


def blocks_of(names: Iterable[str]) -> dict[int, int]:
  """The number of blocks of each stage, in order."""
  # Ours are layer1_0/, others' layer1.0. and detectron2's res2.0.
  pattern = re.compile(r'(?:^|[./])(layer|res)(\d)[._](\d+)[./]')
  found = {match.groups() for match in map(pattern.search, names) if match}
  pairs = sorted((int(y) - (x == 'res'), int(index)) for x, y, index in found)
  return {stage: index + 1 for stage, index in pairs}


def check_names(kind: str, wanted: set[str], names: Iterable[str]) -> None:
  """Raises `UserError` unless `names` are those that a model wants."""
  given = {name for name in names if not name.endswith(COUNTER)}
  missing, left_over = wanted - given, given - wanted
  if not missing and not left_over:
    return
  # Causes first: another head or depth changes more names than can be listed.
  problems, (theirs, ours) = [], map(head_of, (given, wanted))
  if theirs and ours and theirs != ours:
    problems = [f'the head of the weights is {theirs}, the model has {ours}']
  theirs, ours = (tuple(blocks_of(x).values()) for x in (given, wanted))
  if theirs != ours:
    problems.append(f'they have {theirs} blocks a stage, the model {ours}')
  theirs, ours = ({*map(top_module, x)} for x in (given, wanted))
  absent, extra = sorted(ours - theirs), sorted(theirs - ours, reverse=True)
  heads = head_modules(f'{name}.' for name in absent)
  problems += [f'{name} is missing' for name in heads[::-1]]
  for what, found in (('missing', missing), ('left over', left_over)):
    if found:
      problems.append(f'{len(found)} {what} ({listed(sorted(found))})')
  advice = 'Check the backbone, the head and whether the checkpoint is whole.'
  for name in {'auxiliary_head', 'auxlayer'} & {*absent}:
    advice += (
      f' For prediction a model needs no {name}: create it with aux_channels '
      'None.'
    )
  # Not if a part of the backbone has another name: nothing would be left.
  if extra and not any(
    re.match('backbone|pretrained|stem|conv1|layer|res', x) for x in absent
  ):
    advice += (
      f' To leave out what is not wanted, add it to --drop: {DROP} '
      f'{" ".join(extra[:8])} (in Python the argument drop).'
    )
  raise UserError(
    f'the weights ({WHOSE_READ[kind]} names) do not fit the model: '
    f'{"; ".join(problems)}. {advice}'
  )
