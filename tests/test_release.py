"""Wheel and sdist: what is in them; the wheel works without a clone."""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from evaluation.runs import write_run
from packaging.metadata import Metadata

import resnest_jax
from resnest_jax.__main__ import SCRIPTS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
OPTIONAL = {'gradio', 'jax2onnx', 'onnx', 'onnxruntime', 'torch', 'wandb'}


@pytest.fixture(scope='module')
def archives(run_script, tmp_path_factory):
  """The sdist, opened, and the wheel that is built from it."""
  out = tmp_path_factory.mktemp('dist')
  run_script('-m', 'build', '--no-isolation', '--outdir', out, ROOT)
  (sdist,), (wheel,) = out.glob('*.tar.gz'), out.glob('*.whl')
  with tarfile.open(sdist) as tar, zipfile.ZipFile(wheel) as zipped:
    yield tar, zipped


@pytest.fixture(scope='module')
def installed(archives, tmp_path_factory):
  """Runs a command of an environment with the wheel, outside of the clone.

  The packages that it needs are those of the tests' environment, without the
  clone that is installed there.
  """
  folder = tmp_path_factory.mktemp('clean')
  venv.create(folder / 'env', with_pip=False)
  scheme = {'base': str(folder / 'env'), 'platbase': str(folder / 'env')}
  purelib = Path(sysconfig.get_path('purelib', 'posix_prefix', scheme))
  needed = Path(importlib.metadata.distribution('jax').locate_file(''))
  (purelib / 'needed.pth').write_text(f'{needed}\n')
  pip = ('pip', '--python', folder / 'env/bin/python', 'install', '--quiet')
  options = ('--no-deps', '--no-index', '--disable-pip-version-check')
  command = [sys.executable, '-m', *pip, *options, archives[1].filename]
  subprocess.run(command, check=True)
  work = folder / 'work'
  work.mkdir()
  environment = os.environ | {'PYTHONPATH': '', 'XLA_FLAGS': ''}

  def run(program, *arguments, status=0):
    process = subprocess.run(
      [folder / 'env/bin' / program, *map(str, arguments)],
      cwd=work,
      env=environment | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
      capture_output=True,
      text=True,
    )
    assert process.returncode == status, process.stdout + process.stderr
    return process

  return work, run


def files_of(*folders):
  return {
    path.relative_to(ROOT).as_posix()
    for folder in folders
    for path in (ROOT / folder).rglob('*')
    if path.is_file() and path.suffix != '.pyc'
  }


def test_wheel_has_package_scripts_and_configs_and_nothing_else(archives):
  _, wheel = archives
  expected = {path: path for path in files_of('resnest_jax')}
  for path in (*files_of('configs'), *(f'{name}.py' for name in SCRIPTS)):
    expected[f'resnest_jax/scripts/{path}'] = path
  names = {name for name in wheel.namelist() if '.dist-info/' not in name}
  assert names == expected.keys()
  for name, path in expected.items():
    assert wheel.read(name) == (ROOT / path).read_bytes(), name


def test_sdist_has_all_that_its_tests_need(archives):
  sdist, _ = archives
  top = f'resnest_jax-{PROJECT["version"]}/'
  names = {name.removeprefix(top) for name in sdist.getnames()}
  folders = ('benchmarks', 'configs', 'docs', 'notebooks', 'tests')
  assert files_of(*folders, 'resnest_jax') - names == set()
  tops = {path.name for path in ROOT.iterdir() if path.is_file()}
  assert tops - names <= {'.git', '.gitignore'}
  assert not any('__pycache__' in name for name in names)


def test_metadata_is_valid_and_of_one_version(archives):
  _, wheel = archives
  (name,) = (x for x in wheel.namelist() if x.endswith('/METADATA'))
  metadata = Metadata.from_email(wheel.read(name), validate=True)
  version = str(metadata.version)
  heading = re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)
  assert version == PROJECT['version'] == heading[1] == resnest_jax.__version__
  readme = (ROOT / 'README.md').read_text()
  assert metadata.description.strip() == readme.strip()


def imported(run, code):
  code = f'import sys; {code}; print(*sys.modules)'
  names = run('python', '-c', code).stdout.split()
  return {name.partition('.')[0] for name in names}


def test_import_is_light(installed):
  _, run = installed
  others = imported(run, 'import resnest_jax') - imported(run, 'pass')
  assert others - sys.stdlib_module_names == {'resnest_jax'}
  used = imported(run, 'import resnest_jax; resnest_jax.from_checkpoint')
  assert 'jax' in used
  assert used & (OPTIONAL | {'matplotlib', 'tensorflow'}) == set()


@pytest.mark.long
def test_prediction_from_the_wheel(installed):
  work, run = installed
  where = run('python', '-c', 'import resnest_jax as r; print(r.__file__)')
  assert where.stdout.startswith(str(work.parent))
  write_run(work / 'run')
  picture = np.random.default_rng(0).integers(0, 256, (50, 64, 3), np.uint8)
  cv2.imwrite(str(work / 'street.png'), picture)
  run('resnest-jax', 'predict', '--weights', 'run', '--out', 'a', 'street.png')
  mask = cv2.imread(str(work / 'a/street.png'), cv2.IMREAD_UNCHANGED)
  assert mask.shape == (50, 64)
  assert len(np.unique(mask)) > 1


MINE = """
from configs import common

def get_config(argument=None):
  config = common.get_config()
  config.data.data_dir = 'mydata'
  return common.vary(config, argument)
"""


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    ('', 'usage: resnest-jax COMMAND FLAGS'),
    ('--version', PROJECT['version']),
    (
      'draw',
      "no command 'draw'; there are train, eval, predict, export, prepare, ",
    ),
    ('predict --weights x y', 'resnest-jax predict --help'),
    (
      'train --config configs/ade20k.py --workdir x',
      '(did you mean ade20k_fcn?); there are ade20k_deeplabv3, ade20k_',
    ),
    (
      'train --config configs/folder.py:mini --workdir x',
      'there is no folder data; set config.data.data_dir',
    ),
    ('train --workdir x --config mine.py:mini', 'is not prepared in mydata'),
    ('doctor --config folder:mini', 'there is no folder data'),
  ],
)
def test_command_line_of_the_wheel(arguments, said, installed):
  work, run = installed
  (work / 'mine.py').write_text(MINE)
  status = 0 if arguments in ('', '--version') else 1
  process = run('resnest-jax', *arguments.split(), status=status)
  assert said in process.stdout + process.stderr
  assert 'Traceback' not in process.stderr
