"""Keys of a configuration set by name, as a command line does."""

import ast
import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from resnest_jax.errors import UserError


class Removed(NamedTuple):
  """A key of former releases.

  Attributes:
    default: its value where nobody asked for another one.
    instead: the end of a sentence that says what replaces it.
  """

  default: Any
  instead: str


REMOVED = {
  'train.accumulation': Removed(
    'plain',
    'removed; train.remat=stages gives the same result in less memory',
  ),
}


def override(
  config: ConfigDict, key: str, value: Any, known: Mapping[str, Any]
) -> None:
  """Sets a dotted key; a string is read as the type that the key has.

  Args:
    config: is changed.
    key: 'train.total_steps'.
    value: of the key's type, or the text of one.
    known: dotted key -> value, of all keys.

  Raises:
    UserError: a key that does not exist, or a value of another type.
  """
  if key in REMOVED:
    raise UserError(f'unknown config key {key!r}: {REMOVED[key].instead}.')
  if key not in known:
    raise UserError(f'unknown config key {key!r}; {_nearest(key, known)}')
  *sections, name = key.split('.')
  for section in sections:
    config = config[section]
  kind = config.get_type(name)
  config[name] = _convert(key, value, kind, optional=known[key] is None)


def _nearest(key: str, known: Mapping[str, Any]) -> str:
  """What may have been meant: a section's keys, or the most similar ones."""
  inside = [name for name in known if name.startswith(f'{key}.')]
  if inside:
    return f'{key} is a section with the keys {", ".join(inside)}.'
  # Someone forgets the section or misspells the name: the whole key and its
  # last part are both compared. Or the name is cut short.
  likeness = {
    name: max(
      _likeness(key, name),
      _likeness(_last(key), _last(name)),
      float(name.startswith(f'{key}_')),
    )
    for name in known
  }
  best = max(likeness.values())
  if best < 0.6:
    return 'configs/common.py lists and explains all keys.'
  near = [name for name in known if likeness[name] > best - 0.12]
  return f'did you mean {" or ".join(near[:3])}?'


def _last(key: str) -> str:
  return key.rpartition('.')[2]


def _likeness(a: str, b: str) -> float:
  return difflib.SequenceMatcher(None, a, b).ratio()


_KINDS = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a string',
  tuple: 'numbers with commas between them, like 512,512',
}


def _convert(key: str, value: Any, kind: type, optional: bool) -> Any:
  """The value as `kind`; only what loses nothing is converted."""
  given = value
  if isinstance(value, str) and kind is not str:
    value = _read_literal(value)
  if value is None and optional:
    return None
  if kind is float and type(value) is int:
    return float(value)
  if kind is tuple and type(value) is list:
    return tuple(value)
  if type(value) is kind:
    return value
  raise UserError(
    f'config.{key} must be {_KINDS[kind]}{" or none" if optional else ""}, '
    f'not {given!r}.'
  )


def _read_literal(text: str) -> Any:
  """What the text means in Python; also true, false and none; else itself."""
  words = {'true': True, 'false': False, 'none': None}
  if text.lower() in words:
    return words[text.lower()]
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text
