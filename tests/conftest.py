"""Set-up of all tests: four virtual CPU devices, a compile cache, mini data."""

import gc
import os
import runpy
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


# Has to happen before jax is imported; what is set already stays.
_CACHE = str(ROOT / '.pytest_cache' / 'jax')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _CACHE)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
_FLAGS = ['--xla_force_host_platform_device_count=4']
_FLAGS.append('--xla_backend_optimization_level=0')
if version('jaxlib').startswith('0.10.'):  # Later ones do not know it.
  # Plain LLVM instead of MLIR for fused loops: a third of the compile time.
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')
_GIVEN = os.environ.get('XLA_FLAGS', '')
_FLAGS = [x for x in _FLAGS if x.partition('=')[0] not in _GIVEN]
os.environ['XLA_FLAGS'] = ' '.join([_GIVEN, *_FLAGS]).strip()
# A shell's background jobs ignore SIGINT, and so would all processes that the
# tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
  """Spares the garbage collector what imports have made."""
  gc.collect()
  gc.freeze()


# Errors there as in the tests' own process (pyproject.toml).
_WARNINGS = {'PYTHONWARNINGS': 'error::DeprecationWarning,error::FutureWarning'}


def _run_script(
  *arguments: str | Path,
  status: int = 0,
  environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
  """Runs `python ARGUMENTS` in the root; it has to end with the status."""
  command = [sys.executable, *map(str, arguments)]
  options = {'cwd': ROOT, 'text': True, 'timeout': 600}
  options['env'] = os.environ | _WARNINGS | (environment or {})
  process = subprocess.run(command, capture_output=True, **options)
  told = f'{arguments}:\n{process.stdout}\n{process.stderr}'
  assert process.returncode == status, told
  return process


def _write_data(path: Path, module: str, *words: object) -> Path:
  """Writes it with a module of `resnest_jax.data`; returns the path."""
  _run_script('-m', f'resnest_jax.data.{module}', *words, path)
  return path


@pytest.fixture
def float64():
  """JAX computes in float64; `usefixtures('float64')` for whole modules."""
  import jax

  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='session')
def root() -> Path:
  """The root of the repository."""
  return ROOT


@pytest.fixture(scope='session')
def run_script():
  """`run_script('train.py', '--config', ..., status=0)`; see `_run_script`."""
  return _run_script


@pytest.fixture
def call_script(monkeypatch):
  """`call_script('eval.py', ...)`: its `main` in this process."""

  def call(script: str, *arguments: str | Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
    runpy.run_path(script)['main']()

  return call


@pytest.fixture(scope='session')
def written_run(tmp_path_factory) -> Path:
  """A finished run of random weights; see `write_run`. Not to be changed."""
  from evaluation.runs import write_run

  return write_run(tmp_path_factory.mktemp('written') / 'run')


@pytest.fixture(scope='session')
def mini_archive(tmp_path_factory) -> Path:
  """A small ADEChallengeData2016.zip: 24 training, 8 validation images."""
  path = tmp_path_factory.mktemp('archive') / 'ADEChallengeData2016.zip'
  return _write_data(path, 'mini', '--images', 24, 8, '--out')


@pytest.fixture(scope='session')
def mini_data_dir(mini_archive, tmp_path_factory) -> Path:
  """`mini_archive`, prepared as `ade20k_mini`. Not to be written to."""
  words = 'ade20k_mini', '--archive', mini_archive, '--data_dir'
  return _write_data(tmp_path_factory.mktemp('data'), 'prepare', *words)


@pytest.fixture(scope='session')
def mini_imagenet_data_dir(tmp_path_factory) -> Path:
  """30 training and 16 validation pictures. Not to be written to."""
  words = 'imagenet_mini', '--images', 30, 16, '--data_dir'
  return _write_data(tmp_path_factory.mktemp('data'), 'prepare', *words)


@pytest.fixture(scope='session')
def mini_cityscapes_archives(tmp_path_factory) -> Path:
  """The folder of both zip files: 12 training, 4 validation, 1 test image."""
  words = '--images', 12, 4, '--size', 192, 96, '--out'
  path = tmp_path_factory.mktemp('cityscapes')
  return _write_data(path, 'mini_cityscapes', *words)


@pytest.fixture(scope='session')
def mini_cityscapes_data_dir(
  mini_cityscapes_archives, tmp_path_factory
) -> Path:
  """They, prepared as `cityscapes_mini`. Not to be written to."""
  words = 'cityscapes_mini', '--archive_dir', mini_cityscapes_archives
  path = tmp_path_factory.mktemp('data')
  return _write_data(path, 'prepare', *words, '--data_dir')
