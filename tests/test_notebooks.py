"""The notebooks: run from top to bottom, and as they are kept."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from unittest import mock

import cv2
import nbformat
import numpy as np
import pytest
from data.small_archives import decode, encode
from evaluation.runs import write_run
from hosts import ROOT
from small import MINI, small_flags

from notebooks import address, install, run
from resnest_jax import from_checkpoint

SMALL = {'model.head': 'fcn', 'model.radix': 1, 'data.doctor_samples': 0}
SMALL |= {'train.batch_size': 2, 'train.pictures': 0, 'eval.overlays': 2}
FLAGS = ' '.join(small_flags(SMALL))


def read(root, name):
  return nbformat.read(root / f'notebooks/{name}.ipynb', as_version=4)


KEPT = {name: read(ROOT, name) for name in run.NAMES}
# Of this machine, or of any that ran them: '/home/', not 'runs/home/x'.
MACHINE_PATH = r'(?<![\w.:])/(?:work|tmp|home|root|usr|opt|content)/'

each_notebook = pytest.mark.parametrize('name', run.NAMES)


def code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def outputs_of(notebook, words=''):
  """Of the cells whose source has these words."""
  return [x for y in code(notebook) if words in y.source for x in y.outputs]


def printed_by(notebook, words=''):
  outputs = outputs_of(notebook, words)
  return ''.join(x.text for x in outputs if x.output_type == 'stream')


def shown_by(notebook):
  """The pictures of all cells, uint8 (H, W, 3)."""
  data = [x.get('data', {}).items() for x in outputs_of(notebook)]
  found = [x for items in data for kind, x in items if kind[:6] == 'image/']
  return [decode(base64.b64decode(x), cv2.IMREAD_COLOR_RGB) for x in found]


def difference(picture, expected):
  return np.abs(picture.astype(int) - expected).mean()


# --- As they run -------------------------------------------------------------


def execute(name, **parameters):
  """Runs a notebook with one device, compiled quickly."""
  flags = re.sub(r'device_count=\d+', 'device_count=1', os.environ['XLA_FLAGS'])
  quick = {'XLA_FLAGS': flags, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  with mock.patch.dict(os.environ, quick):
    notebook = run.execute(ROOT / f'notebooks/{name}.ipynb', parameters, 600)
  run.tidy(notebook)
  return notebook


@pytest.mark.long
def test_ade20k_mini_shows_scores_and_pictures_of_its_run(tmp_path):
  values = {'folder': str(tmp_path), 'flags': FLAGS, 'images': (4, 4)}
  notebook = execute('ade20k_mini', steps=1, **values)
  training = printed_by(notebook, '!python train.py')
  assert '4 images, 4 to evaluate, 1 step of 2 on 1 x cpu' in training
  text = (tmp_path / 'run/eval/1-validation/metrics.json').read_text()
  told = f'mIoU {json.loads(text)["mIoU"]:.1%}, with 95 % confidence'
  assert printed_by(notebook, 'metrics = json.loads').startswith(told)
  (output,) = outputs_of(notebook, 'srcdoc')
  assert '<h1>ade20k_pspnet_mini<' in html.unescape(output.data['text/html'])
  _, _, overlay = shown_by(notebook)  # After curves and contact sheet.
  assert overlay.shape[1] == 400
  assert overlay.shape[0] > 270  # With names below.


@pytest.mark.long
def test_own_data_draws_a_folder_trains_and_predicts(tmp_path):
  where = {'data': str(tmp_path / 'mydata'), 'folder': str(tmp_path)}
  notebook = execute('own_data', steps=1, flags=FLAGS, **where)
  masks = [decode(x.read_bytes()) for x in tmp_path.glob('drawn/masks/*')]
  assert np.unique(masks).tolist() == [0, 1, 2, 3]
  assert min((mask == 1).mean() for mask in masks) > 0.1
  report = json.loads((tmp_path / 'doctor/doctor.json').read_text())
  assert report['findings'] == []
  said = printed_by(notebook, 'resnest_jax.data.doctor')
  assert '38 of 38 samples of train and 10 of 10 samples of val' in said

  model = from_checkpoint(tmp_path / 'run', checkpoint='best')
  assert model.classes == ('background', 'sky', 'plants', 'person')
  paths = sorted((tmp_path / 'drawn' / 'images').iterdir())[:3]
  lines = filter(None, printed_by(notebook, 'predict(pictures)').split('\n'))
  # After contact sheets of doctor and evaluation, and curves.
  pictures = shown_by(notebook)[3:]
  each = zip(paths, model.predict(paths), pictures, lines, strict=True)
  for path, prediction, picture, line in each:
    assert line.startswith(f'{path.name} background ')
    same = (np.abs(picture.astype(int) - prediction.overlay()) < 40).all(-1)
    assert same.mean() > 0.98, path
    shares = [*map(int, re.findall(r' (\d+)%', line))]
    counts = np.bincount(prediction.labels.ravel(), minlength=4)
    assert shares == pytest.approx(100 * counts / counts.sum(), abs=1.5)


@pytest.mark.long
def test_predict_keeps_the_label_maps(tmp_path):
  workdir, picture = write_run(tmp_path / 'run'), f'{tmp_path}/a_picture.png'
  noise = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
  cv2.imwrite(picture, cv2.resize(noise, (120, 90)))
  where = {'weights': str(workdir), 'out': str(tmp_path / 'out')}
  notebook = execute('predict', pictures=[picture], **where)
  model = from_checkpoint(workdir)
  expected = model.predict(picture, probabilities=True)
  kept = decode((tmp_path / 'out/a_picture.png').read_bytes())
  assert (kept == expected.labels).mean() > 0.999
  overlay, sure = shown_by(notebook)
  assert difference(overlay[:90], expected.overlay(opacity=0.6)) < 4
  shares = printed_by(notebook, 'largest = ')
  most = np.bincount(expected.labels.ravel()).argmax()
  assert shares.startswith(f'a_picture.png: {model.classes[most]} ')
  assert difference(sure[..., 0], 255 * expected.probabilities.max(-1)) < 2


# --- As they are kept --------------------------------------------------------


@each_notebook
def test_kept_outputs_are_those_of_a_whole_run(name):
  counts = [cell.execution_count for cell in code(KEPT[name])]
  assert counts == [*range(1, len(counts) + 1)]
  assert 'Traceback' not in printed_by(KEPT[name])
  shown = shown_by(KEPT[name])
  assert len(shown) >= {'ade20k_mini': 3, 'own_data': 6, 'predict': 4}[name]
  assert max(picture.shape[1] for picture in shown) <= run.WIDTH
  assert min(picture.std() for picture in shown) > 5  # Something is on it.


@each_notebook
def test_kept_files_are_small_and_name_no_machine(name):
  assert (ROOT / f'notebooks/{name}.ipynb').stat().st_size < 1_000_000
  for output in outputs_of(KEPT[name]):
    data = output.get('data', {'text/plain': output.get('text', '')})
    text = '\n'.join(data[kind] for kind in data if kind.startswith('text/'))
    # Pictures inside of a report are letters and slashes, too.
    assert not re.findall(MACHINE_PATH, re.sub(r'base64,[\w+/=]*', '', text))


@each_notebook
def test_parameters_are_tagged_and_the_start_is_the_same(name):
  first, second, *others = code(KEPT[name])
  assert first.metadata.tags == ['parameters']
  assert not any('parameters' in x.metadata.get('tags', ()) for x in others)
  assert 'repository' in first.source
  assert second.source == code(KEPT['predict'])[1].source
  assert [x.text[:19] for x in second.outputs] == ['nothing to change: ']


def test_unknown_parameters_are_refused():
  with pytest.raises(KeyError, match=r"predict.ipynb has no .*'wieghts'"):
    run.execute(ROOT / 'notebooks/predict.ipynb', {'wieghts': 'x'})


# --- The project's address ---------------------------------------------------


GITHUB = 'https://github.com'
# Files and how often each names the address.
PLACES = {f'notebooks/{name}.ipynb': 2 for name in run.NAMES}
PLACES |= {'README.md': 3, 'docs/install.md': 1, 'docs/start.md': 1}
PLACES['pyproject.toml'] = 1
ADDRESS = r'(?:git clone .*|[Rr]epository = .)https://github\.com/([\w./-]+)'
ADDRESS += r'|colab\.research\.google\.com/github/([\w-]+/[^/]+)/'


def addresses(root):
  """The repositories that each file names as this project's, in order."""
  texts = {file: (root / file).read_text() for file in PLACES}
  return {x: [*map(''.join, re.findall(ADDRESS, texts[x]))] for x in PLACES}


