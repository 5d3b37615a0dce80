"""Overrides configuration keys by name, as on a command line."""

import ast
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from resnest_jax.errors import UserError
from resnest_jax.text import shorten

# Key of former releases -> its default, with which runs of theirs resume, and a
# phrase on its replacement.
REMOVED = {
  'train.accumulation': (
    'plain',
    'removed; train.remat=stages gives the same result in less memory',
  ),
}
# Names of other projects' keys -> ours.
SYNONYMS = {
  'lr': 'optimizer.learning_rate',
  'wd': 'optimizer.weight_decay',
  'max_iters': 'train.total_steps',
  'iterations': 'train.total_steps',
  'epochs': 'train.total_epochs',
  'max_epochs': 'train.total_epochs',
  'patience': 'train.early_stop',
  'load_from': 'pretrained',
  'arch': 'model.backbone',
}


def override(
  config: ConfigDict, key: str, value: Any, known: Mapping[str, Any]
) -> None:
  """Sets one of the `known` dotted keys; a string is read as the key's type.

  Those that are None there accept None. Raises `UserError` for other keys, and
  for a value of another type.
  """
  if key in REMOVED:
    raise UserError(f'unknown config key {key!r}: {REMOVED[key][1]}.')
  if key not in known:
    raise UserError(f'unknown config key {key!r}; {nearest(key, known)}')
  *sections, name = key.split('.')
  for section in sections:
    config = config[section]
  kind = config.get_type(name)  # A placeholder has one though it is None.
  config[name] = _convert(key, value, kind, optional=known[key] is None)


def nearest(key: str, known: Collection[str]) -> str:
  """What may be meant by a key that is not known, in words."""
  inside = [name for name in known if name.startswith(f'{key}.')]
  if inside:
    return f'{key} is a section with the keys {", ".join(inside)}.'
  last = key.rpartition('.')[2]
  if meant := SYNONYMS.get(last.lower()):
    return f'did you mean {meant}?'
  # A misspelt key, a forgotten or wrong section, a name that is cut short.
  likeness = {
    name: max(
      _likeness(key, name),
      _likeness(last, name.rpartition('.')[2]),
      float(name.startswith(f'{key}_')),
    )
    for name in known
  }
  best = max(likeness.values())
  if best < 0.6:
    return 'configs/common.py lists and explains all keys.'
  # Equal names in several sections are equally good.
  near = [name for name in known if likeness[name] > best - 0.12]
  return f'did you mean {" or ".join(near[:3])}?'


def _likeness(a: str, b: str) -> float:
  return difflib.SequenceMatcher(None, a, b).ratio()


KINDS = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a string',
  tuple: 'numbers with commas between them, like 512,512',
}
KINDS[list] = KINDS[tuple]
_OF_WORDS = ('data.bands',)  # Names with commas between them.


def _convert(key: str, value: Any, kind: type, optional: bool) -> Any:
  # Only lossless: 1.5 is no step count, '1' no bool. Texts of string keys stay
  # texts, even '123' and 'none'.
  given = value
  if isinstance(value, str) and key in _OF_WORDS:
    value = tuple(x.strip(' ()\'"') for x in value.split(','))
    value = tuple(filter(None, value))
  elif isinstance(value, str) and kind is not str:
    value = _read_literal(value)
  if kind is object:  # Numbers or a name.
    kind = str if isinstance(value, str) else tuple
  if kind in (tuple, list) and type(value) in (int, float):
    value = (value,)
  if type(value) is kind or (value is None and optional):
    return value
  if (type(value), kind) in ((int, float), (list, tuple)):
    return kind(value)
  raise UserError(
    f'config.{key} must be {KINDS[kind]}{" or none" if optional else ""}, '
    f'not {shorten(repr(given))}.'
  )


def _read_literal(text: str) -> Any:
  # A Python literal, or true, false and none in any case; else the text itself,
  # which the check of its type refuses.
  word = text.capitalize()
  try:
    return ast.literal_eval(word if word in ('True', 'False', 'None') else text)
  except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
    return text
