"""What a script sets up once, and what it reports about where it ran."""

import contextlib
import gc
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from resnest_jax.errors import UserError

PACKAGES = (
  'resnest-jax',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'tensorflow-datasets',
  'opencv-python-headless',
  'numpy',
)


# Loops of the CPU's kernels that are not unrolled are compiled in three
# quarters of the time and run as fast (docs/performance.md). Other platforms
# pass over it.
_XLA_OPTION = '--xla_backend_extra_options'
_NOT_UNROLLED = 'xla_cpu_disable_loop_unrolling'


def set_up_compiler() -> None:
  """Sets what XLA reads when it first compiles.

  An XLA_FLAGS that has `--xla_backend_extra_options` is left as it is.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if _XLA_OPTION not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {_XLA_OPTION}={_NOT_UNROLLED}'.strip()


def set_up(dtype: str = 'float32') -> None:
  """What every script does before it computes.

  Args:
    dtype: `config.model.dtype`; JAX makes float64 only when told to.
  """
  import jax

  if dtype == 'float64':
    jax.config.update('jax_enable_x64', True)
  set_up_compiler()
  enable_compile_cache()
  gc.freeze()  # Else each collection looks through all modules.
  # Orbax warns of read-only folders, and of a full disk with pages of
  # tracebacks before it raises the error.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  sys.unraisablehook = _leave_out_abandoned_writes


def _leave_out_abandoned_writes(unraisable) -> None:
  """A `sys.unraisablehook` that says only what can be acted on.

  The first write that fails raises the error, and Orbax closes the event loop
  of the others; each of TensorStore's threads that ends one of them later
  would print that the loop is closed, amid or after the error's one line.
  """
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def enable_compile_cache() -> Path:
  """Keeps compiled programs on disk, so that a second start is quick.

  The folder is that of the variable JAX_COMPILATION_CACHE_DIR, or else
  `resnest_jax/xla` in the user's cache folder.
  """
  import jax

  if folder := os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return Path(folder)
  cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  folder = Path(cache) / 'resnest_jax' / 'xla'
  jax.config.update('jax_compilation_cache_dir', str(folder))
  return folder


def lock_folder(folder: Path, what: str) -> contextlib.ExitStack:
  """Takes a folder for this process, until it ends or the stack is closed.

  Args:
    folder: is made if it is not there.
    what: does this process do, for the message to a second one.

  Raises:
    UserError: another process holds it, or it cannot be written to.
  """
  held = contextlib.ExitStack()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(filelock.FileLock(folder / '.lock', timeout=0))
  except filelock.Timeout as error:
    raise UserError(
      f'another process {what} {folder} just now. Wait until it is done, or '
      'give another folder.'
    ) from error
  except OSError as error:
    raise UserError(
      f'cannot write to {folder} ({error.strerror}). Give another folder.'
    ) from error
  return held


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
  """Lists the names of the programs that XLA compiles meanwhile.

  What comes from the cache on disk counts, too.
  """
  import jax.monitoring

  from resnest_jax.jax_private import COMPILED

  names = []

  def listen(event, seconds, **more):
    del seconds
    if event == COMPILED:
      names.append(more['fun_name'])

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def step_memory(step: Any) -> str:
  """The memory of a compiled function on each device, and how much there is.

  Args:
    step: of `jax.stages.Compiled`.
  """
  import jax

  used = step.memory_analysis()
  # Donated arguments and results share their memory.
  needed = (
    used.argument_size_in_bytes
    + used.output_size_in_bytes
    + used.temp_size_in_bytes
    - used.alias_size_in_bytes
  )
  device = jax.local_devices()[0]
  limit = (device.memory_stats() or {}).get('bytes_limit')
  of, where = limit, f'of each {device.device_kind}'
  if limit is None:  # The CPU's, which JAX does not know.
    of = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    where = 'of this machine'
  return f'a step takes {needed / 1e9:.3g} of the {of / 1e9:.1f} GB {where}'


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that decide results."""
  from resnest_jax import __version__

  found = {'python': platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = 'not installed'
  # Also where the package is used from its folder.
  found['resnest-jax'] = __version__
  return found


def describe_devices() -> str:
  """For instance '8 x TPU v5e'."""
  import jax

  devices = jax.devices()
  return f'{len(devices)} x {devices[0].device_kind}'