def expected_addresses(*repository):
  return {file: [*repository] * number for file, number in PLACES.items()}


def test_the_kept_files_name_one_address_or_none():
  kept = addresses(ROOT)
  named = {name for names in kept.values() for name in names}
  assert kept == expected_addresses(*named)


def copy_project(target, *names):
  target.mkdir(parents=True, exist_ok=True)
  for name in names:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, target / name)


def give_address(folder, text, monkeypatch):
  """Runs the command in a copy of the project."""
  if not (folder / 'notebooks').exists():
    copy_project(folder, 'notebooks', 'docs', 'README.md', 'pyproject.toml')
  monkeypatch.setattr(address, 'ROOT', folder)
  monkeypatch.setattr(sys, 'argv', ['address.py', text])
  address.main()


def test_an_address_is_written_everywhere_and_replaced(tmp_path, monkeypatch):
  for repository in ('some-one/resnest.2', 'a/b', 'a/b'):
    give_address(tmp_path, f'{GITHUB}/{repository}', monkeypatch)
    assert addresses(tmp_path) == expected_addresses(repository)
  project = tomllib.loads((tmp_path / 'pyproject.toml').read_text())['project']
  assert project['urls'] == {'Repository': f'{GITHUB}/a/b'}
  colab = 'https://colab.research.google.com'
  for name in run.NAMES:
    notebook = read(tmp_path, name)
    nbformat.validate(notebook)
    badge = f'[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github'
    badge += f'/a/b/blob/main/notebooks/{name}.ipynb)'
    assert notebook.cells[0].source.startswith(f'{badge}\n\n# ')
    assert badge in (tmp_path / 'README.md').read_text()


