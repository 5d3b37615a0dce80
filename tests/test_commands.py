"""Every documented command is run by a test, or says what it needs.

Some are run here, in one process, on a tiny network. Of the others a table
names the tests that run their program, and one of these has to give it all the
flags that the documentation gives. What can be run by neither stands behind a
comment: `<!-- needs: ADE20K -->`.
"""

import ast
import functools
import importlib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from documented import Command, documented
from evaluation.runs import OVERRIDES, write_run
from PIL import Image

import resnest_jax as rj
from resnest_jax.weights.files import read_weights

ROOT = Path(__file__).resolve().parent.parent
START = ROOT / 'docs' / 'start.md'
NEEDS = {
  *('ADE20K', 'Cityscapes', 'data of your own', 'a network'),
  *('a GPU', 'a TPU', 'several devices', 'several hosts'),
  *('an account of Weights & Biases', 'minutes of two cores', 'an hour'),
}
# Program -> tests that run it; of benchmarks/NAME.py benchmarks/test_NAME.py.
RUN_BY = {
  'train.py': ('test_train.py', 'test_hosts.py'),
  'eval.py': ('evaluation/test_eval.py',),
  'predict.py': ('evaluation/test_pictures.py',),
  'export.py': ('export/test_folder.py', 'export/test_renew.py'),
  'resnest_jax.demo': ('evaluation/test_demo_page.py',),
  'resnest_jax.data.doctor': ('data/test_doctor_command.py',),
  'resnest_jax.data.prepare': (
    *('conftest.py', 'data/test_ade20k.py', 'data/test_cityscapes.py'),
    *('data/test_palette2id.py', 'data/test_pixels.py'),
  ),
  'resnest_jax.evaluation.submission': ('evaluation/test_submission.py',),
  'resnest_jax.weights.convert': ('weights/test_convert.py',),
  'notebooks/address.py': ('test_notebooks.py',),
  'build': ('test_release.py',),
}
# Commands without flags to look for, and what runs them.
ELSEWHERE = {
  'make venv': '.ci/run, through make test',
  'make test': '.ci/run',
  'make test-long': '.ci/run',
  'make test-oldest': '.ci/run',
  'make lint': '.ci/run, through make test',
  'make docs': 'tests/test_site.py, its command',
  'python notebooks/run.py': 'tests/test_notebooks.py, cell by cell',
  'make demo': 'test_recipes_of_the_makefile',
  'make bench': 'test_recipes_of_the_makefile',
  'pip install -r requirements.txt': 'make venv',
  'pip install .': 'tests/test_release.py, the wheel of it',
  'pip install flatbuffers': 'make test, in requirements-test.txt',
  'ruff format .': 'make lint, with --check',
  'ruff check --fix .': 'make lint, without --fix',
  'python -m pytest tests/test_configs.py': 'make test',
}
# Run here, with the run of a tiny network for theirs; and the block of START.
HERE = (
  'python predict.py holiday --recursive ',
  "python predict.py 'trip/**/*.jpg' drive.mp4 ",
  'python predict.py street.jpg --weights runs/city ',
  'python predict.py street.jpg --weights ade20k_pspnet --out best ',
  'python -m resnest_jax.weights.convert runs/pspnet --out backbone --to timm ',
  'python predict.py docs/images/street.jpg ',
  'python export.py --weights runs/first ',
  'python exported/run_export.py',
)
RUN = 'runs/first'
RUNS = ('ade20k_pspnet', 'runs/city', 'runs/pspnet')
SMALL = OVERRIDES | {'model.head': 'fcn', 'model.radix': 1}


def split(command: Command) -> tuple[str, list[str]]:
  """The script or module that it runs, and its flags by name."""
  program, *words = command.words
  if program == 'resnest-jax':
    program, words = f'{words[0]}.py', words[1:]
  elif program == 'python':
    program, *words = words[1:] if words[0] == '-m' else words
  flags = [word.partition('=')[0] for word in words]
  return program, [flag for flag in flags if flag.startswith('--')]


