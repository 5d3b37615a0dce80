"""Numbers and lists in words."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sized
from typing import Any

# Scheme, user and password, host and path, query. A fragment mostly is a place
# in a page; with values it is what a query is.
_ADDRESS = re.compile(
  r'\b([a-z][a-z0-9+.-]*://)([^\s/?#"\']*@)?([^\s?#"\']*)'
  r'(\?[^\s"\')]*|#[^\s"\')]*=[^\s"\')]*)?',
  re.I,
)


def without_secrets(text: str) -> str:
  """Cuts out of addresses where passwords, tokens and signatures stand."""
  return _ADDRESS.sub(lambda x: x[1] + x[3] + ('?...' if x[4] else ''), text)


def for_terminals(text: str) -> str:
  """The text without control characters and words of 1,000 characters."""
  text = re.sub(
    r'[\x00-\x08\x0b-\x1f\x7f-\x9f]', lambda x: f'\\x{ord(x[0]):02x}', text
  )
  return re.sub(r'\S{1000,}', lambda x: shorten(x[0]), text)


def shorten(text: str, length: int = 300) -> str:
  """The text, without its middle if it is longer."""
  if len(text) <= length:
    return text
  half = (length - 5) // 2
  return f'{text[:half]} ... {text[-half:]}'


def plural(number: int, noun: str, verb: str = '') -> str:
  """Returns '1 mask', '2 masks', '3 classes'; with a verb '1 mask has'."""
  ending = 'es' if noun.endswith('s') else 's'
  words = f'{number} {noun}{"" if number == 1 else ending}'
  return f'{words} {_conjugated(number, verb)}'.rstrip()


def share(part: int, whole: int, noun: str, verb: str = '') -> str:
  """Returns '1 of 3 masks has', '2 of 3 masks have', '1 of 1 mask has'."""
  words = f'{part} of {plural(whole, noun)}'
  return f'{words} {_conjugated(part, verb)}'.rstrip()


def share_of(part: Sized, whole: Sized, noun: str, verb: str = '') -> str:
  return share(len(part), len(whole), noun, verb)


def _conjugated(number: int, verb: str) -> str:
  singular = {'have': 'has', 'are': 'is', 'do': 'does'}
  return singular.get(verb, verb) if number == 1 else verb


def listed(words: Iterable[object], most: int = 6, comma: str = ', ') -> str:
  """Returns 'a, b, c and 7 more'."""
  words = [str(word) for word in words]
  rest = f' and {len(words) - most} more' if len(words) > most else ''
  return comma.join(words[:most]) + rest


def readable(text: str) -> str:
  """The text with escapes for what UTF-8 has not, as in names of files."""
  return text.encode(errors='backslashreplace').decode()


def percent(
  fraction: float | None, digits: int = 2, undefined: str = '-'
) -> str:
  """Returns '12.34' for 0.1234, and `undefined` for None and NaN."""
  if fraction is None or math.isnan(fraction):
    return undefined
  return f'{100 * fraction:.{digits}f}'


def duration(seconds: float) -> str:
  """Returns '1:02:03' or '2:03'."""
  # Rounded first, so that 59.6 s gives 1:00 and not 0:60.
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02}:{seconds:02}'
  return f'{minutes}:{seconds:02}'


def differing(
  first: Mapping[str, Any], second: Mapping[str, Any], there: str, here: str
) -> list[str]:
  """Lines 'name: X there, Y here'; of long lists the first that differ."""
  lines = []
  for name in sorted(first.keys() | second.keys()):
    pair = first.get(name), second.get(name)
    if pair[0] == pair[1]:
      continue
    if all(isinstance(x, list) and len(x) > 2 for x in pair):
      pair = next(x for x in itertools.zip_longest(*pair) if x[0] != x[1])
    x, y = (shorten(repr(value), 100) for value in pair)
    lines.append(f'{name}: {x} {there}, {y} {here}')
  return lines
