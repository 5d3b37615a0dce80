"""Which parameters of a slow test `make test` runs."""

import pytest


def others_long(values, *short):
  """All values; those besides `short` are left to `make test-long`."""
  values = list(values)
  assert set(short) <= set(values), short
  long = {x: x if isinstance(x, tuple) else (x,) for x in values}
  mark = pytest.mark.long
  return [x if x in short else pytest.param(*long[x], marks=mark) for x in long]
