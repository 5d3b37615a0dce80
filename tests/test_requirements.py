"""Every Python has its pins, they are what is installed, and make finds it."""

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
ALL = ('requirements', 'requirements-test', 'requirements-onnx')
HERE = '{}.{}'.format(*sys.version_info)


def pins(*files, python):
  """Name -> version of what requirements*.txt give this Python."""
  found = {}
  for file in files:
    for line in (ROOT / f'{file}.txt').read_text().splitlines():
      line = line.split('#')[0].strip()
      if not line or line.startswith('-r '):
        continue
      requirement = Requirement(line)
      if is_needed(requirement, python_version=python):
        (version,) = requirement.specifier
        assert version.operator == '==', line
        name = canonicalize_name(requirement.name)
        assert name not in found, line
        found[name] = version.version
  return found


def is_needed(requirement, **environment):
  return not requirement.marker or requirement.marker.evaluate(environment)


@pytest.mark.parametrize('python', ['3.11', '3.12', '3.13'])
def test_every_python_has_one_pin_of_each_package(python):
  found = pins(*ALL, python=python)
  assert 'tensorflow' not in found
  newest = python != '3.11'
  assert found['jax'] == found['jaxlib'] == ('0.12.0.1' if newest else '0.10.2')
  for kind in ('gpu', 'tpu', 'ahead'):
    text = (ROOT / f'requirements-{kind}.txt').read_text()
    assert '-r requirements.txt' in text
    accelerated = pins(f'requirements-{kind}', python=python)
    assert accelerated == {'jax': found['jax']}


def test_what_is_installed_is_what_is_pinned():
  """And so is all that it needs, but for the CUDA that torch may bring."""
  found = pins(*ALL, python=HERE)
  installed = {name: importlib.metadata.version(name) for name in found}
  # torch's own build is named behind a plus.
  installed = {k: v.partition('+')[0] for k, v in installed.items()}
  assert installed == found
  unpinned = {
    f'{need.name} of {name}'
    for name in found.keys() - {'torch'}
    for need in map(Requirement, importlib.metadata.requires(name) or ())
    if is_needed(need, extra='') and canonicalize_name(need.name) not in found
  }
  assert unpinned == set()


def test_bounds_of_the_package_hold_what_is_pinned():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  bounds = list(map(Requirement, project['dependencies']))
  for extra in ('export', 'demo', 'torch', 'wandb'):
    bounds += map(Requirement, project['optional-dependencies'][extra])
  for python in ('3.11', '3.13'):
    found = pins(*ALL, python=python)
    for bound in bounds:
      version = found[canonicalize_name(bound.name)]
      assert bound.specifier.contains(version), (bound, version)
  # JAX drops names every quarter: nothing newer than what was tried.
  (jax,) = [bound for bound in bounds if bound.name == 'jax']
  assert not jax.specifier.contains('0.13.0')


def test_the_newest_python_that_works_is_taken(tmp_path):
  """One of pyenv's as well; not one without venv, whatever its number."""
  tools = tmp_path / 'bin'
  tools.mkdir()
  for tool in ('make', 'sh', 'touch', 'mkdir'):
    (tools / tool).symlink_to(shutil.which(tool))
  for version, body in (
    ('3.13.9', 'exit 1'),
    ('3.12.9', 'case $1$2 in --version) echo 12;; -mvenv) mkdir $4;; esac'),
    ('3.11.9', 'exit 0'),
  ):
    folder = tmp_path / 'pyenv' / 'versions' / version / 'bin'
    folder.mkdir(parents=True)
    python = folder / f'python{version[:4]}'
    python.write_text(f'#!{shutil.which("sh")}\n{body}\n')
    python.chmod(0o755)

  def make(*arguments):
    command = ['make', '-C', ROOT, 'venv', 'PIP=:', f'VENV={tmp_path}/env']
    command += [f'PYENV_ROOT={tmp_path}/pyenv', *arguments]
    path = {'PATH': str(tools)}
    return subprocess.run(command, env=path, capture_output=True, text=True)

  none = make('PYTHONS=python3.13 python4')
  assert none.returncode == 2
  assert 'among: python3.13 python4. Install one' in none.stderr
  found = make()
  assert found.returncode == 0, found.stderr
  assert f'making {tmp_path}/env with 12' in found.stdout
