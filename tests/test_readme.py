"""Every command of README, CONTRIBUTING and docs names things that exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from documented import documented

from resnest_jax.config import load_config
from resnest_jax.export.checks import INSTALL_JAX2ONNX
from resnest_jax.weights.files import TORCH_INSTALL

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
CONTRIBUTING = (ROOT / 'CONTRIBUTING.md').read_text()


COMMANDS = [command.text for command in documented()]


def _check_python(words: list[str]) -> None:
  """`words` follow `python`: a script or -m module, then its flags."""
  if words[:2] == ['-m', 'pytest']:
    assert all((ROOT / path).exists() for path in words[2:])
    return
  if words[:2] == ['-m', 'build'] or words == ['exported/run_export.py']:
    return  # tests/test_release.py and test_commands.py run them.
  if words[0] == '-m':
    path = ROOT / f'{words[1].replace(".", "/")}.py'
  else:
    path = ROOT / words[0]
  package = ROOT / 'resnest_jax'
  files = [path, package / 'host_join.py']
  files += [package / 'config.py', package / 'flags.py']
  if path.stem == 'prepare':  # Each of its data sets adds flags.
    files += sorted(path.parent.glob('*.py'))
  source = ''.join(file.read_text() for file in files)
  overrides = {}
  for word in words[1:]:
    flag, _, value = word.partition('=')
    if flag.startswith('--config.'):
      overrides[flag.removeprefix('--config.')] = value
    elif flag.startswith('--'):
      assert f"'{flag}'" in source, f'{path.name} has no flag {flag}'
  if '--config' in words:
    load_config(ROOT / words[words.index('--config') + 1], overrides)


@pytest.mark.parametrize('command', COMMANDS)
def test_command_names_what_exists(command):
  program, *words = shlex.split(command)
  program = Path(program).name
  if program == 'make':
    targets = re.findall(r'^([\w-]+):', _makefile(), re.MULTILINE)
    assert set(words) <= set(targets)
  elif program == 'pip':
    assert words[0] == 'install'
    if words[1] == '-r':
      assert (ROOT / words[2]).is_file()
    elif words[1][0] == '.':
      extras = set(re.findall(r'\w+', words[1]))
      assert extras <= _project()['optional-dependencies'].keys()
    else:  # Optional packages, by name.
      command = ' '.join(['pip', *words])
      fixed = (TORCH_INSTALL, INSTALL_JAX2ONNX)
      assert command in fixed or set(words[1:]) <= _packages()
  elif program == 'ruff':
    assert words[0] in ('format', 'check')
  elif program == 'resnest-jax':
    _check_python([f'{words[0]}.py', *words[1:]])
  else:
    _check_python(words)


def _packages() -> set[str]:
  """Names of what is needed always, for exports, or for the page."""
  project = _project()
  extras = project['optional-dependencies']
  needed = project['dependencies'] + extras['export'] + extras['demo']
  return {re.match(r'[\w-]+', each)[0] for each in needed}


def _project() -> dict:
  return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def _makefile() -> str:
  return (ROOT / 'Makefile').read_text()


def test_the_commands_are_found():
  found = set(COMMANDS)
  assert {'make demo', 'make test', TORCH_INSTALL, INSTALL_JAX2ONNX} <= found
  pins = (ROOT / 'requirements-onnx.txt').read_text().splitlines()
  assert INSTALL_JAX2ONNX.split()[-1] in pins
  for script in ('train.py', 'eval.py', '-m resnest_jax.data.prepare'):
    assert any(x.startswith(f'python {script} ') for x in found), script


def test_table_says_which_rows_have_a_config():
  cells = r'^\| ((?:cityscapes|ade20k)_\w+) \| (\w+) \|'
  rows = dict(re.findall(cells, README, re.MULTILINE))
  assert len(rows) == 8
  files = {path.stem for path in (ROOT / 'configs').glob('*.py')}
  assert {name for name, config in rows.items() if config == 'yes'} == (
    files - {'common', 'folder'}
  )


def test_links_lead_somewhere():
  links = re.findall(r'\]\(([^)#]+)\)', README + CONTRIBUTING)
  missing = [x for x in links if '://' not in x and not (ROOT / x).exists()]
  assert links
  assert missing == []
