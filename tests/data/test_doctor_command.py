"""The doctor as users meet it: the command, real files, before a training."""

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from resnest_jax.checkpoints.store import has_checkpoint
from resnest_jax.config import load_config
from resnest_jax.data import doctor
from resnest_jax.data.checks.rules import diagnose
from resnest_jax.data.datasets import open_data
from resnest_jax.data.labels import CITYSCAPES
from resnest_jax.errors import UserError
from resnest_jax.evaluation import visualize
from resnest_jax.training.loop import train

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
  assert f'sample {bad[0]} of ade20k_mini' in finding['samples'][0]


def test_some_samples_of_one_split(run):
  status, out = run('--split', 'validation', '--samples', '3')
  assert status == 0
  assert out.splitlines()[-1] == '3 of 8 samples of validation: nothing wrong'


def test_samples_are_spread_evenly():
  assert visualize.spread(5, 5) == visualize.spread(5, 9) == [0, 1, 2, 3, 4]
  assert visualize.spread(11, 3) == [0, 5, 10]
  chosen = visualize.spread(20210, 50)
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


@pytest.fixture
def folder(mini_cityscapes_data_dir, tmp_path):
  """Streets in folders of files, eight for training, two for evaluation."""
  config = load_config(
    'configs/cityscapes_fcn.py:mini',
    {'data.data_dir': str(mini_cityscapes_data_dir)},
  )
  for split, name, number in (('train', 'train', 8), ('val', 'validation', 2)):
    source = open_data(config.data, name)
    for part in ('images', 'masks'):
      (tmp_path / part / split).mkdir(parents=True)
    for i in range(number):
      image, mask = (source.raw(i)[key] for key in ('image', 'mask'))
      cv2.imwrite(f'{tmp_path}/images/{split}/{i}.jpg', image[..., ::-1])
      cv2.imwrite(f'{tmp_path}/masks/{split}/{i}.png', mask)
  lines = [
    f'{value}: {CITYSCAPES.classes[k]}'
    for value, k in enumerate(CITYSCAPES.to_train_id)
    if k != 255
  ]
  ignored = np.flatnonzero(CITYSCAPES.to_train_id[:34] == 255)
  lines.append(f'ignore: {" ".join(map(str, ignored))}')
  (tmp_path / 'classes.txt').write_text('\n'.join(lines))
  return tmp_path


def folder_config(folder, **overrides):
  overrides = {'data.data_dir': str(folder), **overrides}
  return load_config('configs/folder.py:mini', overrides)


def rules_of(folder):
  """Rule -> samples, of what is found in the training split."""
  config = folder_config(folder)
  splits = [open_data(config.data, name) for name in ('train', 'val')]
  found = diagnose(doctor.examine(config, splits))
  assert {d.split for d in found} <= {'train'}
  return {d.rule.name: d.finding.samples for d in found}


def cut(path: Path, share: float):
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])


def test_files_that_are_cut_off(folder):
  assert rules_of(folder) == {}
  images, masks = folder / 'images' / 'train', folder / 'masks' / 'train'
  cut(images / '1.jpg', 0.98)
  cut(masks / '3.png', 0.5)
  (masks / '5.png').write_bytes(b'')
  (samples,) = rules_of(folder).values()
  bad = images / '1.jpg', masks / '3.png', masks / '5.png'
  for sample, path in zip(samples, bad, strict=True):
    assert sample.startswith(f'{path} cannot be decoded')


def test_jpeg_that_is_damaged_inside(folder, run_script, tmp_path):
  path = folder / 'images' / 'train' / '1.jpg'
  content = bytearray(path.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 40] = b'\xff\xd9' * 20
  path.write_bytes(content)
  process = run_script(
    *('-m', 'resnest_jax.data.doctor', '--config', 'configs/folder.py:mini'),
    *(f'--config.data.data_dir={folder}', '--out', tmp_path / 'report'),
  )
  out = ' '.join(process.stdout.split())
  assert 'warning: damaged_jpeg (train) The JPEGs of 1 of 8 samples' in out
  assert f'{path}: "Corrupt JPEG data: premature end' in out
  assert 'Samples: 1 What to do' in out
  # The complaint is not repeated among the other messages; the bar is there.
  assert 'Corrupt' not in process.stderr
  assert '10/10 images' in process.stderr


def test_files_of_16_bits(folder):
  image = cv2.imread(f'{folder}/images/train/2.jpg').astype(np.uint16) * 256
  (folder / 'images' / 'train' / '2.jpg').unlink()
  cv2.imwrite(f'{folder}/images/train/2.png', image)
  path = f'{folder}/masks/train/4.png'
  mask = cv2.imread(path, cv2.IMREAD_UNCHANGED)
  cv2.imwrite(path, mask.astype(np.uint16))
  assert rules_of(folder) == {'image_depth': ('2',), 'mask_depth': ('4',)}


def found_in(folder):
  config = folder_config(folder)
  splits = [open_data(config.data, name) for name in ('train', 'val')]
  return diagnose(doctor.examine(config, splits))


