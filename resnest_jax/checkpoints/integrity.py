"""Checksums of a checkpoint, and reading back what they belong to.

Orbax and TensorStore notice files that are missing, truncated or empty, but not
a changed byte in the values of an array. So sums of the values are computed
when a checkpoint is written, stored in it, and compared when it is read,
whatever the number of devices then.
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
from resnest_jax.threads import map_in_threads

# Errors of the process or of rights: the files may be whole.
_NOT_DAMAGE = (
  errno.EACCES,
  errno.EPERM,
  errno.EMFILE,
  errno.ENFILE,
  errno.ENOMEM,
)


def array_names(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by name, 'params/conv/kernel'."""
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
  """CRC-32 of names, shapes, types and values of all arrays, 8 digits."""
  arrays = array_names(jax.device_get(tree))
  # zlib releases the GIL.
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
  manager: ocp.CheckpointManager, step: int, **abstract: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Restores items of a checkpoint and verifies their checksums.

  Args:
    manager: holds the checkpoint.
    step: its number.
    **abstract: name of an item -> tree of `jax.ShapeDtypeStruct`s.

  Returns:
    Name -> restored tree, and `about`.

  Raises:
    DamagedCheckpoint: it is not what was written.
    UserError: the arrays belong to another network.
  """
  folder = manager.directory / str(step)
  about = read_about(folder)
  try:
    # Shapes first: a wrong configuration is told in a second, before gigabytes
    # are read, and not as damage.
    stored = manager.item_metadata(step)
    for name, item in abstract.items():
      _check_shapes(folder, name, stored[name], item, about)
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        **{
          name: _restore_args(_typed(item, stored[name]))
          for name, item in abstract.items()
        }
      ),
    )
  except (UserError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:  # Orbax and TensorStore have no common type.
    raise _failure(folder, error) from error
  trees = {}
  for name, item in abstract.items():
    if tree_digest(restored[name]) != about['digests'][name]:
      raise _damaged(folder, f'the checksum of its item {name} is wrong')
    trees[name] = jax.tree.map(
      lambda x, wanted: x.astype(wanted.dtype), restored[name], item
    )
  return trees, about


def _restore_args(item: Any) -> ocp.args.PyTreeRestore:
  return ocp.args.PyTreeRestore(
    item, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
  )


def _typed(item: Any, stored: Any) -> Any:
  # Checksums are of the stored values: restore in the stored types, verify,
  # and cast afterwards.
  types = {name: leaf.dtype for name, leaf in array_names(stored).items()}
  names = iter(array_names(item))
  return jax.tree.map(lambda x: x.update(dtype=types[next(names)]), item)


def shapes_digest(tree: Any) -> str:
  """CRC-32 of the names and shapes of all arrays, 8 digits."""
  return json_digest({name: list(x) for name, x in _shapes(tree).items()})


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {name: tuple(leaf.shape) for name, leaf in array_names(tree).items()}


def _check_shapes(
  folder: Path, item: str, stored: Any, wanted: Any, about: Mapping[str, Any]
) -> None:
  there, wanted = _shapes(stored), _shapes(wanted)
  differ = [
    f'{name}: {there.get(name, "absent")} there, '
    f'{wanted.get(name, "absent")} in the configuration'
    for name in sorted(there.keys() | wanted.keys())
    if there.get(name) != wanted.get(name)
  ]
  if not differ:
    return
  # The description has a digest of the shapes as they were written. If the
  # configuration agrees with that, the files have changed.
  shapes = {name: list(shape) for name, shape in wanted.items()}
  written = about['digests'].get(f'{item}_shapes')
  if item == 'model':  # The key of the first versions.
    written = about['digests']['shapes']
  if written in (None, json_digest(shapes)):
    raise _damaged(folder, f'{len(differ)} arrays are not as they were')
  of = 'network' if item == 'model' else 'optimizer or version'
  raise UserError(
    f'checkpoint {folder} is of another {of} than the configuration: '
    f'{len(differ)} arrays differ ({"; ".join(differ[:3])}'
    f'{"; ..." if len(differ) > 3 else ""}). Give the --config and the '
    '--config.model flags it was trained with.'
  )


def _failure(folder: Path, error: Exception) -> UserError:
  number = system_error(error)
  if number in _NOT_DAMAGE:
    return UserError(f'{folder} cannot be read: {os.strerror(number)}.')
  lines = str(error).strip().splitlines() or ['']
  return _damaged(folder, f'{type(error).__name__}: {lines[0][:200]}')


def _damaged(folder: Path, why: str) -> DamagedCheckpoint:
  return DamagedCheckpoint(
    f'checkpoint {folder} is damaged ({why})',
    'train.py resumes from the one before it; eval.py and predict.py take that '
    'with --checkpoint STEP.',
  )
