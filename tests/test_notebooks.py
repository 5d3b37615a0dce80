"""The notebooks: run from top to bottom, and as they are kept."""

import base64
import html
import json
import os
import re
from pathlib import Path

import cv2
import nbformat
import numpy as np
import pytest
from evaluation.runs import write_run

from notebooks import install, run
from resnest_jax import from_checkpoint
from resnest_jax.data.classes import read_classes

ROOT = Path(__file__).resolve().parent.parent
KEPT = {
  name: nbformat.read(ROOT / f'notebooks/{name}.ipynb', as_version=4)
  for name in run.NAMES
}
# Whose notebooks Colab opens and whose checkout it clones.
REPOSITORY = 'github.com/OWNER/resnest-jax'
# The time goes into compiling, so everything has one small shape.
SMALL = {
  'model.head': 'fcn',
  'model.radix': 1,
  'model.width': 8,
  'model.stem_width': 8,
  'model.head_channels': 16,
  'model.aux_channels': 8,
  'data.image_scale': '64,64',
  'data.crop_size': '64,64',
  'data.doctor_samples': 0,
  'train.batch_size': 2,
  'train.pictures': 0,
  'eval.batch_size': 4,
  'eval.bucket': 64,
  'eval.overlays': 2,
}
FLAGS = ' '.join(f'--config.{key}={value}' for key, value in SMALL.items())
# Of this machine, or of any that ran them.
MACHINE_PATH = re.compile(
  r'(?<![\w.:])/(?:work|tmp|home|root|usr|opt|content)/'
)

each_notebook = pytest.mark.parametrize('name', run.NAMES)


def code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def text_of(cell):
  """All that a cell has printed."""
  return ''.join(x.text for x in cell.outputs if x.output_type == 'stream')


def pictures_of(cell):
  """The pictures that a cell shows, uint8 (H, W, 3)."""
  found = []
  for output in cell.outputs:
    for kind in ('image/png', 'image/jpeg'):
      if kind in output.get('data', {}):
        pixels = np.frombuffer(base64.b64decode(output.data[kind]), np.uint8)
        found.append(cv2.imdecode(pixels, cv2.IMREAD_COLOR_RGB))
  return found


def cell_with(notebook, words):
  """The only cell whose source has these words."""
  (cell,) = [cell for cell in code(notebook) if words in cell.source]
  return cell


# --- As they run -------------------------------------------------------------


def execute(name, **parameters):
  """Runs a notebook with one device, compiled quickly."""
  one = '--xla_force_host_platform_device_count=1'
  flags = re.sub(r'--xla_force_host\S*', one, os.environ['XLA_FLAGS'])
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setenv('XLA_FLAGS', flags)
    monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    path = ROOT / f'notebooks/{name}.ipynb'
    notebook = run.execute(path, parameters, cell_timeout=600)
  run.tidy(notebook)
  return notebook


@pytest.fixture(scope='module')
def ade20k_mini(tmp_path_factory):
  """Its folder and what came out."""
  folder = tmp_path_factory.mktemp('ade20k_mini')
  images = {'images': (4, 4), 'steps': 1}
  return folder, execute(
    'ade20k_mini', folder=str(folder), flags=FLAGS, **images
  )


@pytest.fixture(scope='module')
def own_data(tmp_path_factory):
  """Its folder and what came out."""
  folder = tmp_path_factory.mktemp('own_data')
  return folder, execute(
    'own_data',
    data=str(folder / 'mydata'),
    folder=str(folder),
    steps=1,
    flags=FLAGS,
  )


@pytest.mark.long
def test_ade20k_mini_shows_the_scores_of_its_run(ade20k_mini):
  folder, notebook = ade20k_mini
  (path,) = folder.glob('run/eval/1-validation/metrics.json')
  metrics = json.loads(path.read_text())
  assert metrics['images'] == 4
  said = text_of(cell_with(notebook, 'metrics = json.loads'))
  assert said.startswith(f'mIoU {metrics["mIoU"]:.1%}, with 95 % confidence')
  table = text_of(cell_with(notebook, '!python eval.py'))
  assert f'mIoU {100 * metrics["mIoU"]:.2f}' in table
  training = text_of(cell_with(notebook, '!python train.py'))
  assert '4 images, 4 to evaluate, 1 steps of 2 on 1 x cpu' in training
  assert 'step 1/1  loss' in training


