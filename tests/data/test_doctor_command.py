"""The doctor as users meet it: the command, real files, before a training."""

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from resnest_jax.config import load_config
from resnest_jax.data import doctor
from resnest_jax.data.checks.observe import survey
from resnest_jax.data.checks.rules import diagnose
from resnest_jax.data.datasets import open_data
from resnest_jax.data.labels import CITYSCAPES
from resnest_jax.errors import UserError

CONFIG = 'configs/ade20k_pspnet.py:mini'


@pytest.fixture
def run(mini_data_dir, monkeypatch, capsys):
  """`run('--out', ...)`: the exit status and what the command prints."""

  def run(*flags, data_dir=mini_data_dir):
    data_dir = f'--config.data.data_dir={data_dir}'
    words = ['doctor', '--config', CONFIG, data_dir, *flags]
    monkeypatch.setattr(sys, 'argv', [str(word) for word in words])
    try:
      doctor.main()
    except SystemExit as end:
      return end.code, capsys.readouterr().out
    return 0, capsys.readouterr().out

  return run


@pytest.fixture(scope='module')
def damaged_dir(mini_data_dir, tmp_path_factory):
  """Prepared data, some bytes of whose training records are others."""
  folder = tmp_path_factory.mktemp('damaged')
  shutil.copytree(mini_data_dir / 'ade20k', folder / 'ade20k')
  (records,) = folder.rglob('*train*array_record*')
  content = bytearray(records.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 64] = bytes(64)
  records.write_bytes(content)
  return folder


# ---- The command -----------------------------------------------------------


def test_clean_data(run_script, mini_data_dir, tmp_path):
  process = run_script(
    *('-m', 'resnest_jax.data.doctor', '--config', CONFIG, '--out', tmp_path),
    f'--config.data.data_dir={mini_data_dir}',
  )
  assert '32/32 images' in process.stderr
  assert '24 of 24 samples of train and 8 of 8' in process.stdout
  assert 'nothing wrong' in process.stdout
  assert 'classes do not occur in these 24 samples' in process.stdout
  content = json.loads((tmp_path / 'doctor.json').read_text())
  assert content['findings'] == []
  split = open_data(config_of(mini_data_dir).data, 'train')
  labels = [split[i]['label'] for i in range(24)]
  facts = content['splits']['train']
  assert facts['seen'] == facts['samples'] == 24
  assert facts['classes'][2] == {
    'class': 'sky',
    'pixels': sum(int((label == 2).sum()) for label in labels),
    'images': sum(bool((label == 2).any()) for label in labels),
  }
  picture = cv2.imread(str(tmp_path / 'doctor.png'))
  # Eight samples of each split, two in a row of 4 x (320 + 12) + 3 x 12.
  assert picture.shape[1] == 1364
  assert picture.shape[0] > 8 * 200


def config_of(data_dir, **overrides):
  return load_config(CONFIG, {'data.data_dir': str(data_dir), **overrides})


def test_damaged_records(run, damaged_dir, tmp_path):
  split = open_data(config_of(damaged_dir).data, 'train')
  bad = []
  for i in range(len(split)):
    try:
      split.raw(i)
    except UserError:
      bad.append(i)
  assert 0 < len(bad) < 24
  status, out = run('--out', tmp_path, data_dir=damaged_dir)
  assert status == 1
  assert f'error: unreadable (train)\n  {len(bad)} of 24 samples' in out
  assert 'python -m resnest_jax.data.prepare ade20k_mini' in out
  content = json.loads((tmp_path / 'doctor.json').read_text())
  (finding,) = content['findings']
  assert (finding['rule'], finding['count']) == ('unreadable', len(bad))
  assert f'record {bad[0]} of ade20k_mini' in finding['samples'][0]


def test_some_samples_of_one_split(run):
  status, out = run('--split', 'validation', '--samples', '3')
  assert status == 0
  assert out.splitlines()[-1] == '3 of 8 samples of validation: nothing wrong'


