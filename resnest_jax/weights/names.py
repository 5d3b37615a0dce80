"""Reads heads and depths off the names of any state dict."""

import re
from collections.abc import Iterable

from resnest_jax.errors import UserError
from resnest_jax.text import listed

# Kinds of `export_state_dict`, in words.
WHOSE = {
  'mmseg': "mmsegmentation's",
  'official': "the authors'",
  'timm': "timm's",
  'ours': 'our own',
}
# Kinds of `recognise`, which cannot tell timm's names from the authors'.
WHOSE_READ = WHOSE | {'official': "the authors' / timm's"}
# PyTorch's normalisations count batches, but none of these networks reads it.
COUNTER = 'num_batches_tracked'
HEAD_MODULES = ('decode_head', 'auxiliary_head')
# Names that only one head has, in mmsegmentation's and in our own names. The
# first match wins: DeepLabV3+ has all names of DeepLabV3.
HEAD_MARKS = (
  ('pspnet', r'psp_modules\.|pyramid_\d/'),
  ('deeplabv3plus', r'aspp_modules\.1\.depthwise_conv\.|low_level/'),
  ('deeplabv3', r'aspp_modules\.|pyramid/'),
  ('fcn', r'conv_cat[./]'),
)


def top_module(name: str) -> str:
  """The outermost module in a name of any kind."""
  name = re.sub(r'^(params|batch_stats)/', '', name)
  return re.split(r'[./]', name)[0]


def head_modules(names: Iterable[str]) -> list[str]:
  """Modules with the name of a head, the main one first."""
  modules = {top_module(name) for name in names}
  return sorted((x for x in modules if x.endswith('_head')), reverse=True)


def head_of(names: Iterable[str]) -> str | None:
  """The decode head's `config.model.head`, or None if it is unknown."""
  text = '\n'.join(names)
  for head, mark in HEAD_MARKS:
    if re.search(rf'(?:^|/)decode_head[./](?:{mark})', text, re.MULTILINE):
      return head
  return None


def blocks_of(names: Iterable[str]) -> tuple[int, ...]:
  # Ours are layer1_0/, others' layer1.0.
  pattern = re.compile(r'(?:^|[./])layer(\d)[._](\d+)[./]')
  blocks: dict[int, int] = {}
  for name in names:
    if match := pattern.search(name):
      stage, index = int(match[1]), int(match[2])
      blocks[stage] = max(blocks.get(stage, 0), index + 1)
  return tuple(blocks[stage] for stage in sorted(blocks))


def check_names(kind: str, wanted: set[str], names: Iterable[str]) -> None:
  """Raises `UserError` unless `names` are those that a model wants."""
  # State dicts may have the counters or not; the model has none.
  given = {name for name in names if not name.endswith(COUNTER)}
  missing, left_over = wanted - given, given - wanted
  if not missing and not left_over:
    return
  # The causes come first: another head or depth changes hundreds of names, of
  # which the message can list only a few.
  problems = []
  theirs, ours = head_of(given), head_of(wanted)
  if theirs and ours and theirs != ours:
    problems.append(
      f'the head of the weights is {theirs}, the model has {ours}'
    )
  theirs, ours = blocks_of(given), blocks_of(wanted)
  if theirs != ours:
    problems.append(f'they have {theirs} blocks a stage, the model {ours}')
  modules = {top_module(name) for name in given}
  absent = sorted({top_module(name) for name in wanted} - modules)
  for head in (name for name in absent if name in HEAD_MODULES):
    problems.append(f'{head} is missing')
  if missing:
    problems.append(f'{len(missing)} missing ({listed(sorted(missing))})')
  if left_over:
    problems.append(f'{len(left_over)} left over ({listed(sorted(left_over))})')
  advice = 'Check the backbone, the head and whether the checkpoint is whole.'
  if 'auxiliary_head' in absent:
    advice += ' For prediction a model needs no auxiliary_head: create it with'
    advice += ' aux_channels None.'
  if extra := sorted(
    modules - {top_module(name) for name in wanted}, reverse=True
  ):
    words = ' '.join(extra[:8])
    advice += f' What is not wanted is dropped by name: --drop {words}'
    advice += ' (in Python the argument drop).'
  raise UserError(
    f'the weights ({WHOSE_READ[kind]} names) do not fit the model: '
    f'{"; ".join(problems)}. {advice}'
  )