@pytest.mark.long
def test_ade20k_mini_shows_its_pictures(ade20k_mini):
  folder, notebook = ade20k_mini
  for words, file in (
    ('curves.png', 'run/curves.png'),
    ('contact_sheet.png', 'run/eval/1-validation/contact_sheet.png'),
  ):
    (picture,) = pictures_of(cell_with(notebook, words))
    original = cv2.imread(str(folder / file), cv2.IMREAD_COLOR_RGB)
    size = picture.shape[1::-1]
    original = cv2.resize(original, size, interpolation=cv2.INTER_AREA)
    assert np.abs(picture.astype(int) - original).mean() < 4
  (output,) = cell_with(notebook, 'srcdoc').outputs
  report = html.unescape(output.data['text/html'])
  assert '<h1>ade20k_pspnet_mini</h1>' in report
  cell = cell_with(notebook, 'draw_scene(')
  assert 'seen by the network of step 1' in text_of(cell)
  (overlay,) = pictures_of(cell)
  assert overlay.shape[1] == 400
  assert overlay.shape[0] > 270  # With names below.


@pytest.mark.long
def test_own_data_draws_a_folder_as_it_is_described(own_data):
  folder, notebook = own_data
  data = folder / 'drawn'
  classes = read_classes(data / 'classes.txt')
  assert classes.labels.classes == ('background', 'sky', 'plants', 'person')
  masks = sorted(data.glob('masks/*.png'))
  images = sorted(data.glob('images/*.jpg'))
  assert [x.stem for x in masks] == [x.stem for x in images]
  assert len(masks) == 48
  found = [cv2.imread(str(x), cv2.IMREAD_UNCHANGED) for x in masks]
  assert np.unique(found).tolist() == [0, 1, 2, 3]
  assert min((mask == 1).mean() for mask in found) > 0.1
  report = json.loads((folder / 'doctor' / 'doctor.json').read_text())
  assert report['findings'] == []
  said = text_of(cell_with(notebook, 'resnest_jax.data.doctor'))
  assert '40 of 40 samples of train and 8 of 8 samples of val' in said
  (sheet,) = pictures_of(cell_with(notebook, 'doctor.png'))
  assert sheet.shape[1] > 400


@pytest.mark.long
def test_own_data_predicts_with_what_it_has_trained(own_data):
  folder, notebook = own_data
  cell = cell_with(notebook, 'model.predict(pictures)')
  model = from_checkpoint(folder / 'run', checkpoint='best')
  paths = sorted((folder / 'drawn' / 'images').iterdir())[:3]
  overlays = pictures_of(cell)
  assert len(overlays) == 3
  lines = text_of(cell).splitlines()
  assert [line.split()[0] for line in lines if line] == [x.name for x in paths]
  for path, prediction, picture, line in zip(
    paths, model.predict(paths), overlays, filter(None, lines), strict=True
  ):
    expected = prediction.overlay()
    same = (np.abs(picture.astype(int) - expected) < 40).all(-1)
    assert same.mean() > 0.98, path
    shares = dict(re.findall(r'(\w+) (\d+)%', line))
    assert list(shares) == list(model.classes)
    for k, name in enumerate(model.classes):
      share = 100 * (prediction.labels == k).mean()
      assert int(shares[name]) == pytest.approx(share, abs=1.5)


