"""What a script sets up once, and what it reports about where it ran."""

import importlib.metadata
import logging
import os
import platform
from pathlib import Path

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


def set_up(dtype: str = 'float32') -> None:
  """What every script does before it computes.

  Args:
    dtype: `config.model.dtype`; JAX makes float64 only when told to.
  """
  import jax

  if dtype == 'float64':
    jax.config.update('jax_enable_x64', True)
  enable_compile_cache()
  # Orbax warns of each checkpoint without metrics and of read-only folders.
  logging.getLogger('absl').setLevel(logging.ERROR)


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