def test_samples_are_spread_evenly():
  assert doctor.spread(5, None) == doctor.spread(5, 9) == [0, 1, 2, 3, 4]
  assert doctor.spread(11, 3) == [0, 5, 10]
  chosen = doctor.spread(20210, 50)
  assert len(set(chosen)) == 50
  assert set(np.diff(chosen)) == {412, 413}
  with pytest.raises(UserError, match='at least 1'):
    run_with_samples('0')


def run_with_samples(number):
  sys.argv = ['doctor', '--config', CONFIG, '--samples', number]
  doctor.main()


def test_a_report_is_replaced_and_other_files_are_not(run, tmp_path):
  out = tmp_path / 'new' / 'folder'
  for number in ('2', '3'):
    status, _ = run('--out', out, '--samples', number)
    assert status == 0
    content = json.loads((out / 'doctor.json').read_text())
    assert content['splits']['train']['seen'] == int(number)
  (out / 'doctor.json').write_text('{"mine": 1}')
  with pytest.raises(UserError, match=r'doctor\.json is there and is not'):
    run('--out', out)
  assert (out / 'doctor.json').read_text() == '{"mine": 1}'
  (out / 'doctor.json').unlink()
  with pytest.raises(UserError, match=r'doctor\.png is there and is not'):
    run('--out', out)


# ---- Real files ------------------------------------------------------------


class Files:
  """A split of image and mask files, decoded as prepared data is."""

  name, split, labels = 'files', 'train', CITYSCAPES

  def __init__(self, pairs):
    self.pairs = pairs

  def __len__(self):
    return len(self.pairs)

  def raw(self, index):
    image, mask = self.pairs[index]
    colours = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH
    return {
      'image': self.decode(image, colours),
      'mask': self.decode(mask, cv2.IMREAD_UNCHANGED),
      'name': image.stem,
    }

  def decode(self, path, flags):
    content = np.fromfile(path, np.uint8) if path.exists() else np.zeros(0)
    pixels = cv2.imdecode(content, flags) if content.size else None
    if pixels is None:
      raise UserError(f'{path.name} cannot be decoded')
    return pixels


@pytest.fixture
def files(mini_cityscapes_data_dir, tmp_path):
  """Eight pairs of files."""
  config = load_config(
    'configs/cityscapes_fcn.py:mini',
    {'data.data_dir': str(mini_cityscapes_data_dir)},
  )
  split, pairs = open_data(config.data, 'train'), []
  for i in range(8):
    sample = split.raw(i)
    pair = tmp_path / f'{i}.jpg', tmp_path / f'{i}.png'
    cv2.imwrite(str(pair[0]), sample['image'][..., ::-1])
    cv2.imwrite(str(pair[1]), sample['mask'])
    pairs.append(pair)
  return pairs


def rules_of(pairs):
  s = survey(Files(pairs), for_training=True, num_outputs=19)
  return {d.rule.name: d.finding.samples for d in diagnose([s])}


def cut(path: Path, share: float):
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])


def test_files_that_are_cut_off(files):
  assert rules_of(files) == {}
  cut(files[1][0], 0.98)
  cut(files[3][1], 0.5)
  files[5][1].write_bytes(b'')
  files[6][0].unlink()
  assert rules_of(files) == {
    'unreadable': tuple(
      f'{name} cannot be decoded'
      for name in ('1.jpg', '3.png', '5.png', '6.jpg')
    )
  }


def test_files_of_16_bits(files):
  image = cv2.imread(str(files[2][0])).astype(np.uint16) * 256
  files[2] = files[2][0].with_suffix('.tif'), files[2][1]
  cv2.imwrite(str(files[2][0]), image)
  mask = cv2.imread(str(files[4][1]), cv2.IMREAD_UNCHANGED)
  cv2.imwrite(str(files[4][1]), mask.astype(np.uint16))
  assert rules_of(files) == {'image_depth': ('2',), 'mask_depth': ('4',)}


