"""Which parameters of a slow test `make test` runs."""

from collections.abc import Iterable
from typing import Any

import pytest


def others_long(values: Iterable[Any], *short: Any) -> list[Any]:
  """All values; those besides `short` are left to `make test-long`."""
  values = list(values)
  assert set(short) <= set(values), short
  return [
    pytest.param(
      *(value if isinstance(value, tuple) else (value,)),
      marks=[] if value in short else pytest.mark.long,
    )
    for value in values
  ]
