"""What a rule gives back."""

import dataclasses
from collections.abc import Iterable

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
