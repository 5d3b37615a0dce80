"""docs/own-data.md: its commands, run in their order on a small garden."""

import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from data import annotated
from data.garden import COLOURS, Garden, rgb
from pages import ROOT, blocks_of, commands_of, inside, run_python
from small import RUN, small_flags

from resnest_jax.config import load_config
from resnest_jax.data.datasets import open_data
from resnest_jax.data.own.classes import read_classes
from resnest_jax.errors import UserError
from resnest_jax.weights.pretrained import load_weights

pytestmark = pytest.mark.long

PAGE = ROOT / 'docs' / 'own-data.md'
FOLDER = ROOT / 'configs' / 'folder.py'
COMMANDS = commands_of(PAGE)
CLASSES = blocks_of(PAGE.name, 'text')
NAMES = ('background', 'leaf', 'flower')
SMALL = RUN | {'model.head': 'fcn', 'model.radix': 1, 'eval.overlays': 2}
SMALL |= {'train.total_steps': 4, 'train.log_steps': 2}
SMALL |= {'data.crop_size': (64, 64), 'data.skip_unreadable': True}
# A trial as the page describes it: published weights are large and far away.
TRIAL = {
  'configs/folder.py': ['configs/folder.py:mini', *small_flags(SMALL)],
  '--config.pretrained=resnest101_d2': [],
}


def run_trial(command, monkeypatch, *flags):
  """Runs a command of the page; returns what it prints."""
  words = shlex.split(command)[1:]
  words = [x for word in words for x in TRIAL.get(word, [word])]
  with contextlib.redirect_stdout(io.StringIO()) as said:
    run_python([*words, *flags], monkeypatch)
  return said.getvalue()


def own_split(folder, name):
  config = load_config(FOLDER, {'data.data_dir': str(folder / 'mydata')})
  return open_data(config.data, name)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """After the last command; what all have printed is in the file `said`."""
  folder = tmp_path_factory.mktemp('garden')
  samples = [f'{"bed/" if i % 2 else ""}{i}' for i in range(12)]
  garden = Garden(folder / 'mydata', samples)
  garden.classes(CLASSES[0])
  garden.write(rgb)
  (folder / 'mydata' / 'masks').rename(folder / 'mydata' / 'coloured')
  annotated.WRITERS['cvat'](folder / 'export')
  (folder / 'configs').symlink_to(ROOT / 'configs')
  shutil.copytree(folder / 'mydata/images/bed', folder / 'new_photographs')
  with inside(folder) as monkeypatch, (folder / 'said').open('w') as said:
    for command in COMMANDS:
      if ' train.py ' in command:  # Cuts off a photograph.
        path = Path(own_split(folder, 'train').pairs[0].image)
        path.write_bytes(path.read_bytes()[:-100])
      said.write(run_trial(command, monkeypatch))
  return folder


def test_its_classes_files_can_be_read(tmp_path):
  found = []
  for text in CLASSES:
    (tmp_path / 'classes.txt').write_text(text)
    found.append(read_classes(tmp_path / 'classes.txt').values)
  assert found == [((0,), (1,), (2,)), ((1,), (2, 3)), ((0,), (255,))]


def test_its_flags_are_keys_and_the_defaults_are_those():
  page = PAGE.read_text()
  flags = re.findall(r'`--config\.([\w.]+)=([^ `]+)', page)
  assert len(flags) > 10
  for key, value in flags:
    load_config(FOLDER, {key: value})
  (table,) = re.findall(r'with their defaults:\n\n(.*?)\n\n', page, re.DOTALL)
  defaults = re.findall(r'--config\.([\w.]+)=([^`]+)', table)
  assert load_config(FOLDER, dict(defaults)) == load_config(FOLDER)


def test_the_doctor_finds_nothing(folder):
  report = json.loads((folder / 'doctor' / 'doctor.json').read_text())
  assert report['findings'] == []


def test_training_says_which_photograph_it_leaves_out(folder):
  name = Path(own_split(folder, 'train').pairs[0].image).name
  said = (folder / 'said').read_text()
  assert re.search(rf'unreadable sample.*{name}.*cannot be decoded', said)


@pytest.mark.parametrize('form', annotated.WRITERS)
def test_annotations_become_a_trained_network(tmp_path, form):
  """The page's first command, those that it prints, and the page's scores."""
  annotated.WRITERS[form](tmp_path / 'export')
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  (scores,) = (x for x in COMMANDS if ' eval.py ' in x)
  with inside(tmp_path) as monkeypatch:
    said = run_trial(COMMANDS[0], monkeypatch)
    for command in (*re.findall(r'\n  (python .*)', said), scores):
      run_trial(command, monkeypatch)
  assert (tmp_path / 'doctor' / 'doctor.png').exists()
  (path,) = tmp_path.glob('runs/own/eval/4-val/metrics.json')
  found = [x['pixels'] for x in json.loads(path.read_text())['per_class']]
  names = [x for x in annotated.SAMPLES if x.startswith('val')]
  labels = [annotated.expected(x, form).ravel() for x in names]
  assert found == np.bincount(np.concatenate(labels), minlength=3).tolist()


def test_scores_are_of_the_drawn_split(folder):
  (path,) = folder.glob('runs/own/eval/4-val/metrics.json')
  result = json.loads(path.read_text())
  assert [entry['class'] for entry in result['per_class']] == list(NAMES)
  split = own_split(folder, 'val')
  labels = np.concatenate([sample['label'].ravel() for sample in split])
  pixels = [entry['pixels'] for entry in result['per_class']]
  assert pixels == np.bincount(labels, minlength=3).tolist()


def test_predictions_and_weights_have_the_classes_and_colours(folder):
  listed = read_classes(folder / 'predictions' / 'classes.json').labels
  weights = load_weights(folder / 'weights' / 'own')
  for found in (listed, weights):
    assert tuple(found.classes) == NAMES
    np.testing.assert_array_equal(found.palette, COLOURS)
  for path in (folder / 'new_photographs').iterdir():
    mask = folder / 'predictions' / f'{path.stem}.png'
    predicted = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
    assert predicted.shape == (40, 60)
    assert predicted.max() < 3


def test_a_run_is_not_scored_with_other_classes(folder):
  """Renamed or reordered ones would turn a score into another."""
  (folder / 'mydata' / 'other.txt').write_text('\n'.join(NAMES[::-1]))
  (command,) = (x for x in COMMANDS if ' eval.py ' in x)
  flag = '--config.data.folder.classes=other.txt'
  with inside(folder) as patch, pytest.raises(UserError, match='flower now'):
    run_trial(command, patch, flag)
