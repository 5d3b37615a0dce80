"""Commands of README, CONTRIBUTING, docs and Makefile are accepted.

Each is parsed by the program that it names, in this process; its configuration
is loaded. The Python of two pages is run after the commands that it needs.
"""

import argparse
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from evaluation.runs import OVERRIDES, write_run
from pages import ROOT, blocks_of, commands_of, inside, run_python
from PIL import Image

import resnest_jax as rj
from resnest_jax.__main__ import MODULES, SCRIPTS
from resnest_jax.config import load_config
from resnest_jax.export.checks import INSTALL_JAX2ONNX
from resnest_jax.weights.pickles import TORCH_INSTALL

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md']
PAGES += sorted((ROOT / 'docs').rglob('*.md'))
MAKEFILE = (ROOT / 'Makefile').read_text()
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def recipes():
  """What `make demo` and `make bench` start."""
  (mini,) = re.findall(r'^MINI := (.+)$', MAKEFILE, re.MULTILINE)
  lines = re.findall(r'^\t\$\(PY\) (.+\$\(MINI\).*)$', MAKEFILE, re.MULTILINE)
  assert len(lines) == 3
  return [f'python {line.replace("$(MINI)", mini)}' for line in lines]


DOCUMENTED = list(dict.fromkeys(x for page in PAGES for x in commands_of(page)))


class Accepted(Exception):
  """The flags were parsed."""


def check_flags(words, monkeypatch):
  """`words` follow `python`; the flags are parsed, the configuration loaded."""
  parse = argparse.ArgumentParser.parse_args

  def accept(*arguments, **options):
    parse(*arguments, **options)
    raise Accepted

  monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', accept)
  number = 2 if words[0] == '-m' else 1
  flags = words[number:]
  if not flags:  # Named only.
    words = [*words, '--help']
  with pytest.raises(Accepted if flags else SystemExit):
    run_python(words, monkeypatch)
  if '--config' in flags:
    given = [x[9:].split('=', 1) for x in flags if x.startswith('--config.')]
    load_config(flags[flags.index('--config') + 1], dict(given))


def packages():
  """Names of what is needed always, for exports, or for the page."""
  extras = PROJECT['optional-dependencies']
  needed = PROJECT['dependencies'] + extras['export'] + extras['demo']
  names = {re.match(r'[\w-]+', each)[0] for each in needed}
  return names | {'tensorboard'}  # It reads what training writes.


@pytest.mark.parametrize('command', [*DOCUMENTED, *recipes()])
def test_command_is_accepted(command, monkeypatch):
  program, *words = shlex.split(command)
  if program == 'make':
    targets = re.findall(r'^([\w-]+):', MAKEFILE, re.MULTILINE)
    assert set(words) <= set(targets)
  elif program == 'pip' and words[1] == '-r':
    assert (ROOT / words[2]).is_file()
  elif program == 'pip' and words[1][0] == '.':
    extras = set(re.findall(r'\w+', words[1]))
    assert extras <= PROJECT['optional-dependencies'].keys()
  elif program == 'pip':  # Optional packages, by name.
    fixed = command in (TORCH_INSTALL, INSTALL_JAX2ONNX)
    assert words[0] == 'install'
    assert fixed or set(words[1:]) <= packages()
  elif program == 'ruff':
    assert words[0] in ('format', 'check')
  elif program == 'resnest-jax':
    name, *flags = words
    if name in MODULES:
      program = '-m', f'resnest_jax.{MODULES[name][0]}'
    else:
      assert name in SCRIPTS
      program = (f'{name}.py',)
    check_flags([*program, *flags], monkeypatch)
  elif words[:2] == ['-m', 'pytest']:
    assert all((ROOT / path).exists() for path in words[2:])
  elif words[0].startswith('notebooks/'):
    assert (ROOT / words[0]).is_file()
  elif words[:2] != ['-m', 'build'] and words[0] != 'exported/run_export.py':
    check_flags(words, monkeypatch)


def test_the_commands_are_found():
  examples = ('make test', 'python notebooks/run.py')
  assert {*examples, TORCH_INSTALL, INSTALL_JAX2ONNX} <= set(DOCUMENTED)
  pins = (ROOT / 'requirements-onnx.txt').read_text().splitlines()
  assert INSTALL_JAX2ONNX.split()[-1] in pins


# ---- Pages that are followed ------------------------------------------------


@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
  """A folder with a run of random weights."""
  folder = tmp_path_factory.mktemp('workshop')
  small = OVERRIDES | {'model.head': 'fcn', 'model.radix': 1}
  write_run(folder / 'runs/first', small)
  for name in ('runs/pspnet', 'runs/city', 'ade20k_pspnet'):
    (folder / name).symlink_to(folder / 'runs/first')
  (folder / 'docs').symlink_to(ROOT / 'docs')
  shutil.copy(ROOT / 'docs/images/street.jpg', folder)
  with inside(folder) as monkeypatch:
    yield monkeypatch


def run_command(page, part, monkeypatch):
  """Runs the command with this part; returns its --out."""
  (command,) = (x for x in commands_of(ROOT / 'docs' / page) if part in x)
  words = shlex.split(command)[1:]
  run_python(words, monkeypatch)
  return Path(words[words.index('--out') + 1])


@pytest.mark.long
def test_first_steps_end_with_the_classes_of_a_picture(workshop):
  run_command('start.md', 'python export.py --weights runs/first', workshop)
  (block,) = blocks_of('start.md')
  exec(block, {})  # Its file is run_export.py.
  picture = Image.open('docs/images/street.jpg')
  exported = np.asarray(Image.open('exported/labels.png'))
  model = rj.from_checkpoint('runs/first', image_scale=(176, 128))
  same = model.predict(picture.resize((176, 128))).labels
  assert (exported == same).mean() > 0.999


@pytest.mark.parametrize(
  'protocol',
  [
    {'name': 'slide', 'crop': [769, 769], 'stride': [513, 513]},
    {'name': 'ms_flip_0x', 'scales': [0.75, 1, 1.25]},
  ],
)
def test_protocols_of_the_page_on_prediction(workshop, protocol):
  part = f'--protocol {protocol["name"]}'
  out = run_command('prediction.md', part, workshop)
  found = json.loads((out / 'predictions.json').read_text())['protocol']
  assert found.items() >= protocol.items()


def test_python_of_the_page_on_prediction(workshop, capsys):
  """Its blocks as printed: a picture, many, a stream."""
  one, many = blocks_of('prediction.md')
  names = {}
  exec(one, names)
  shown = []
  names |= {'paths': ['street.jpg', 'nowhere.jpg'], 'show': shown.append}
  names['frames'] = [np.asarray(Image.open('street.jpg'))] * 2
  exec(many, names)
  assert 'nowhere.jpg' in capsys.readouterr().out
  expected = names['prediction'].overlay()
  np.testing.assert_array_equal(shown, [expected, expected])
