"""What a rule gives back."""

import dataclasses
from collections.abc import Iterable, Sized

from resnest_jax.data.checks.observe import Observation


@dataclasses.dataclass(frozen=True)
class Finding:
  """A fault that was seen.

  Attributes:
    what: one or two sentences, with the numbers that give it away.
    samples: names of all samples concerned; empty if it is the split itself.
    remedy: what to do, with a command where there is one.
  """

  what: str
  samples: tuple[str, ...]
  remedy: str


def names(observations: Iterable[Observation]) -> tuple[str, ...]:
  return tuple(o.name for o in observations)


def plural(number: int, noun: str, verb: str = '') -> str:
  """'1 mask', '2 masks', '3 classes', with verb '1 mask has'."""
  ending = 'es' if noun.endswith('s') else 's'
  words = f'{number} {noun}{"" if number == 1 else ending}'
  return f'{words} {_conjugated(number, verb)}'.rstrip()


def share(part: int, whole: int, noun: str, verb: str = '') -> str:
  """'1 of 3 masks has', '2 of 3 masks have', '1 of 1 mask has'."""
  words = f'{part} of {plural(whole, noun)}'
  return f'{words} {_conjugated(part, verb)}'.rstrip()


def share_of(part: Sized, whole: Sized, noun: str, verb: str = '') -> str:
  """`share` of what is in two collections."""
  return share(len(part), len(whole), noun, verb)


def _conjugated(number: int, verb: str) -> str:
  singular = {'have': 'has', 'are': 'is', 'do': 'does'}
  return singular.get(verb, verb) if number == 1 else verb


def listed(words: Iterable[object], most: int = 6) -> str:
  """'a, b, c and 7 more'."""
  words = [str(word) for word in words]
  rest = f' and {len(words) - most} more' if len(words) > most else ''
  return ', '.join(words[:most]) + rest