@functools.cache
def written_in(path: str) -> tuple[str, set[str]]:
  """A test's source, and the words of its strings, also without `=...`."""
  source = (ROOT / 'tests' / path).read_text('utf-8')
  constants = [
    node.value
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  ]
  words = {word for constant in constants for word in constant.split()}
  return source, words | {word.partition('=')[0] for word in words}


def runs(path: str, program: str, flags: list[str]) -> bool:
  """Whether this test runs the program, and gives it these flags."""
  source, words = written_in(path)
  module = program.rpartition('.')[2]
  is_called = re.search(rf'\b{module}\.main\(', source) is not None
  if not is_called and not any(program in word for word in words):
    return False
  # A key may be given as such to a helper: {'eval.boundary_iou': True}.
  given = words | {f'--config.{word}' for word in words}
  return given.issuperset(flags)


def who_runs(command: Command) -> str | None:
  """What runs it, or what it needs; None: neither is known."""
  plain = ' '.join(command.words)
  if command.needs:
    return f'needs {command.needs}'
  if plain in ELSEWHERE:
    return ELSEWHERE[plain]
  if command.text.startswith(HERE):
    return 'this module'
  program, flags = split(command)
  tests = RUN_BY.get(program, ())
  if program.startswith('benchmarks/'):
    tests = (program.replace('/', '/test_'),)
  for path in tests:
    if runs(path, program, flags):
      return path
  return None


@pytest.mark.parametrize('command', documented(), ids=lambda x: x.text)
def test_command_is_run_or_says_what_it_needs(command):
  assert command.needs is None or command.needs in NEEDS
  assert who_runs(command), 'run it in a test, or mark it in the page'


def test_recipes_of_the_makefile():
  """What `make demo` and `make bench` start is run by tests like the rest."""
  makefile = (ROOT / 'Makefile').read_text()
  (mini,) = re.findall(r'^MINI := (.+)$', makefile, re.MULTILINE)
  recipes = re.findall(r'^\t\$\(PY\) (.+\$\(MINI\).*)$', makefile, re.MULTILINE)
  assert len(recipes) == 3
  for recipe in recipes:
    command = Command(f'python {recipe.replace("$(MINI)", mini)}', None)
    assert who_runs(command), command.text
  build = ' -m mkdocs build --strict\n'
  assert build in makefile
  assert (
    "'mkdocs', 'build', '--quiet', '--strict'"
    in (ROOT / 'tests' / 'test_site.py').read_text()
  )


def run_here(command: Command, monkeypatch) -> None:
  """In this process and the working folder, with the run that is there."""
  program, *words = command.words[1:]
  if program == '-m':
    program, *words = words
  words = [RUN if word in RUNS else word for word in words]
  shutil.rmtree(words[words.index('--out') + 1], ignore_errors=True)
  monkeypatch.setattr(sys, 'argv', [program, *words])
  if program.endswith('.py'):
    runpy.run_path(str(ROOT / program))['main']()
  else:
    importlib.import_module(program).main()


@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
  """docs/start.md with a run of random weights, up to the export that runs."""
  folder = tmp_path_factory.mktemp('workshop')
  write_run(folder / RUN, SMALL)
  (folder / 'docs').symlink_to(ROOT / 'docs')
  steps = [x for x in documented([START]) if x.text.startswith(HERE)]
  *steps, last = steps
  assert [split(step)[0] for step in steps] == ['predict.py', 'export.py']
  assert last.text == 'python exported/run_export.py'
  (block,) = re.findall(r'```python\n(.*?)```', START.read_text(), re.DOTALL)
  quick = 'jax_disable_most_optimizations'
  jax.config.update(quick, True)
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.chdir(folder)
    for step in steps:
      run_here(step, monkeypatch)
    exec(block, {})  # Its file is run_export.py.
    yield folder
  jax.config.update(quick, False)


