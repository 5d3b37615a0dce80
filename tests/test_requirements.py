"""Every Python has its pins, they are what is installed, and make finds it."""

import re
import shutil
import subprocess
import tomllib
from importlib import metadata

import pytest
from hosts import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ALL = ('requirements', 'requirements-test', 'requirements-onnx')


def pins(*files, **environment):
  """Name -> version of what requirements*.txt give a Python, or this one."""
  texts = [(ROOT / f'{file}.txt').read_text() for file in files]
  lines = re.findall(r'^\w[^#\n]*', '\n'.join(texts), re.MULTILINE)
  found = {}
  for requirement in map(Requirement, lines):
    if is_needed(requirement, **environment):
      (version,) = requirement.specifier
      name = canonicalize_name(requirement.name)
      assert (version.operator, name in found) == ('==', False), requirement
      found[name] = version.version
  return found


def is_needed(requirement, **environment):
  return not requirement.marker or requirement.marker.evaluate(environment)


@pytest.mark.parametrize('python', ['3.11', '3.12', '3.13'])
def test_every_python_has_one_pin_of_each_package(python):
  found = pins(*ALL, python_version=python)
  assert 'tensorflow' not in found
  jax = '0.10.2' if python == '3.11' else '0.12.0.1'
  assert found['jax'] == found['jaxlib'] == jax
  for file in ('requirements-gpu', 'requirements-tpu', 'requirements-ahead'):
    assert '-r requirements.txt' in (ROOT / f'{file}.txt').read_text()
    assert pins(file, python_version=python) == {'jax': jax}


def test_what_is_installed_is_what_is_pinned():
  """And so is all that it needs, but for the CUDA that torch may bring.

  Datumaro is installed without what only other formats of it need.
  """
  found = pins(*ALL)
  # torch's own build is named behind a plus.
  assert found == {x: metadata.version(x).partition('+')[0] for x in found}
  unpinned = {
    f'{need.name} of {name}'
    for name in found.keys() - {'torch', 'datumaro'}
    for need in map(Requirement, metadata.requires(name) or ())
    if is_needed(need, extra='') and canonicalize_name(need.name) not in found
  }
  assert unpinned == set()


def test_bounds_of_the_package_hold_what_is_pinned():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  bounds = list(map(Requirement, project['dependencies']))
  for extra in ('annotations', 'export', 'demo', 'torch', 'wandb'):
    bounds += map(Requirement, project['optional-dependencies'][extra])
  for python in ('3.11', '3.13'):
    found = pins(*ALL, python_version=python)
    for bound in bounds:
      version = found[canonicalize_name(bound.name)]
      assert bound.specifier.contains(version), (bound, version)
  # JAX drops names every quarter: nothing newer than what was tried.
  (jax,) = [bound for bound in bounds if bound.name == 'jax']
  assert not jax.specifier.contains('0.13.0')


def test_the_newest_python_that_works_is_taken(tmp_path):
  """One of pyenv's as well; not one without venv, whatever its number."""
  (tmp_path / 'bin').mkdir()
  for tool in ('make', 'sh', 'touch', 'mkdir'):
    (tmp_path / 'bin' / tool).symlink_to(shutil.which(tool))
  for version, body in (
    ('3.13', 'exit 1'),
    ('3.12', 'case $1$2 in --version) echo 12;; -mvenv) mkdir $4;; esac'),
    ('3.11', 'exit 0'),
  ):
    python = tmp_path / f'pyenv/versions/{version}.9/bin/python{version}'
    python.parent.mkdir(parents=True)
    python.write_text(f'#!{shutil.which("sh")}\n{body}\n')
    python.chmod(0o755)

  def make(*arguments):
    command = ['make', '-C', ROOT, 'venv', 'PIP=:', f'VENV={tmp_path}/env']
    command += [f'PYENV_ROOT={tmp_path}/pyenv', *arguments]
    path = {'PATH': f'{tmp_path}/bin'}
    return subprocess.run(command, env=path, capture_output=True, text=True)

  none = make('PYTHONS=python3.13 python4')
  assert none.returncode == 2
  assert 'among: python3.13 python4. Install one' in none.stderr
  found = make()
  assert found.returncode == 0, found.stderr
  assert f'making {tmp_path}/env with 12' in found.stdout