def test_a_malformed_address_is_refused(tmp_path, monkeypatch):
  for wrong in ('github.com/a/b', f'{GITHUB}/a/b/', f'{GITHUB}/a/b.git'):
    told = re.escape(f"error: the arguments are ['{wrong}']. Give one")
    with pytest.raises(SystemExit, match=told):
      give_address(tmp_path, wrong, monkeypatch)
  assert addresses(tmp_path) == addresses(ROOT)


# --- The cell that finds and installs the project ----------------------------


def start(command, folder, **environment):
  options = {'cwd': folder, 'env': os.environ | environment, 'text': True}
  return subprocess.run(command, capture_output=True, **options)


def first_cells(folder, before='', python=sys.executable, **parameters):
  """Runs the cells in a folder, as a notebook that stands there alone."""
  first, second = (cell.source for cell in code(KEPT['predict'])[:2])
  lines = [f'{key} = {value!r}' for key, value in parameters.items()]
  found = "import importlib.util as i; print(i.find_spec('resnest_jax').origin)"
  cells = '\n'.join([before, first, *lines, second, found])
  return start([python, '-c', cells], folder)


@pytest.fixture
def uploaded(tmp_path):
  """The folder that a notebook starts in, and the project elsewhere."""
  project, folder = tmp_path / 'there/project', tmp_path / 'here'
  folder.mkdir()
  files = 'pyproject.toml', 'requirements.txt', 'train.py'
  copy_project(project, 'resnest_jax', 'notebooks', 'configs', *files)
  return folder, project