@pytest.mark.long
def test_predict_keeps_the_label_maps(tmp_path):
  workdir = write_run(tmp_path / 'run')
  rng = np.random.default_rng(0)
  image = cv2.resize(rng.integers(0, 256, (4, 5, 3), np.uint8), (120, 90))
  picture = tmp_path / 'a_picture.png'
  cv2.imwrite(str(picture), image[..., ::-1])
  notebook = execute(
    'predict',
    weights=str(workdir),
    pictures=[str(picture)],
    out=str(tmp_path / 'out'),
  )
  expected = from_checkpoint(workdir).predict(picture, probabilities=True)
  kept = cv2.imread(str(tmp_path / 'out/a_picture.png'), cv2.IMREAD_UNCHANGED)
  assert (kept == expected.labels).mean() > 0.999
  said = text_of(cell_with(notebook, 'model = rj.from_checkpoint'))
  assert said == 'pspnet on resnest101, 150 classes\n'
  (overlay,) = pictures_of(cell_with(notebook, 'prediction.overlay('))
  mixed = expected.overlay(opacity=0.6)
  assert overlay.shape[1] == 120
  assert np.abs(overlay[:90].astype(int) - mixed).mean() < 4
  shares = text_of(cell_with(notebook, 'largest = '))
  most = np.bincount(expected.labels.ravel()).argmax()
  name = from_checkpoint(workdir).classes[most]
  assert shares.startswith(f'a_picture.png: {name} ')
  (sure,) = pictures_of(cell_with(notebook, 'sure = '))
  probability = 255 * expected.probabilities.max(-1)
  assert np.abs(sure[..., 0] - probability).mean() < 2


# --- As they are kept --------------------------------------------------------


@each_notebook
def test_kept_outputs_are_those_of_a_whole_run(name):
  cells = code(KEPT[name])
  numbers = [cell.execution_count for cell in cells]
  assert numbers == list(range(1, len(cells) + 1))
  kinds = {output.output_type for cell in cells for output in cell.outputs}
  assert 'error' not in kinds
  assert not any('Traceback' in text_of(cell) for cell in cells)
  shown = [picture for cell in cells for picture in pictures_of(cell)]
  assert len(shown) >= {'ade20k_mini': 3, 'own_data': 6, 'predict': 4}[name]
  for picture in shown:
    assert picture.shape[1] <= run.WIDTH
    assert picture.std() > 5  # Something is on it.


@each_notebook
def test_kept_files_are_small_and_name_no_machine(name):
  assert (ROOT / f'notebooks/{name}.ipynb').stat().st_size < 1_000_000
  for cell in code(KEPT[name]):
    texts = [text_of(cell)]
    for output in cell.outputs:
      texts += [
        value
        for kind, value in output.get('data', {}).items()
        if kind.startswith('text/')
      ]
    for text in texts:
      # Pictures inside of a report are letters and slashes, too.
      text = re.sub(r'base64,[\w+/=]*', '', text)
      assert MACHINE_PATH.findall(text) == []


def test_a_machine_path_would_be_noticed():
  assert MACHINE_PATH.findall('in /home/me/runs and (/tmp/x)') == [
    '/home/',
    '/tmp/',
  ]
  assert MACHINE_PATH.findall('runs/home/x, https://a.b/tmp/') == []


@each_notebook
def test_parameters_are_tagged_and_the_start_is_the_same(name):
  tagged = [
    cell
    for cell in code(KEPT[name])
    if 'parameters' in cell.metadata.get('tags', ())
  ]
  assert tagged == code(KEPT[name])[:1]
  installing = [code(notebook)[1].source for notebook in KEPT.values()]
  assert len(set(installing)) == 1
  (clone,) = re.findall(r'git clone .*https://(\S+)', installing[0])
  assert clone == REPOSITORY


def test_unknown_parameters_are_refused():
  with pytest.raises(KeyError, match=r"predict.ipynb has no .*'wieghts'"):
    run.execute(ROOT / 'notebooks/predict.ipynb', {'wieghts': 'x'})


@each_notebook
def test_badges_and_links_lead_to_files(name):
  texts = [
    cell.source for cell in KEPT[name].cells if cell.cell_type == 'markdown'
  ]
  links = re.findall(r'\]\(([^)\s]+)\)', '\n'.join(texts))
  colab = 'https://colab.research.google.com/'
  assert links[:2] == [
    f'{colab}assets/colab-badge.svg',
    f'{colab}{REPOSITORY.replace(".com", "")}/blob/main/notebooks/{name}.ipynb',
  ]
  for link in links[2:]:
    assert (ROOT / 'notebooks' / link.split('#')[0]).is_file(), link


