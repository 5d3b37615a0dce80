"""A fault that a check has found, for the doctor and for submissions."""

import dataclasses


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