def test_remedies_name_the_project_s_own_means_and_real_paths(folder):
  path = f'{folder}/masks/train/4.png'
  mask = cv2.imread(path, cv2.IMREAD_UNCHANGED)
  cv2.imwrite(path, mask.astype(np.uint16))
  command = (
    f'palette2id --masks {folder}/masks --classes {folder}/classes.txt '
    f'--out {folder}/masks_ids'
  )
  (found,) = found_in(folder)
  assert f'{command} --indices\n' in found.finding.remedy
  cv2.imwrite(path, cv2.applyColorMap(mask, cv2.COLORMAP_JET))
  (found,) = found_in(folder)
  assert f'{command}\n' in found.finding.remedy
  for path in (folder / 'masks').rglob('*.png'):
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(path), np.uint8(mask == 7) * 255)
  (folder / 'classes.txt').write_text('background\nleaf\n')
  found = found_in(folder)
  assert {d.rule.name for d in found} == {'stretched_masks'}
  remedy = found[0].finding.remedy
  assert f'{folder}/classes.txt' in remedy
  lines = [line.strip() for line in remedy.splitlines()[1:]]
  assert lines == ['0: background', '255: leaf']
  # It is what helps.
  (folder / 'classes.txt').write_text('\n'.join(lines))
  assert not [d for d in found_in(folder) if d.rule.severity == 'error']


def test_files_with_palettes(folder):
  rng = np.random.default_rng(0)
  palettes = {
    1: np.repeat(rng.permutation(256), 3),
    5: rng.integers(0, 256, 768),
  }
  for i, palette in palettes.items():
    path = f'{folder}/masks/train/{i}.png'
    indexed = Image.open(path).convert('P')
    indexed.putpalette(palette.tolist())
    indexed.save(path)
  assert rules_of(folder) == {
    'grey_masks_in_colour': ('1',),
    'colour_masks': ('5',),
  }


def test_value_that_the_classes_file_does_not_have(folder):
  text = (folder / 'classes.txt').read_text()
  (folder / 'classes.txt').write_text(text.replace('23: sky\n', ''))
  config = folder_config(folder)
  splits = [open_data(config.data, name) for name in ('train', 'val')]
  found = diagnose(doctor.examine(config, splits))
  assert [d.rule.name for d in found] == ['unknown_values'] * 2
  assert 'that no class has: 23, on' in found[0].finding.what
  assert '"23: name"' in found[0].finding.remedy


def test_photograph_with_a_rotation_in_its_exif_data(folder):
  path = folder / 'images' / 'train' / '3.jpg'
  picture = Image.open(path)
  exif = picture.getexif()
  exif[0x0112] = 6  # Orientation: to be turned by 90 degrees.
  picture.save(path, exif=exif)
  (found,) = found_in(folder)
  assert (found.rule.name, found.finding.samples) == ('size_mismatch', ('3',))
  assert 'In 1 the camera noted a rotation' in found.finding.remedy
  assert 'transposed' not in found.finding.remedy


def test_mask_that_is_transposed(folder):
  path = f'{folder}/masks/train/3.png'
  cv2.imwrite(path, cv2.imread(path, cv2.IMREAD_UNCHANGED).T)
  (found,) = found_in(folder)
  assert (found.rule.name, found.finding.samples) == ('size_mismatch', ('3',))
  assert 'In 1 the mask is transposed' in found.finding.remedy
  assert 'auto-orient' not in found.finding.remedy
  split = open_data(folder_config(folder).data, 'train')
  with pytest.raises(UserError, match='The mask is transposed'):
    split[[pair.name for pair in split.pairs].index('3')]


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
  assert not has_checkpoint(tmp_path)


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


def test_samples_that_training_may_skip(folder, tmp_path, capsys):
  config = folder_config(folder, **{'data.skip_unreadable': 'true'})
  cut(folder / 'images' / 'train' / '1.jpg', 0.5)
  splits = [open_data(config.data, name) for name in ('train', 'val')]
  doctor.check_before_training(config, splits, tmp_path / 'run')
  assert 'error: unreadable (train)' in capsys.readouterr().out
  cut(folder / 'images' / 'val' / '1.jpg', 0.5)  # Evaluation skips nothing.
  with pytest.raises(UserError, match=r'error: unreadable \(val\)') as error:
    doctor.check_before_training(config, splits, tmp_path / 'run')
  assert 'Those of val have to be mended' in str(error.value)
  assert 'skip_unreadable' not in str(error.value)


def test_advice_where_samples_cannot_be_read(folder, tmp_path):
  config = folder_config(folder)
  cut(folder / 'images' / 'train' / '1.jpg', 0.5)
  splits = [open_data(config.data, name) for name in ('train', 'val')]
  with pytest.raises(UserError) as error:
    doctor.check_before_training(config, splits, tmp_path / 'run')
  *_, last = str(error.value).splitlines()
  assert last.endswith('cannot be read: --config.data.skip_unreadable=true')
  # Other errors are not skipped.
  config.model.num_classes = 5
  with pytest.raises(UserError, match=r'nevertheless.*doctor_samples=0$'):
    doctor.check_before_training(config, splits, tmp_path / 'run')


def test_training_starts_after_an_error_of_the_doctor(folder, tmp_path):
  """In the same process, as in a notebook, which keeps the error."""
  small = {'model.head': 'fcn', 'train.total_steps': 1, 'train.batch_size': 4}
  sizes = ('width', 'stem_width', 'head_channels', 'aux_channels')
  small |= {f'model.{size}': 8 for size in sizes}
  config = folder_config(folder, **small)
  picture = folder / 'images' / 'train' / '1.jpg'
  whole = picture.read_bytes()
  cut(picture, 0.5)
  for _ in range(2):
    with pytest.raises(UserError, match='error: unreadable') as error:
      train(config, tmp_path / 'run')
  picture.write_bytes(whole)
  train(config, tmp_path / 'run')
  assert has_checkpoint(tmp_path / 'run')
  assert error.traceback  # Until here.


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