@pytest.mark.long
def test_first_steps_end_with_the_classes_of_a_picture(workshop):
  picture = Image.open(workshop / 'docs/images/street.jpg')
  mask = np.asarray(Image.open(workshop / 'predictions/street.png'))
  assert mask.shape == picture.size[::-1]
  exported = np.asarray(Image.open(workshop / 'labels.png'))
  assert exported.shape == (128, 176)
  model = rj.from_checkpoint(workshop / RUN, image_scale=(176, 128))
  same = model.predict(picture.resize((176, 128))).labels
  assert (exported == same).mean() > 0.999


@pytest.fixture
def here(workshop, monkeypatch):
  """Runs one of HERE, by its beginning, with files of the names that it has."""
  monkeypatch.chdir(workshop)
  street = ROOT / 'docs/images/street.jpg'
  for name in ('street.jpg', 'holiday/a.jpg', 'holiday/sea/b.jpg'):
    (workshop / name).parent.mkdir(exist_ok=True)
    shutil.copy(street, workshop / name)
  shutil.copytree(workshop / 'holiday', workshop / 'trip', dirs_exist_ok=True)
  video = cv2.VideoWriter(
    'drive.mp4', cv2.VideoWriter_fourcc(*'mp4v'), 5, (256, 192)
  )
  for _ in range(2):
    video.write(cv2.imread(str(street)))
  video.release()

  def run(beginning):
    (command,) = (x for x in documented() if x.text.startswith(beginning))
    run_here(command, monkeypatch)

  return run


def names_in(folder: str) -> set[str]:
  paths = Path(folder).rglob('*_overlay.*')
  return {path.relative_to(folder).as_posix() for path in paths}


def test_folders_patterns_and_videos(here):
  here(HERE[0])
  assert names_in('predictions') == {'a_overlay.png', 'sea/b_overlay.png'}
  here(HERE[1])
  assert names_in('predictions') == {
    *('a_overlay.png', 'sea/b_overlay.png', 'drive_overlay.mp4')
  }


@pytest.mark.parametrize(
  ('beginning', 'out', 'protocol'),
  [
    (
      HERE[2],
      'predictions',
      {'name': 'slide', 'crop': [769, 769], 'stride': [513, 513]},
    ),
    (HERE[3], 'best', {'name': 'ms_flip_0x', 'scales': [0.75, 1, 1.25]}),
  ],
)
def test_protocols(beginning, out, protocol, here):
  here(beginning)
  about = json.loads(Path(out, 'predictions.json').read_text())
  found = about['protocol']
  assert {key: found[key] for key in protocol} == protocol
  assert names_in(out) == {'street_overlay.png'}


def test_backbone_for_timm(here):
  here(HERE[4])
  names = read_weights('backbone').state_dict.keys()
  assert {'conv1.0.weight', 'layer4.0.conv2.conv.weight'} <= names
  assert not any(name.startswith(('decode', 'aux', 'head')) for name in names)


def test_python_of_the_page_on_prediction(here, workshop, capsys):
  """Its blocks as printed: a picture, many, a stream."""
  (workshop / 'runs/pspnet').symlink_to(workshop / RUN)
  page = (ROOT / 'docs' / 'prediction.md').read_text()
  one, many = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  names = {}
  exec(one, names)
  labels = names['prediction'].labels
  assert labels.shape == (192, 256)
  frame = np.asarray(Image.open('street.jpg'))
  shown = []
  names |= {'paths': ['street.jpg', 'nowhere.jpg'], 'frames': [frame] * 2}
  exec(many, names | {'show': shown.append})
  assert 'nowhere.jpg' in capsys.readouterr().out
  expected = names['prediction'].overlay()
  assert len(shown) == 2
  for overlay in shown:
    np.testing.assert_array_equal(overlay, expected)