def test_files_with_palettes(files):
  rng = np.random.default_rng(0)
  palettes = {
    1: np.repeat(rng.permutation(256), 3),
    5: rng.integers(0, 256, 768),
  }
  for i, palette in palettes.items():
    indexed = Image.open(files[i][1]).convert('P')
    indexed.putpalette(palette.tolist())
    indexed.save(files[i][1])
  assert rules_of(files) == {
    'grey_masks_in_colour': ('1',),
    'colour_masks': ('5',),
  }


def test_photograph_with_a_rotation_in_its_exif_data(files):
  picture = Image.open(files[3][0])
  exif = picture.getexif()
  exif[0x0112] = 6  # Orientation: to be turned by 90 degrees.
  picture.save(files[3][0], exif=exif)
  s = survey(Files(files), for_training=True, num_outputs=19)
  (found,) = diagnose([s])
  assert (found.rule.name, found.finding.samples) == ('size_mismatch', ('3',))
  assert 'In 1 of them height and width are exchanged' in found.finding.remedy


# ---- Before a training -----------------------------------------------------


def splits_of(config):
  return [open_data(config.data, name) for name in ('train', 'validation')]


def test_errors_stop_a_training(run_script, damaged_dir, tmp_path):
  data_dir = f'--config.data.data_dir={damaged_dir}'
  process = run_script(
    *('train.py', '--config', CONFIG, data_dir, '--workdir', tmp_path),
    status=1,
  )
  assert process.stderr.startswith('error: the label doctor found what would')
  assert 'Traceback' not in process.stderr
  assert 'error: unreadable (train)' in process.stderr
  assert (
    f'python -m resnest_jax.data.doctor --config {CONFIG} {data_dir} '
    '--out doctor'
  ) in process.stderr
  assert (tmp_path / 'doctor.json').exists()
  # It may begin again, with other flags as well.
  assert not (tmp_path / 'config.json').exists()


def test_warnings_do_not_stop_a_training(mini_data_dir, tmp_path, capsys):
  config = config_of(mini_data_dir)
  train, validation = splits_of(config)
  repeated = Repeated(validation, 4)
  doctor.check_before_training(config, [train, repeated], tmp_path)
  out = capsys.readouterr().out
  assert '24 of 24 samples of train and 8 of 8 samples of validation' in out
  assert '1 warning (' in out
  assert 'warning: duplicates (validation)' in out
  content = json.loads((tmp_path / 'doctor.json').read_text())
  assert [f['rule'] for f in content['findings']] == ['duplicates']


class Repeated:
  """The first samples of a split again and again."""

  def __init__(self, split, number):
    self.of, self.number = split, number
    self.name, self.split, self.labels = split.name, split.split, split.labels

  def __len__(self):
    return len(self.of)

  def raw(self, index):
    return self.of.raw(index % self.number)


def test_number_of_samples_before_a_training(mini_data_dir, tmp_path, capsys):
  for number, words in (
    ('5', '5 of 24 samples of train and 5 of 8'),
    ('0', ''),
  ):
    config = config_of(mini_data_dir, **{'data.doctor_samples': number})
    workdir = tmp_path / number
    doctor.check_before_training(config, splits_of(config), workdir)
    out = capsys.readouterr().out
    assert words in out
    assert bool(out) == workdir.exists() == (number != '0')


def test_command_that_examines_everything():
  words = (
    '--config',
    'my config.py:mini',
    '--workdir',
    'runs/a',
    '--config.data.data_dir',
    'data',
    '--config.seed=3',
  )
  assert doctor.examine_command(words) == (
    "python -m resnest_jax.data.doctor --config 'my config.py:mini' "
    '--config.data.data_dir=data --config.seed=3 --out doctor'
  )
