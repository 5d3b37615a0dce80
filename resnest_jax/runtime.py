"""Process-wide settings of scripts, and facts about where they run."""

import contextlib
import gc
import importlib.metadata
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from resnest_jax.errors import UserError, say
from resnest_jax.text import readable

PACKAGES = ('resnest-jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')
PACKAGES += ('grain', 'tensorflow-datasets', 'opencv-python-headless', 'numpy')


def set_up_compiler() -> None:
  """Adds our option to XLA_FLAGS, which XLA reads when it first compiles.

  Without unrolled loops the CPU's kernels compile in three quarters of the time
  and run as fast (docs/performance.md). Other platforms ignore the option.
  """
  option = '--xla_backend_extra_options'
  # The flag is one list of all such options, so a user's own is left alone.
  if option not in (flags := os.environ.get('XLA_FLAGS', '')):
    added = f'{flags} {option}=xla_cpu_disable_loop_unrolling'
    os.environ['XLA_FLAGS'] = added.strip()


def set_up(dtype: str = 'float32') -> None:
  """Prepares for `config.model.dtype`, before JAX computes anything."""
  import jax

  if dtype == 'float64':
    jax.config.update('jax_enable_x64', True)
  set_up_compiler()
  enable_compile_cache()
  # Modules live to the end, and every full collection would walk through them.
  gc.freeze()
  # Orbax warns of read-only folders, and logs pages of tracebacks about a full
  # disk before it raises the error that is reported.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  sys.unraisablehook = _leave_out_abandoned_writes


def _leave_out_abandoned_writes(unraisable) -> None:
  # On a full disk one write raises the error that is reported, and Orbax closes
  # the event loop of the others, each of which would print that later.
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def cache_in(name: str, variable: str) -> Path:
  """The folder that a variable names, or one in the user's cache folder."""
  cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(os.environ.get(variable) or Path(cache, 'resnest_jax', name))


def enable_compile_cache() -> Path:
  """Caches compiled programs on disk and returns the folder.

  JAX_COMPILATION_CACHE_DIR names it; by default it is `resnest_jax/xla` in the
  user's cache folder.
  """
  import jax

  folder = cache_in('xla', 'JAX_COMPILATION_CACHE_DIR')
  # XLA takes UTF-8 alone: in a home of another name programs are not cached.
  usable = readable(str(folder)) == str(folder)
  jax.config.update(
    'jax_compilation_cache_dir', str(folder) if usable else None
  )
  with contextlib.suppress(OSError):
    folder.mkdir(parents=True, exist_ok=True)
  if not os.access(folder, os.W_OK):
    say(
      f'note: {folder} cannot be written, so programs that it lacks are '
      'compiled at each start. Set JAX_COMPILATION_CACHE_DIR to another folder.'
    )
    # JAX would say so of every program.
    warnings.filterwarnings('ignore', 'Error .* persistent compilation cache')
  return folder


def lock_folder(folder: Path, what: str) -> contextlib.ExitStack:
  """Makes and locks a folder, until the process ends or the stack is closed.

  Raises `UserError` if another process holds it, whose message has the verb
  `what`, such as 'trains in', or if it is not writable.
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
  """Lists the programs that XLA compiles meanwhile, including cached ones."""
  import jax.monitoring

  from resnest_jax.jax_private import COMPILED

  names = []

  def listen(event, _, **more):
    if event == COMPILED:
      names.append(more['fun_name'])

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def step_memory(step: Any) -> str:
  """Says how much memory a `jax.stages.Compiled` step takes on each device."""
  import jax

  used = step.memory_analysis()
  # Results alias the donated arguments: that memory counts once.
  needed = (
    used.argument_size_in_bytes
    + used.output_size_in_bytes
    + used.temp_size_in_bytes
    - used.alias_size_in_bytes
  )
  device = jax.local_devices()[0]
  limit = (device.memory_stats() or {}).get('bytes_limit')
  of, where = limit, f'of each {device.device_kind}'
  if limit is None:  # Of a CPU.
    of = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    where = 'of this machine'
  over = ', which is more than there is' if needed > of else ''
  return (
    f'a step takes {needed / 1e9:.3g} GB of the {of / 1e9:.1f} GB {where}{over}'
  )


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that decide results."""
  from resnest_jax import __version__

  found = {'python': platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = 'not installed'
  # In a clone the package is not installed, or an older version is.
  found['resnest-jax'] = __version__
  return found


def describe_devices() -> str:
  """Such as '8 x TPU v5e'."""
  import jax

  devices = jax.devices()
  return f'{len(devices)} x {devices[0].device_kind}'
