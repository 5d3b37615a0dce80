"""Commands of README, CONTRIBUTING, docs and Makefile are accepted.

Each is parsed by the program that it names, in this process; its configuration
is loaded. Two pages are followed from their first command to their last.
"""

import argparse
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from evaluation.runs import OVERRIDES, write_run
from markdown_it import MarkdownIt
from PIL import Image

import resnest_jax as rj
from resnest_jax.__main__ import COMMANDS
from resnest_jax.config import load_config
from resnest_jax.export.checks import INSTALL_JAX2ONNX
from resnest_jax.weights.files import TORCH_INSTALL

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md']
PAGES += sorted((ROOT / 'docs').rglob('*.md'))
MAKEFILE = (ROOT / 'Makefile').read_text()
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
PROGRAM = re.compile(r'(\.venv/bin/)?(python|pip|make|ruff|resnest-jax)\s')


def commands_of(page):
  """The lines of its blocks and its inline code that run a program."""
  found = []
  for token in MarkdownIt('commonmark').enable('table').parse(page.read_text()):
    is_fence = token.type == 'fence' and token.info in ('', 'bash')
    if token.type == 'code_block' or is_fence:
      found += token.content.replace('\\\n', ' ').splitlines()
    elif token.type == 'inline':
      codes = [x for x in token.children if x.type == 'code_inline']
      found += [code.content for code in codes]
  return [x.removeprefix('.venv/bin/') for x in found if PROGRAM.match(x)]


def recipes():
  """What `make demo` and `make bench` start."""
  (mini,) = re.findall(r'^MINI := (.+)$', MAKEFILE, re.MULTILINE)
  lines = re.findall(r'^\t\$\(PY\) (.+\$\(MINI\).*)$', MAKEFILE, re.MULTILINE)
  assert len(lines) == 3
  return [f'python {line.replace("$(MINI)", mini)}' for line in lines]


DOCUMENTED = list(dict.fromkeys(x for page in PAGES for x in commands_of(page)))


class Accepted(Exception):
  """The flags were parsed."""


def run_here(program, words, monkeypatch):
  """Runs a script or a module, `-m NAME`, in this process."""
  if program == '-m':
    program, *words = words
  monkeypatch.setattr(sys, 'argv', [program, *words])
  if program.endswith('.py'):
    runpy.run_path(str(ROOT / program))['main']()
  else:
    module = importlib.import_module(program)
    if hasattr(module, '__path__'):  # A package: `python -m` runs __main__.
      module = importlib.import_module(f'{program}.__main__')
    module.main()


def check_flags(words, monkeypatch):
  """`words` follow `python`: a script or module, then its flags."""
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
    run_here(words[0], words[1:], monkeypatch)
  if '--config' in flags:
    given = [x[9:].split('=', 1) for x in flags if x.startswith('--config.')]
    load_config(ROOT / flags[flags.index('--config') + 1], dict(given))


def packages():
  """Names of what is needed always, for exports, or for the page."""
  extras = PROJECT['optional-dependencies']
  needed = PROJECT['dependencies'] + extras['export'] + extras['demo']
  return {re.match(r'[\w-]+', each)[0] for each in needed}


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
    assert words[0] in COMMANDS
    check_flags([f'{words[0]}.py', *words[1:]], monkeypatch)
  elif words[:2] == ['-m', 'pytest']:
    assert all((ROOT / path).exists() for path in words[2:])
  elif words[0].startswith('notebooks/'):
    assert (ROOT / words[0]).is_file()
  elif words[:2] != ['-m', 'build'] and words[0] != 'exported/run_export.py':
    check_flags(words, monkeypatch)


def test_the_commands_are_found():
  found = set(DOCUMENTED)
  assert {'make demo', 'make test', TORCH_INSTALL, INSTALL_JAX2ONNX} <= found
  pins = (ROOT / 'requirements-onnx.txt').read_text().splitlines()
  assert INSTALL_JAX2ONNX.split()[-1] in pins
  for script in ('train.py', 'eval.py', '-m resnest_jax.data.prepare'):
    assert any(x.startswith(f'python {script} ') for x in found), script


# ---- Pages that are followed ------------------------------------------------


@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
  """A folder with a run of random weights, compiled quickly."""
  folder = tmp_path_factory.mktemp('workshop')
  small = OVERRIDES | {'model.head': 'fcn', 'model.radix': 1}
  write_run(folder / 'runs/first', small)
  for name in ('runs/pspnet', 'runs/city', 'ade20k_pspnet'):
    (folder / name).symlink_to(folder / 'runs/first')
  (folder / 'docs').symlink_to(ROOT / 'docs')
  shutil.copy(ROOT / 'docs/images/street.jpg', folder)
  quick = 'jax_disable_most_optimizations'
  jax.config.update(quick, True)
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.chdir(folder)
    yield folder
  jax.config.update(quick, False)


def run_command(part, commands, monkeypatch):
  """Runs the one with this part; returns its --out, which it alone fills."""
  (command,) = (x for x in commands if part in x)
  _, program, *words = shlex.split(command)
  out = Path(words[words.index('--out') + 1])
  shutil.rmtree(out, ignore_errors=True)
  run_here(program, words, monkeypatch)
  return out


def blocks_of(page):
  text = (ROOT / 'docs' / page).read_text()
  return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


@pytest.mark.long
def test_first_steps_end_with_the_classes_of_a_picture(workshop, monkeypatch):
  commands = commands_of(ROOT / 'docs/start.md')
  run_command('python predict.py docs/images', commands, monkeypatch)
  run_command('python export.py --weights runs/first', commands, monkeypatch)
  assert 'python exported/run_export.py' in commands
  (block,) = blocks_of('start.md')
  exec(block, {})  # Its file is run_export.py.
  picture = Image.open('docs/images/street.jpg')
  mask = np.asarray(Image.open('predictions/street.png'))
  assert mask.shape == picture.size[::-1]
  exported = np.asarray(Image.open('labels.png'))
  assert exported.shape == (128, 176)
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
def test_protocols_of_the_page_on_prediction(workshop, monkeypatch, protocol):
  commands = commands_of(ROOT / 'docs/prediction.md')
  out = run_command(f'--protocol {protocol["name"]}', commands, monkeypatch)
  found = json.loads((out / 'predictions.json').read_text())['protocol']
  assert found.items() >= protocol.items()
  assert [x.name for x in out.glob('*_overlay.*')] == ['street_overlay.png']


def test_python_of_the_page_on_prediction(workshop, capsys):
  """Its blocks as printed: a picture, many, a stream."""
  one, many = blocks_of('prediction.md')
  names = {}
  exec(one, names)
  assert names['prediction'].labels.shape == (192, 256)
  shown = []
  names |= {'paths': ['street.jpg', 'nowhere.jpg'], 'show': shown.append}
  names['frames'] = [np.asarray(Image.open('street.jpg'))] * 2
  exec(many, names)
  assert 'nowhere.jpg' in capsys.readouterr().out
  expected = names['prediction'].overlay()
  np.testing.assert_array_equal(shown, [expected, expected])
