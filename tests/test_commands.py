"""Commands of README, CONTRIBUTING, docs and Makefile are accepted."""

import argparse
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from evaluation.class_runs import write_weights
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
CLASSIFY = ROOT / 'docs/classify.md'
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


(MINI,) = re.findall(r'^MINI := (.+)$', MAKEFILE, re.MULTILINE)
# What `make demo` and `make bench` start.
RECIPES = re.findall(r'^\t\$\(PY\) (.+\$\(MINI\).*)$', MAKEFILE, re.MULTILINE)
RECIPES = [f'python {line.replace("$(MINI)", MINI)}' for line in RECIPES]
EXTRAS = PROJECT['optional-dependencies']
# What is needed always, for exports, or for the page. TensorBoard reads what
# training writes.
NEEDED = PROJECT['dependencies'] + EXTRAS['export'] + EXTRAS['demo']
PACKAGES = {re.match(r'[\w-]+', x)[0] for x in (*NEEDED, 'tensorboard')}
# Programs that are not ours, and one that a page writes.
OTHERS = ['-m', 'build'], ['-m', 'http.server'], ['exported/run_export.py']
DOCUMENTED = list(dict.fromkeys(x for page in PAGES for x in commands_of(page)))


def check_flags(words, monkeypatch):
  """`python WORDS`: the flags are parsed, the configuration is loaded."""
  parse = argparse.ArgumentParser.parse_args

  def accept(*arguments, **options):
    parse(*arguments, **options)
    raise SystemExit('accepted')

  monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', accept)
  flags = words[2 if words[0] == '-m' else 1 :]
  # A program that is named only has to have help.
  with pytest.raises(SystemExit, match=r'^accepted$' if flags else r'^0$'):
    run_python(words if flags else [*words, '--help'], monkeypatch)
  if '--config' in flags:
    given = [x[9:].split('=', 1) for x in flags if x.startswith('--config.')]
    load_config(flags[flags.index('--config') + 1], dict(given))


@pytest.mark.parametrize('command', [*DOCUMENTED, *RECIPES])
def test_command_is_accepted(command, monkeypatch):
  program, *words = shlex.split(command)
  if program == 'make':
    assert {*words} <= {*re.findall(r'^([\w-]+):', MAKEFILE, re.MULTILINE)}
  elif program == 'pip' and words[1] == '-r':
    assert (ROOT / words[2]).is_file()
  elif program == 'pip' and words[1][0] == '.':
    assert {*re.findall(r'\w+', words[1])} <= EXTRAS.keys()
  elif program == 'pip':  # Optional packages, by name.
    assert words[0] == 'install'
    fixed = command in (TORCH_INSTALL, INSTALL_JAX2ONNX)
    assert fixed or {*words[1:]} <= PACKAGES
  elif program == 'ruff':
    assert words[0] in ('format', 'check')
  elif program == 'resnest-jax' and words[0] in MODULES:
    module = f'resnest_jax.{MODULES[words[0]][0]}'
    check_flags(['-m', module, *words[1:]], monkeypatch)
  elif program == 'resnest-jax':
    assert words[0] in SCRIPTS
    check_flags([f'{words[0]}.py', *words[1:]], monkeypatch)
  elif words[:2] == ['-m', 'pytest']:
    assert all((ROOT / path).exists() for path in words[2:])
  elif words[0].startswith('notebooks/'):
    assert (ROOT / words[0]).is_file()
  elif words[:2] not in OTHERS:
    check_flags(words, monkeypatch)


def test_the_commands_are_found():
  assert len(RECIPES) == 3
  examples = ('make test', 'python notebooks/run.py')
  assert {*examples, TORCH_INSTALL, INSTALL_JAX2ONNX} <= set(DOCUMENTED)
  pins = (ROOT / 'requirements-onnx.txt').read_text().splitlines()
  assert INSTALL_JAX2ONNX.split()[-1] in pins


# ---- Pages that are followed ------------------------------------------------


@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
  """A folder with a run of random weights."""
  folder = tmp_path_factory.mktemp('workshop')
  small = {'model.head': 'fcn', 'model.radix': 1}
  write_run(folder / 'runs/first', OVERRIDES | small)
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


SLIDE = {'name': 'slide', 'crop': [769, 769], 'stride': [513, 513]}
SCALES = {'name': 'ms_flip_0x', 'scales': [0.75, 1, 1.25]}


@pytest.mark.parametrize('protocol', [SLIDE, SCALES])
def test_protocols_of_the_page_on_prediction(workshop, protocol):
  part = f'--protocol {protocol["name"]} --s'
  out = run_command('prediction.md', part, workshop)
  found = json.loads((out / 'predictions.json').read_text())['protocol']
  assert found.items() >= protocol.items()


def test_python_of_the_page_on_prediction(workshop, capsys):
  """Its blocks as printed: a picture, many, a stream."""
  classes, one, many = blocks_of('prediction.md')
  write_weights('resnest50')  # Stands in for the published file.
  exec(classes, names := {})
  top = names['found'].top(3)
  assert capsys.readouterr().out == f'{top}\n'
  assert top[0][1] == names['found'].probabilities.max()
  exec(one, names := {})
  shown = []
  names |= {'paths': ['street.jpg', 'nowhere.jpg'], 'show': shown.append}
  names['frames'] = [np.asarray(Image.open('street.jpg'))] * 2
  exec(many, names)
  assert 'nowhere.jpg' in capsys.readouterr().out
  expected = names['prediction'].overlay()
  np.testing.assert_array_equal(shown, [expected, expected])


COLOURS = {'blue': (40, 60, 200), 'green': (50, 180, 60), 'red': (210, 40, 50)}


@pytest.mark.long
def test_a_folder_of_classes_becomes_a_program(tmp_path):
  """The four commands of the page, with a network that needs no weights."""
  rng, commands = np.random.default_rng(3), commands_of(CLASSIFY)
  commands = [x for x in commands if 'runs/own' in x]
  assert len(commands) == 4
  commands[0] = commands[0].replace('folder.py', 'folder.py:mini')
  flags = {'train.total_steps': 60, 'optimizer.warmup_steps': 10}
  commands[0] += ''.join(f' --config.{k}={v}' for k, v in flags.items())
  with inside(tmp_path) as monkeypatch:
    for i in range(30):
      for name, colour in COLOURS.items():
        noise = rng.normal(colour, 60, (80, 100, 3)).clip(0, 255)
        path = Path('mydata', name, f'{i}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.astype(np.uint8)).save(path)
    shutil.copytree('mydata/red', 'holiday')
    for command in commands:
      run_python(shlex.split(command)[1:], monkeypatch)
    (scores,) = Path('runs/own/eval').rglob('metrics.json')
    scores = json.loads(scores.read_text())
    assert (scores['images'], scores['top1']) == (18, 1)
    found = json.loads(Path('predictions/predictions.json').read_text())
    best = [x['best'][0]['class'] for x in found['predictions']]
    assert best == 30 * ['red']
    program = onnxruntime.InferenceSession('exported/model_64x64.onnx')
    picture = np.asarray(Image.open('mydata/blue/0.png'))[8:72, 18:82]
    (shares,) = program.run(None, {'images': picture[None]})
    assert shares.argmax() == 0
