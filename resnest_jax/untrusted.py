"""JSON and zip files of other origin: bounded, and checked before use."""

import collections
import json
import math
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from resnest_jax.config_keys import Accepted
from resnest_jax.errors import UserError

DEPTH, ITEMS = 64, 1_000_000
OBJECT = Accepted('an object of JSON', lambda x: isinstance(x, dict))
LENGTH = 20_000_000  # Characters.
# What zipfile raises for damage; RuntimeError for methods it does not know.
DAMAGED = (
  *(zipfile.BadZipFile, zlib.error, struct.error),
  *(EOFError, OSError, RuntimeError, ValueError),
)
# Pictures and weights shrink little. Bytes of an entry of a zip file that are
# always read, and how many times its bytes in the archive.
_SMALL, _MOST_TIMES = 2**24, 20


def load_json(text: str | bytes) -> Any:
  """As `json.loads`: each key once, and 99 digits of a whole number at most."""
  hooks = {'parse_int': lambda x: int(x[:99]), 'object_pairs_hook': _unique}
  return json.loads(text, **hooks)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    (key, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
    raise ValueError(f'the key {brief(key)} stands there twice')
  return found


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
  """Reads an object of JSON; `UserError`s about it begin with `where`."""
  if len(text) > LENGTH:
    raise UserError(f'{where} is too long ({len(text)} characters).')
  content = json_object(text, where)
  check_json(content, where)
  return content


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
  """As `parse_json`, of a text of any length that may hold anything."""
  try:
    content = load_json(text)
  # Brackets within brackets exhaust the stack.
  except (ValueError, RecursionError) as error:
    raise UserError(f'{where} is damaged ({error}).') from error
  if not isinstance(content, dict):
    raise UserError(f'{where} is no object of JSON, but {brief(content)}.')
  return content


def check_json(content: Any, where: str) -> None:
  """Raises `UserError` unless JSON can hold it, within `DEPTH` and `ITEMS`."""
  level, number = [content], 0
  for _ in range(DEPTH):
    number += len(level)
    inner = []
    for item in level:
      if isinstance(item, dict) and all(type(key) is str for key in item):
        inner += item.values()
      elif isinstance(item, list | tuple):
        inner += item
      elif not (
        item is None
        or isinstance(item, str | bool)
        or (isinstance(item, int) and abs(item) < 2**63)
        or (isinstance(item, float) and math.isfinite(item))
      ):
        raise UserError(f'{where} is damaged: it has {brief(item)}.')
      if number + len(inner) > ITEMS:
        raise UserError(f'{where} is damaged: it has over {ITEMS} items.')
    level = inner
  if level:
    raise UserError(f'{where} is damaged: it is nested {DEPTH} times.')


def up_to(most: int, least: int = 1) -> Accepted:
  return Accepted(
    f'a whole number from {least} to {most}',
    lambda x: type(x) is int and least <= x <= most,
  )


def or_none(accepted: Accepted) -> Accepted:
  return Accepted(
    f'{accepted.words}, or nothing', lambda x: x is None or accepted.holds(x)
  )


def list_of(
  words: str, holds: Callable[[Any], bool], least: int = 0, most: int = 2**16
) -> Accepted:
  # By type: a text and a mapping can be gone through as well.
  return Accepted(
    words,
    lambda x: (
      type(x) in (list, tuple)
      and least <= len(x) <= most
      and all(map(holds, x))
    ),
  )


def numbers(
  words: str, number: int, *kinds: type, low: float, high: float
) -> Accepted:
  return list_of(
    words, lambda x: type(x) in kinds and low <= x <= high, number, number
  )


def check_fields(
  content: Mapping[str, Any], fields: Mapping[str, Accepted], where: str
) -> None:
  """Raises `UserError` if a field is missing, or is not what is accepted."""
  for name, accepted in fields.items():
    if name not in content:
      raise UserError(f'{where} is damaged: it has no {name}.')
    try:
      holds = accepted.holds(content[name])
    except (TypeError, ValueError, OverflowError):  # Of another type.
      holds = False
    if not holds:
      raise UserError(
        f'{where} is damaged: {name} is {brief(content[name])}; it must be '
        f'{accepted.words}.'
      )


def brief(value: Any) -> str:
  """A value in a message."""
  # Python refuses to print thousands of digits.
  huge = isinstance(value, int) and abs(value) >= 2**63
  return 'a huge number' if huge else reprlib.repr(value)


def check_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
  """Raises `UserError` unless an entry can be read in little memory."""
  where = f'{archive.filename}: {entry.filename}'
  if entry.flag_bits & 1:
    raise UserError(
      f'{where} is protected by a password. Unpack the archive and zip its '
      'files again, without a password.'
    )
  # Of other methods zipfile unpacks all there is, whatever size the entry has.
  if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise UserError(
      f'{where} is compressed in another way than zip files commonly are. '
      'Unpack the archive and zip its files again, with the usual method.'
    )
  if entry.file_size > max(_SMALL, _MOST_TIMES * entry.compress_size):
    raise UserError(
      f'{where} would unpack from {entry.compress_size} to {entry.file_size} '
      'bytes, as no picture and no weights do. The archive is damaged or not '
      'what its name says; get it from its publisher.'
    )
