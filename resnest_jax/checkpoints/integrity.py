"""Checksums of a checkpoint, and reading back what they belong to.

Orbax and TensorStore notice files that are missing, truncated or empty, but not
a changed byte in the values of an array.
"""

import errno
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from resnest_jax.errors import DamagedCheckpoint, UserError, system_error
from resnest_jax.text import listed
from resnest_jax.threads import map_in_threads

# Errors of the process or of rights: the files may be whole.
_NOT_DAMAGE = (
  *(errno.EACCES, errno.EPERM),
  *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


def array_names(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by name, such as 'params/conv/kernel'."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def tree_digest(tree: Any) -> str:
  """CRC-32 of names, shapes, types and values of all arrays, 8 digits."""
  arrays = array_names(jax.device_get(tree))
  sums = map_in_threads(_array_sum, arrays.values())
  return json_digest(dict(zip(arrays, sums, strict=True)))


def _array_sum(array: Any) -> list:
  array = np.asarray(array)
  values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return [array.dtype.name, list(array.shape), zlib.crc32(values)]


def json_digest(value: Mapping[str, Any]) -> str:
  """CRC-32 of JSON with sorted keys, 8 digits."""
  text = json.dumps(value, sort_keys=True)
  return f'{zlib.crc32(text.encode()):08x}'


def read_about(folder: Path) -> dict[str, Any]:
  """The description of a checkpoint, or a `DamagedCheckpoint`."""
  try:
    about = json.loads((folder / 'about' / 'metadata').read_bytes())
    digest = about.pop('digest')
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    raise _failure(folder, error) from error
  if digest != json_digest(about):
    raise _damaged(folder, 'the checksum of its description is wrong')
  return about


def read_items(
  manager: Any, step: int, **abstract: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Restores items, trees of `jax.ShapeDtypeStruct`s by name, and `about`.

  An item of None is read as it is stored, into the host's memory.

  Raises:
    DamagedCheckpoint: it is not what was written.
    UserError: the arrays belong to another network.
  """
  folder = manager.folder / str(step)
  about = read_about(folder)
  try:
    # Before gigabytes are read, and so that a wrong configuration is no damage.
    stored, wanted = manager.item_metadata(step), {}
    for name, item in abstract.items():
      if item is not None:
        _check_shapes(folder, name, stored[name], item, about)
      wanted[name] = _restore_args(item, stored[name])
    restored = manager.restore(step, args=ocp.args.Composite(**wanted))
  except (UserError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:  # Orbax and TensorStore have no common type.
    raise _failure(folder, error) from error
  trees = {name: restored[name] for name in abstract}
  for name, item in abstract.items():
    if tree_digest(trees[name]) != about['digests'][name]:
      raise _damaged(folder, f'the checksum of its item {name} is wrong')
    if item is not None:
      types = jax.tree.map(lambda x: x.dtype, item)
      trees[name] = jax.tree.map(lambda x, y: x.astype(y), trees[name], types)
  return trees, about


def _restore_args(item: Any, stored: Any) -> ocp.args.PyTreeRestore:
  if item is None:
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    how = jax.tree.map(lambda _: as_numpy, stored)
    return ocp.args.PyTreeRestore(restore_args=how)
  # Checksums are of stored values: restore in stored types, verify, then cast.
  leaves, names = array_names(stored), iter(array_names(item))
  item = jax.tree.map(lambda x: x.update(dtype=leaves[next(names)].dtype), item)
  how = ocp.checkpoint_utils.construct_restore_args(item)
  return ocp.args.PyTreeRestore(item, restore_args=how)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {name: tuple(leaf.shape) for name, leaf in array_names(tree).items()}


def _check_shapes(
  folder: Path, item: str, stored: Any, wanted: Any, about: Mapping[str, Any]
) -> None:
  there, wanted = shapes(stored), shapes(wanted)
  differ = [
    f'{name}: {there.get(name, "absent")} there, '
    f'{wanted.get(name, "absent")} in the configuration'
    for name in sorted(there.keys() | wanted.keys())
    if there.get(name) != wanted.get(name)
  ]
  if not differ:
    return
  # If the configuration agrees with the shapes as they were written, the files
  # have changed. The model's key is that of the first versions.
  key = 'shapes' if item == 'model' else f'{item}_shapes'
  if about['digests'].get(key) in (None, json_digest(wanted)):
    raise _damaged(folder, f'{len(differ)} arrays are not as they were')
  of = 'network' if item == 'model' else 'optimizer or version'
  raise UserError(
    f'checkpoint {folder} is of another {of} than the configuration: '
    f'{len(differ)} arrays differ ({listed(differ, 3, "; ")}). Give the '
    '--config and the --config.model flags it was trained with; eval.py takes '
    'them from the --workdir if --config is left out.'
  )


def _failure(folder: Path, error: Exception) -> UserError:
  number = system_error(error)
  if number in _NOT_DAMAGE:
    return UserError(f'{folder} cannot be read: {os.strerror(number)}.')
  lines = str(error).strip().splitlines() or ['']
  return _damaged(folder, f'{type(error).__name__}: {lines[0][:200]}')


def _damaged(folder: Path, why: str) -> DamagedCheckpoint:
  steps = [x.name for x in folder.parent.iterdir() if x.name.isdecimal()]
  others = sorted(set(steps) - {folder.name}, key=int)
  return DamagedCheckpoint(
    f'checkpoint {folder} is damaged ({why})',
    'train.py resumes from the newest that is whole; eval.py and predict.py '
    f'take --checkpoint {" or ".join(others)}.'
    if others
    else 'It is the only one: train again, into another --workdir.',
  )
