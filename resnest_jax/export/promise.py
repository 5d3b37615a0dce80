"""How long JAX promises to read the StableHLO that it writes."""

import calendar
from datetime import date
from typing import NamedTuple

import jax

MONTHS = 6  # After the release that wrote a file.
# The days on which jax and jaxlib were built, read off the files in the wheels.
RELEASED = {
  '0.10.2': '2026-06-17',
  '0.11.2': '2026-09-17',
  '0.12.0': '2026-10-16',
  '0.12.0.1': '2026-10-20',
}


class Written(NamedTuple):
  """The JAX that wrote a file, and the promise to read it; ISO dates."""

  jax: str
  on: str  # The day of writing.
  released: str | None  # The day of that version's release, if it is known.
  read_until: str | None  # The last day of the releases promised to read it.

  def sentence(self) -> str:
    """The promise in words."""
    start = f'written on {self.on} by JAX {self.jax}'
    if self.released:
      return (
        f'{start}, released on {self.released}; JAX promises that its releases '
        f'of the {MONTHS} months after that, until {self.read_until}, read it.'
      )
    # Released at the latest on the day of writing, which bounds the promise.
    return (
      f'{start}; JAX promises that its releases of the {MONTHS} months after '
      'that one read it. Its date is not known here: they end on '
      f'{promised(self.on)} at the latest.'
    )

  def shorter_than(self, other: 'Written | None', today: str) -> str:
    """A warning if this promise is over or ends before another's; or ''."""
    if self.read_until is None:
      return ''
    before = other and other.read_until and self.read_until < other.read_until
    if not before and self.read_until >= today:
      return ''
    than = f', before that of JAX {other.jax}' if before else ''
    return (
      f"JAX {self.jax}'s promise to read it ends on {self.read_until}{than}: "
      'write it by a newer release (from 0.11 on they need Python 3.12).'
    )


def written_now(today: date | None = None) -> Written:
  """The promise for a file that the running JAX writes today."""
  released = RELEASED.get(jax.__version__)
  until = promised(released) if released else None
  day = (today or date.today()).isoformat()
  return Written(jax.__version__, day, released, until)


def promised(day: str) -> str:
  """`MONTHS` after a day, or the last day of that month if it is shorter."""
  start = date.fromisoformat(day)
  years, month = divmod(start.month - 1 + MONTHS, 12)
  year = start.year + years
  last = calendar.monthrange(year, month + 1)[1]
  return date(year, month + 1, min(start.day, last)).isoformat()
