"""Numbers and lists in words."""

import math
import re
from collections.abc import Iterable, Sized

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


def listed(words: Iterable[object], most: int = 6) -> str:
  """Returns 'a, b, c and 7 more'."""
  words = [str(word) for word in words]
  rest = f' and {len(words) - most} more' if len(words) > most else ''
  return ', '.join(words[:most]) + rest


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
