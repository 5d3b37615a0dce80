"""Wheel and sdist: what is in them; the wheel works without a clone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from evaluation.runs import write_run
from hosts import ROOT
from packaging.metadata import Metadata

import resnest_jax
from resnest_jax.__main__ import SCRIPTS

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
OPTIONAL = {'gradio', 'jax2onnx', 'onnx', 'onnxruntime', 'pycocotools'}
OPTIONAL |= {'torch', 'wandb'}


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
  """Runs a command of an environment with the wheel, outside of the clone."""
  folder = tmp_path_factory.mktemp('clean')
  work, programs = folder / 'work', folder / 'env/bin'
  work.mkdir()
  venv.create(folder / 'env', with_pip=False)
  (packages,) = (folder / 'env/lib').glob('*/site-packages')
  # What it needs is the tests' own, without the clone that is installed there.
  (packages / 'needed.pth').write_text(f'{Path(np.__file__).parents[1]}\n')
  pip = sys.executable, '-m', 'pip', '--python', programs / 'python', 'install'
  options = '--quiet', '--no-deps', '--no-index', archives[1].filename
  subprocess.run([*pip, *options], check=True)
  ours = {'PYTHONPATH': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  environment = os.environ | ours | {'XLA_FLAGS': ''}
  options = {'cwd': work, 'env': environment, 'capture_output': True}

  def run(program, *words, status=0):
    process = subprocess.run([programs / program, *words], text=True, **options)
    assert process.returncode == status, process.stdout + process.stderr
    return process

  return work, run


def files_of(*folders):
  found = [x for name in folders for x in (ROOT / name).rglob('*')]
  files = [x for x in found if x.is_file() and x.suffix != '.pyc']
  return {x.relative_to(ROOT).as_posix() for x in files}


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
  top = f'resnest_jax-{PROJECT["version"]}/'
  names = {name.removeprefix(top) for name in archives[0].getnames()}
  folders = ('benchmarks', 'configs', 'docs', 'notebooks', 'tests')
  assert files_of(*folders, 'resnest_jax') - names == set()
  tops = {path.name for path in ROOT.iterdir() if path.is_file()}
  assert tops - names <= {'.git', '.gitignore'}
  assert not any('__pycache__' in name for name in names)


def test_metadata_is_valid_and_of_one_version(archives):
  _, wheel = archives
  (name,) = (x for x in wheel.namelist() if x.endswith('/METADATA'))
  metadata = Metadata.from_email(wheel.read(name), validate=True)
  heading = re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)
  versions = str(metadata.version), heading[1], resnest_jax.__version__
  assert {*versions} == {PROJECT['version']}
  readme = (ROOT / 'README.md').read_text()
  assert metadata.description.strip() == readme.strip()


def test_import_is_light(installed):
  def imported(code):
    code = f'import sys; {code}; print(*sys.modules)'
    names = installed[1]('python', '-c', code).stdout.split()
    return {name.partition('.')[0] for name in names}

  others = imported('import resnest_jax') - imported('pass')
  assert others - sys.stdlib_module_names == {'resnest_jax'}
  used = imported('import resnest_jax; resnest_jax.from_checkpoint')
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


SAID = {
  '': 'usage: resnest-jax COMMAND FLAGS',
  '--version': PROJECT['version'],
  'draw': "no command 'draw'; there are train, eval, predict, export, prepare,",
  'predict --weights x y': 'resnest-jax predict --help',
  'doctor --config configs/ade20k.py': 'did you mean ade20k_fcn?); there are ',
  'train --config configs/folder.py:mini --workdir x': 'no folder data; set co',
  'doctor --config mine.py:mini --config.data.data_dir=me': 'prepared in me',
  'doctor --config folder:mini': 'there is no folder data',
}


@pytest.mark.parametrize('arguments', SAID)
def test_command_line_of_the_wheel(arguments, installed):
  work, run = installed
  shutil.copy(ROOT / 'configs/ade20k_fcn.py', work / 'mine.py')
  status = 0 if arguments in ('', '--version') else 1
  process = run('resnest-jax', *arguments.split(), status=status)
  assert SAID[arguments] in process.stdout + process.stderr
  assert 'Traceback' not in process.stderr
