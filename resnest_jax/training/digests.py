"""Checksums of what a checkpoint holds.

Orbax and TensorStore notice files that are missing, cut off or empty, but not
a changed byte in the values of an array: it is restored as it is. The sums are
made of the values when a checkpoint is written, lie in it, and are compared
when it is read, whatever the number of devices then.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from resnest_jax.threads import map_in_threads


def array_names(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by name: 'params/conv/kernel'."""
  return {
    '/'.join(str(_key(key)) for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _key(key: Any) -> Any:
  for name in ('key', 'name', 'idx'):
    if hasattr(key, name):
      return getattr(key, name)
  return key


def tree_digest(tree: Any) -> str:
  """CRC-32 of names, shapes, types and values of all arrays, 8 digits.

  Args:
    tree: of arrays, each of which this process can read whole.
  """
  arrays = array_names(jax.device_get(tree))
  # zlib releases the GIL.
  sums = map_in_threads(_array_sum, arrays.values())
  return json_digest(dict(zip(arrays, sums, strict=True)))


def _array_sum(array: Any) -> list:
  array = np.asarray(array)
  values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return [array.dtype.name, list(array.shape), zlib.crc32(values)]


def json_digest(value: Mapping[str, Any]) -> str:
  """CRC-32 of JSON, whatever the order of its keys, 8 digits."""
  text = json.dumps(value, sort_keys=True)
  return f'{zlib.crc32(text.encode()):08x}'