@pytest.mark.parametrize('kind', ['zip', 'folder', 'address'])
def test_a_notebook_alone_fetches_the_project(uploaded, kind):
  folder, project = uploaded
  where = {'zip': '', 'folder': str(project), 'address': f'file://{project}'}
  if kind == 'zip':
    name = folder / 'resnest-jax-main'
    shutil.make_archive(name, 'zip', project.parent, 'project')
  if kind == 'address':
    who = ('-c', 'user.name=a', '-c', 'user.email=a@b')
    for words in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'all']):
      subprocess.run(['git', *who, *words], cwd=project, check=True)
  root = folder / 'resnest-jax' / ('project' if kind == 'zip' else '')
  # The second time it is there; the third a notebook is inside of it.
  for place in (folder, folder, root / 'notebooks'):
    done = first_cells(place, repository=where[kind])
    assert done.returncode == 0, done.stderr
    told = 'nothing to change: all that the project needs is installed'
    assert done.stdout == f'{told}\n{root / "resnest_jax/__init__.py"}\n'


def test_a_notebook_alone_says_what_to_upload(tmp_path):
  done = first_cells(tmp_path, repository='')
  assert done.returncode == 1
  said = f'resnest_jax is not in {re.escape(str(tmp_path))}, .* Upload a zip'
  assert re.search(said, done.stderr.splitlines()[-1])


# What Colab has, as far as the project knows it.
COLAB = 'jax==0.7.2 jaxlib==0.7.2 flax==0.11.2 numpy==2.1.3 grain==0.2.18 '
COLAB += 'orbax-checkpoint==0.12.4 packaging opencv-python-headless==5.0.0.93 '
COLAB += 'opencv-contrib-python==4.14.0.94'


