"""A fault in data or files, as the doctor and submissions report it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Finding:
  """A fault, the affected samples and the remedy."""

  # One or two sentences, with the numbers that reveal the fault.
  what: str
  # Names of all affected samples; empty if the whole split is.
  samples: tuple[str, ...]
  # What to do, with a command if there is one.
  remedy: str