def test_the_pages_give_the_same_addresses():
  colab = f'https://colab.research.google.com/{REPOSITORY}'.replace(
    '.com/O', '/O'
  )
  readme = (ROOT / 'README.md').read_text()
  for name in run.NAMES:
    assert f'({colab}/blob/main/notebooks/{name}.ipynb)' in readme
  pages = [readme, (ROOT / 'docs/install.md').read_text()]
  for page in pages:
    found = set(re.findall(r'github(?:\.com)?/(\w+/resnest-jax)', page))
    assert found == {REPOSITORY.partition('/')[2]}


# --- What runs and installs them ---------------------------------------------


@pytest.mark.parametrize(
  ('written', 'seen'),
  [
    ('a\nb\n', 'a\nb\n'),
    (' 1/3\r 2/3\r 3/3\r\ndone\n', ' 3/3\ndone\n'),
    ('\x1b[1mbold\x1b[0m \x1b[?25l', 'bold'),
    ('one\ntwo\x1b[1A\r\x1b[2Knew', 'new\ntwo'),
    ('12%\x1b[2K\r34%', '34%'),
  ],
)
def test_screens_show_what_is_left_in_the_end(written, seen):
  assert run.screen(written) == seen


def test_pieces_of_text_become_one():
  def stream(name, text):
    return nbformat.v4.new_output('stream', name=name, text=text)

  picture = nbformat.v4.new_output('display_data', data={'text/plain': 'x'})
  given = [
    *(stream('stdout', 'a'), stream('stderr', 'b'), picture),
    stream('stdout', 'c'),
  ]
  found = list(run.merged(given))
  assert [x.get('text') for x in found] == ['ab', None, 'c']


def test_large_pictures_become_small_ones():
  rng = np.random.default_rng(0)
  large = rng.integers(0, 256, (200, 1800, 3), np.uint8)
  png = base64.b64encode(cv2.imencode('.png', large)[1].tobytes()).decode()
  data = {'image/png': png, 'image/jpeg': 'x', 'text/plain': 'y'}
  run.shrink_picture(data)
  assert sorted(data) == ['image/jpeg', 'text/plain']
  pixels = np.frombuffer(base64.b64decode(data['image/jpeg']), np.uint8)
  assert cv2.imdecode(pixels, 1).shape == (100, run.WIDTH, 3)
  small = {'image/png': base64.b64encode(b'few bytes').decode()}
  run.shrink_picture(small)
  assert list(small) == ['image/png']


@pytest.mark.parametrize(
  ('tpu', 'driver', 'extra'),
  [
    (True, None, 'tpu'),
    (False, None, ''),
    (False, 580, 'cuda13'),
    (False, 579, 'cuda12'),
    (False, 525, 'cuda12'),
  ],
)
def test_jax_gets_what_the_device_needs(tpu, driver, extra):
  assert install.choose_extra(tpu, driver) == extra


def test_an_old_driver_is_told():
  with pytest.raises(SystemExit, match='driver is 524, and JAX needs 525'):
    install.choose_extra(False, 524)


@pytest.mark.parametrize(
  ('vendor', 'device', 'expected'),
  [
    ('0x1ae0', '0x0063', True),  # TPU v5e.
    ('0x1ae0', '0x0042', False),  # Google's network card.
    ('0x10de', '0x0063', False),
  ],
)
def test_tpus_are_found(tmp_path, vendor, device, expected):
  folder = tmp_path / '0000:00:05.0'
  folder.mkdir()
  (folder / 'vendor').write_text(f'{vendor}\n')
  (folder / 'device').write_text(f'{device}\n')
  assert install.has_tpu(tmp_path) == expected
  assert not install.has_tpu(tmp_path / 'nowhere')


def test_tpus_are_those_that_jax_knows():
  from jax._src import hardware_utils

  known = hardware_utils._TPU_PCI_DEVICE_IDS
  assert set(install.TPUS) <= set(known)
  assert install.GOOGLE == hardware_utils._GOOGLE_PCI_VENDOR_ID


def test_the_installed_jax_is_the_pinned_one():
  for extra, file in (('cuda13', 'gpu'), ('tpu', 'tpu')):
    pins = (ROOT / f'requirements-{file}.txt').read_text().splitlines()
    assert install.jax_requirement(extra) in pins
  pins = (ROOT / 'requirements.txt').read_text().splitlines()
  assert install.jax_requirement('') in pins