@pytest.mark.long
def test_a_session_like_colabs_gets_what_is_missing(uploaded):
  """Installed for real, after jax was imported; then a step of training."""
  folder, project = uploaded
  python = folder / 'colab/bin/python'
  venv = [sys.executable, '-m', 'venv', folder / 'colab']
  pip = [python, '-m', 'pip', 'install', '-q', '--no-compile', *COLAB.split()]
  for command in (venv, pip):
    subprocess.run(command, check=True)
  done = first_cells(folder, 'import jax', python, repository=str(project))
  assert done.returncode == 1
  assert re.search(r'^new: .*\btensorflow-datasets 4\.', done.stdout, re.M)
  replaced = dict(re.findall(r'^  (\S+) \S+ -> (.+)', done.stdout, re.M))
  assert replaced.keys() - {'numpy'} == {'jax', 'jaxlib', 'flax'}
  assert replaced['jax'] == install.jax_requirement('').removeprefix('jax==')
  assert re.search('restart .*has imported jax, jaxlib', done.stderr)
  done = first_cells(folder, 'import jax, cv2', python)
  assert done.stdout.startswith('nothing to change'), done.stderr
  quick = {'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  prepare = '-m resnest_jax.data.prepare ade20k_mini --images 4 4 --data_dir x'
  train = f'train.py --config {MINI} --workdir run --config.data.data_dir=x '
  train += f'--config.train.total_steps=1 {FLAGS}'
  for words in (prepare, train):
    done = start([python, *words.split()], folder / 'resnest-jax', **quick)
    assert done.returncode == 0, done.stderr
  assert 'step 1/1  loss' in done.stdout


# --- What runs and installs them ---------------------------------------------


SCREENS = {'one\ntwo\x1b[1A\r\x1b[2Knew': 'new\ntwo', '12%\x1b[2K\r34%': '34%'}
SCREENS[' 1/3\r 2/3\r 3/3\r\ndone\n'] = ' 3/3\ndone\n'
SCREENS['\x1b[1mbold\x1b[0m \x1b[?25l'] = 'bold'


@pytest.mark.parametrize('written', SCREENS)
def test_screens_show_what_is_left_in_the_end(written):
  assert run.screen(written) == SCREENS[written]


def test_pieces_of_text_become_one():
  new = nbformat.v4.new_output
  a, b, c = (new('stream', name='stdout', text=text) for text in 'abc')
  b.name = 'stderr'
  found = list(run.merged([a, b, new('display_data'), c]))
  assert [x.get('text') for x in found] == ['ab', None, 'c']


def test_large_pictures_become_small_ones():
  large = np.random.default_rng(0).integers(0, 256, (200, 1800, 3), np.uint8)
  png = base64.b64encode(encode(large)).decode()
  data = {'image/png': png, 'image/jpeg': 'x', 'text/plain': 'y'}
  run.shrink_picture(data)
  jpeg = decode(base64.b64decode(data.pop('image/jpeg')))
  assert (jpeg.shape, data) == ((100, run.WIDTH, 3), {'text/plain': 'y'})
  small = {'image/png': 'ZmV3IGJ5dGVz'}
  run.shrink_picture(small)
  assert list(small) == ['image/png']


EXTRAS = {None: '', '580.65.06, 7.5': 'cuda13', '580.65.06, 6.0': 'cuda12'}
EXTRAS['525.60.13, 9.0\n525.60.13, 9.0'] = 'cuda12'


@pytest.mark.parametrize('driver', EXTRAS)
def test_jax_gets_what_the_device_needs(driver, tmp_path, monkeypatch):
  if driver:  # A program that says it.
    program = tmp_path / 'nvidia-smi'
    program.write_text(f"#!/bin/sh\necho '{driver}'\n")
    program.chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}:/bin' if driver else str(tmp_path))
  assert install.choose_extra(False, *install.nvidia()) == EXTRAS[driver]
  assert install.choose_extra(True, *install.nvidia()) == 'tpu'


def test_an_old_driver_is_told():
  with pytest.raises(SystemExit, match='driver is 524, and JAX needs 525'):
    install.choose_extra(False, 524)


def test_tpus_are_those_that_jax_knows_and_found(tmp_path):
  from jax._src import hardware_utils

  assert set(install.TPUS) <= set(hardware_utils._TPU_PCI_DEVICE_IDS)
  assert install.GOOGLE == hardware_utils._GOOGLE_PCI_VENDOR_ID
  (folder := tmp_path / '0000:00:05.0').mkdir()
  # A TPU v5e, a network card of Google's, and another vendor's device.
  for vendor, device in (('1ae0', '0063'), ('1ae0', '0042'), ('10de', '0063')):
    (folder / 'vendor').write_text(f'0x{vendor}\n')
    (folder / 'device').write_text(f'0x{device}\n')
    assert install.has_tpu(tmp_path) == (vendor + device == '1ae00063')
  assert not install.has_tpu(tmp_path / 'nowhere')


def test_the_installed_jax_is_the_pinned_one():
  new = '>=' if sys.version_info >= (3, 12) else '<'
  for extra, file in (('cuda13', '-gpu'), ('tpu', '-tpu'), ('', '')):
    pins = (ROOT / f'requirements{file}.txt').read_text().splitlines()
    told = f"{install.jax_requirement(extra)}; python_version {new} '3.12'"
    assert told in pins
  assert install.jax_requirement('') == f'jax=={metadata.version("jax")}'


def test_needs_are_compared_with_what_is_installed():
  needs = ('nbformat', 'nbformat>=5,<6', 'nbformat>=99', 'no-such-package')
  assert [*map(install.is_met, needs)] == [True, True, False, False]
