"""docs/own-data.md: its commands, run in their order on a small garden."""

import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from golden import reference
from numpy.testing import assert_allclose, assert_equal
from small import RUN, small_flags

from resnest_jax.checkpoints.store import load_checkpoint
from resnest_jax.config import load_config
from resnest_jax.data.datasets import open_data
from resnest_jax.data.own.classes import read_classes
from resnest_jax.errors import UserError
from resnest_jax.models.segmentor import create_backbone
from resnest_jax.weights import pretrained
from resnest_jax.weights.files import write_weights
from resnest_jax.weights.infer import Description
from resnest_jax.weights.state_dict import export_state_dict, variable_shapes

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / 'docs' / 'own-data.md').read_text()
COMMANDS = re.findall(r'^    (python .*)$', PAGE, re.MULTILINE)
CLASSES = re.findall(r'```text\n(.*?)```', PAGE, re.DOTALL)
NAMES = ('background', 'leaf', 'flower')
COLOURS = ((60, 60, 60), (34, 139, 34), (220, 20, 60))
SMALL = RUN | {
  **{'model.head': 'fcn', 'model.radix': 1, 'data.crop_size': (64, 64)},
  **{'train.total_steps': 4, 'train.log_steps': 2, 'eval.overlays': 2},
}


def write_garden(folder):
  """Photographs with coloured masks of leaves and flowers, some nested."""
  rng = np.random.default_rng(0)
  for i in range(12):
    ids = np.zeros((64, 64), np.uint8)
    for value in (1, 2):
      centre = tuple(rng.integers(10, 54, 2).tolist())
      cv2.circle(ids, centre, 12, value, cv2.FILLED)
    mask = np.array(COLOURS, np.uint8)[ids][..., ::-1]
    photograph = mask + rng.normal(0, 20, mask.shape)
    for kind, picture in (
      ('images', photograph.clip(0, 255)),
      ('coloured', mask),
    ):
      path = folder / kind / f'{"bed/" if i % 2 else ""}{i}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      cv2.imwrite(str(path), picture.astype(np.uint8))


def write_backbone(folder):
  """Stands for the published weights, which are large and far away."""
  config = load_config(ROOT / 'configs/folder.py:mini', SMALL).model.to_dict()
  config = {k: v for k, v in config.items() if k not in pretrained.HEAD_KEYS}
  model = create_backbone(config)
  variables = reference.filled_variables(variable_shapes(model))
  tensors = export_state_dict(model, variables, 'ours')
  what = Description('backbone', config), None, None, pretrained.NORMALIZATION
  about = pretrained.Weights(tensors, 'ours', *what, {}).about()
  write_weights(folder, 'ours', tensors, about)


def run_command(command, monkeypatch):
  """Runs one of the page in this process, at small size."""
  program, *words = shlex.split(command)[1:]
  if program == '-m':
    program, *words = words
  stands_for = {
    'configs/folder.py': 'configs/folder.py:mini',
    '--config.pretrained=resnest101_d2': '--config.pretrained=backbone',
  }
  words = [stands_for.get(word, word) for word in words]
  if '--config' in words:
    words += small_flags(SMALL | {'data.skip_unreadable': 'true'})
  monkeypatch.setattr(sys, 'argv', [program, *words])
  if program.endswith('.py'):
    runpy.run_path(str(ROOT / program))['main']()
  else:
    importlib.import_module(program).main()


@pytest.fixture(scope='module')
def garden(tmp_path_factory):
  """The page from its first command to its last; folder and what it said."""
  folder = tmp_path_factory.mktemp('garden')
  write_garden(folder / 'mydata')
  (folder / 'mydata' / 'classes.txt').write_text(CLASSES[0])
  (folder / 'configs').symlink_to(ROOT / 'configs')
  write_backbone(folder / 'backbone')
  shutil.copytree(folder / 'mydata/images/bed', folder / 'new_photographs')
  said = {}
  quick = 'jax_disable_most_optimizations'
  jax.config.update(quick, True)
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.chdir(folder)
    for command in COMMANDS:
      if ' train.py ' in command:
        damage_a_photograph(folder)
      lines = []
      monkeypatch.setattr(
        'builtins.print', lambda *x, lines=lines, **_: lines.append(str(x[0]))
      )
      run_command(command, monkeypatch)
      said[command.split()[1 if '-m' not in command else 2]] = lines
  jax.config.update(quick, False)
  return folder, said


def own_split(folder, name):
  changes = {'data.data_dir': str(folder / 'mydata')}
  config = load_config(ROOT / 'configs/folder.py', changes)
  return open_data(config.data, name)


def damage_a_photograph(folder):
  """The first one of the training split is cut off."""
  path = Path(own_split(folder, 'train').pairs[0].image)
  path.write_bytes(path.read_bytes()[:-100])


def test_the_page_has_all_steps():
  words = [shlex.split(command) for command in COMMANDS]
  assert [x[2] if x[1] == '-m' else x[1] for x in words] == [
    *('resnest_jax.data.prepare', 'resnest_jax.data.doctor', 'train.py'),
    *('eval.py', 'predict.py', 'resnest_jax.weights.convert'),
  ]


