"""A fault in data or files, as the doctor and submissions report it."""

from typing import NamedTuple


class Finding(NamedTuple):
  what: str  # One or two sentences, with the numbers that reveal the fault.
  samples: tuple[str, ...]  # All affected ones; empty if the whole split is.
  remedy: str  # With a command if there is one.