def test_its_classes_files_can_be_read(tmp_path):
  found = []
  for text in CLASSES:
    (tmp_path / 'classes.txt').write_text(text)
    found.append(read_classes(tmp_path / 'classes.txt').values)
  assert found == [((0,), (1,), (2,)), ((1,), (2, 3)), ((0,), (255,))]


def test_its_flags_are_keys():
  pattern = r'--config\.((?:data|train|optimizer)[\w.]+)=([^\s`]+)'
  flags = re.findall(pattern, PAGE)
  assert len(flags) > 15
  defaults = load_config(ROOT / 'configs/folder.py').to_dict()
  for key, value in flags:
    load_config(ROOT / 'configs/folder.py', {key: value})
  (table,) = re.findall(r'with their defaults:\n\n(.*?)\n\n', PAGE, re.DOTALL)
  for key, value in re.findall(r'--config\.([\w.]+)=([^`]+)', table):
    same = load_config(ROOT / 'configs/folder.py', {key: value})
    assert same.to_dict() == defaults


def read(path):
  return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_masks_became_indices(garden):
  data = garden[0] / 'mydata'
  for name in ('0.png', 'bed/11.png'):
    coloured = read(data / 'coloured' / name)[..., ::-1]
    assert_equal(np.array(COLOURS)[read(data / 'masks' / name)], coloured)


def test_the_doctor_says_nothing(garden):
  folder, said = garden
  report = json.loads((folder / 'doctor' / 'doctor.json').read_text())
  assert report['findings'] == []
  assert (folder / 'doctor' / 'doctor.png').is_file()
  assert said['resnest_jax.data.doctor'][-1].startswith('written to')


def test_the_run_knows_the_classes(garden):
  folder, said = garden
  saved = json.loads((folder / 'runs/own/config.json').read_text())
  assert saved['model']['num_classes'] == 3
  _, variables, about = load_checkpoint(folder / 'runs/own')
  assert about['step'] == 4
  assert tuple(about['classes']) == NAMES
  assert tuple(map(tuple, about['palette'])) == COLOURS
  classifier = variables['params']['decode_head']['classifier']
  assert jax.tree.leaves(classifier)[0].shape[-1] == 3
  assert any('starting from backbone' in line for line in said['train.py'])


def test_training_said_which_photograph_it_left_out(garden):
  folder, said = garden
  (line, *_) = (x for x in said['train.py'] if 'unreadable sample' in x)
  pair = own_split(folder, 'train').pairs[0]
  assert Path(pair.image).name in line
  assert 'cannot be decoded' in line


def test_scores_and_pictures(garden):
  folder, _ = garden
  (out,) = (folder / 'runs/own/eval').iterdir()
  assert out.name == '4-val'
  result = json.loads((out / 'metrics.json').read_text())
  split = own_split(folder, 'val')
  assert [entry['class'] for entry in result['per_class']] == list(NAMES)
  labels = np.concatenate([sample['label'].ravel() for sample in split])
  pixels = [entry['pixels'] for entry in result['per_class']]
  assert pixels == np.bincount(labels, minlength=3).tolist()
  assert 0 <= result['mIoU'] <= 1
  shown = {f'overlays/{split[i]["name"]}.png' for i in (0, len(split) - 1)}
  assert set(result['overlays']) == shown
  assert all((out / x).is_file() for x in (*shown, 'contact_sheet.png'))


def test_predictions_have_the_classes_and_colours(garden):
  folder, _ = garden
  out = folder / 'predictions'
  listed = read_classes(out / 'classes.json').labels
  assert listed.classes == NAMES
  assert tuple(map(tuple, listed.palette.tolist())) == COLOURS
  for path in (folder / 'new_photographs').iterdir():
    predicted = read(out / path.name)
    assert predicted.shape == (64, 64)
    assert predicted.max() < 3
    overlay = read(out / f'{path.stem}_overlay.png')[..., ::-1]
    colours = np.array(COLOURS)[predicted]
    expected = (read(path)[..., ::-1] + colours) / 2
    assert_allclose(overlay, expected, atol=1)


def test_converted_weights_have_them_too(garden):
  folder, _ = garden
  weights = pretrained.load_weights(folder / 'weights' / 'own')
  assert tuple(weights.classes) == NAMES
  assert tuple(map(tuple, weights.palette)) == COLOURS


def test_other_classes_do_not_go_on_with_a_run(garden, monkeypatch):
  """Renamed or reordered ones would turn a score into another."""
  folder, _ = garden
  changed = folder / 'mydata' / 'other.txt'
  changed.write_text('\n'.join(NAMES[::-1]))
  monkeypatch.chdir(folder)
  command = next(x for x in COMMANDS if ' eval.py ' in x)
  flag = ' --config.data.folder.classes=other.txt'
  with pytest.raises(UserError, match='flower now'):
    run_command(command + flag, monkeypatch)
