"""The doctor as users meet it: the command, real files, before a training."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image
from small import MINI as CONFIG
from trouble import small_files

from resnest_jax import drawing
from resnest_jax.checkpoints.store import has_checkpoint
from resnest_jax.config import load_config
from resnest_jax.data.datasets import open_data
from resnest_jax.data.doctor import examine
from resnest_jax.data.doctor.__main__ import main
from resnest_jax.data.doctor.rules import diagnose
from resnest_jax.errors import UserError
from resnest_jax.labels import CITYSCAPES
from resnest_jax.training.loop import train


@pytest.fixture
def run(call, mini_data_dir, capsys):
  """`run('--out', ...)`: the exit status and what the command prints."""

  def run(*flags, data_dir=mini_data_dir):
    status = 0
    try:
      data_dir = f'--config.data.data_dir={data_dir}'
      call(main, '--config', CONFIG, data_dir, *flags)
    except SystemExit as end:
      status = end.code
    return status, capsys.readouterr().out

  return run


def config_of(data_dir, config=CONFIG, **overrides):
  return load_config(config, {'data.data_dir': str(data_dir), **overrides})


def splits_of(config):
  other = 'val' if config.data.name == 'folder' else 'validation'
  return [open_data(config.data, name) for name in ('train', other)]


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
  split, _ = splits_of(config_of(mini_data_dir))
  facts = content['splits']['train']
  assert facts['seen'] == facts['samples'] == 24
  sky = sum((sample['label'] == 2).any() for sample in split)
  assert facts['classes'][2]['images'] == sky
  # Eight samples of each split, two in a row of 4 x (320 + 12) + 3 x 12.
  assert cv2.imread(str(tmp_path / 'doctor.png')).shape[1] == 1364


def test_damaged_records(run, damaged_dir, tmp_path):
  status, out = run('--out', tmp_path, data_dir=damaged_dir)
  assert status == 1
  assert 'error: unreadable (train)\n' in out
  assert 'python -m resnest_jax.data.prepare ade20k_mini' in out
  (finding,) = json.loads((tmp_path / 'doctor.json').read_text())['findings']
  assert 0 < finding['count'] == len(finding['samples']) < 24
  assert 'of ade20k_mini, split train' in finding['samples'][0]


def test_some_samples_of_one_split(run):
  status, out = run('--split', 'validation', '--samples', '3')
  assert status == 0
  assert out.splitlines()[-1] == '3 of 8 samples of validation: nothing wrong'


def test_samples_are_spread_evenly(run):
  assert drawing.spread(5, 5) == drawing.spread(5, 9) == [0, 1, 2, 3, 4]
  assert drawing.spread(11, 3) == [0, 5, 10]
  chosen = drawing.spread(20210, 50)
  assert len(set(chosen)) == 50
  assert set(np.diff(chosen)) == {412, 413}
  with pytest.raises(UserError, match='at least 1'):
    run('--samples', '0')


def test_a_report_is_replaced_and_other_files_are_not(run, tmp_path):
  out = tmp_path / 'new' / 'folder'
  report = out / 'doctor.json'
  for number in (2, 3):
    assert run('--out', out, '--samples', number)[0] == 0
    content = json.loads(report.read_text())
    assert content['splits']['train']['seen'] == number
  report.write_text('{"mine": 1}')
  with pytest.raises(UserError, match=r'doctor\.json exists and is not'):
    run('--out', out)
  assert report.read_text() == '{"mine": 1}'


# ---- Real files ------------------------------------------------------------


def test_findings_are_printed_where_the_report_cannot_be_written(
  call, mini_data_dir, tmp_path, capsys
):
  given = '--config', CONFIG, f'--config.data.data_dir={mini_data_dir}'
  with (
    small_files(),
    pytest.raises(UserError, match=r'cannot write .*too large .*doctor\.json'),
  ):
    call(main, *given, '--samples', '2', '--out', tmp_path)
  assert '2 of 24 samples of train' in capsys.readouterr().out
  (tmp_path / 'file').touch()
  with pytest.raises(
    UserError, match=r'cannot write .*File exists.*another fo'
  ):
    call(main, *given, '--out', tmp_path / 'file')
  assert capsys.readouterr().out == ''


@pytest.fixture
def folder(mini_cityscapes_data_dir, tmp_path):
  """Streets in folders of files, eight for training, two for evaluation."""
  streets = config_of(
    mini_cityscapes_data_dir, 'configs/cityscapes_fcn.py:mini'
  )
  for source, split, number in zip(
    splits_of(streets), ('train', 'val'), (8, 2), strict=True
  ):
    for part in ('images', 'masks'):
      (tmp_path / part / split).mkdir(parents=True)
    for i in range(number):
      image = source[i]['image'][..., ::-1]
      cv2.imwrite(f'{tmp_path}/images/{split}/{i}.jpg', image)
      cv2.imwrite(f'{tmp_path}/masks/{split}/{i}.png', source[i]['label'])
  text = '\n'.join(
    f'{i}: {name} {" ".join(map(str, colour))}'
    for i, (name, colour) in enumerate(
      zip(CITYSCAPES.classes, CITYSCAPES.palette, strict=True)
    )
  )
  (tmp_path / 'classes.txt').write_text(text)
  return tmp_path


def folder_config(folder, **overrides):
  return config_of(folder, 'configs/folder.py:mini', **overrides)


def found_in(folder):
  config = folder_config(folder)
  return diagnose(examine.examine(config, splits_of(config)))


def cut(path, share=0.5):
  content = path.read_bytes()
  path.write_bytes(content[: int(len(content) * share)])


def test_files_that_are_cut_off(folder):
  assert found_in(folder) == []
  images, masks = folder / 'images' / 'train', folder / 'masks' / 'train'
  cut(images / '1.jpg', 0.98)
  cut(masks / '3.png')
  cut(masks / '5.png', 0)
  (found,) = found_in(folder)
  bad = images / '1.jpg', masks / '3.png', masks / '5.png'
  for sample, path in zip(found.finding.samples, bad, strict=True):
    assert sample.startswith(f'{path} cannot be decoded')


def read(path):
  return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def change_mask(change):
  def spoil(folder):
    path = folder / 'masks/train/4.png'
    cv2.imwrite(str(path), change(read(path)))

  return spoil


def with_palette(palette):
  def spoil(folder):
    path = folder / 'masks/train/4.png'
    indexed = Image.open(path).convert('P')
    indexed.putpalette(palette.tolist())
    indexed.save(path)

  return spoil


def rotate(folder):
  path = folder / 'images/train/4.jpg'
  picture = Image.open(path)
  exif = picture.getexif()
  exif[0x0112] = 6  # Orientation: to be turned by 90 degrees.
  picture.save(path, exif=exif)


OTHER = np.random.default_rng(0).integers(0, 256, 768)
CITY = np.pad(CITYSCAPES.palette, ((0, 237), (0, 0))).ravel()
TO_IDS = (
  'palette2id --masks {0}/masks --classes {0}/classes.txt --out {0}/masks_ids'
)


@pytest.mark.parametrize(
  ('spoil', 'rule', 'remedy'),
  [
    (change_mask(np.uint16), 'mask_depth', f'{TO_IDS} --indices\n'),
    (with_palette(CITY), 'colour_masks', f'{TO_IDS}\n'),
    (with_palette(OTHER), 'colour_masks', f'{TO_IDS} --indices\n'),
    (rotate, 'size_mismatch', 'In 1 the camera noted a rotation'),
    (change_mask(np.transpose), 'size_mismatch', 'In 1 the mask is transposed'),
  ],
)
def test_file_of_another_kind(folder, spoil, rule, remedy):
  """Remedies name the project's own means and real paths."""
  spoil(folder)
  (found,) = found_in(folder)
  assert found.split == 'train'
  assert (found.rule.name, found.finding.samples) == (rule, ('4',))
  assert remedy.format(folder) in found.finding.remedy
  other = 'transposed' if spoil is rotate else 'auto-orient'
  assert other not in found.finding.remedy


def test_remedy_for_classes_that_are_stretched_helps(folder):
  for path in (folder / 'masks').rglob('*.png'):
    cv2.imwrite(str(path), np.uint8(read(path) == 0) * 255)
  (folder / 'classes.txt').write_text('background\nleaf\n')
  found = found_in(folder)
  assert {d.rule.name for d in found} == {'stretched_masks'}
  first, *lines = found[0].finding.remedy.splitlines()
  assert f'{folder}/classes.txt' in first
  lines = [line.strip() for line in lines]
  assert lines == ['0: background', '255: leaf']
  (folder / 'classes.txt').write_text('\n'.join(lines))
  assert not [d for d in found_in(folder) if d.rule.severity == 'error']


def test_value_that_the_classes_file_does_not_have(folder):
  text = (folder / 'classes.txt').read_text()
  (folder / 'classes.txt').write_text(re.sub('10: sky.*\n', '', text))
  found = found_in(folder)
  assert [d.rule.name for d in found] == ['unknown_values'] * 2
  assert 'that no class has: 10, on' in found[0].finding.what
  assert '"10: name"' in found[0].finding.remedy


# ---- Before a training -----------------------------------------------------


def test_errors_stop_a_training(run_script, damaged_dir, tmp_path):
  data_dir = f'--config.data.data_dir={damaged_dir}'
  process = run_script(
    *('train.py', '--config', CONFIG, data_dir, '--workdir', tmp_path),
    status=1,
  )
  assert process.stderr.startswith('error: the label doctor found errors')
  assert 'Traceback' not in process.stderr
  assert 'error: unreadable (train)' in process.stderr
  assert (tmp_path / 'doctor.json').exists()
  # It may begin again, with other flags as well.
  assert not has_checkpoint(tmp_path)


def refusal(folder, **overrides):
  """What the doctor says before a training, '' if it lets it begin."""
  config = folder_config(folder, **overrides)
  try:
    examine.check_before_training(config, splits_of(config), folder / 'run')
  except UserError as error:
    return str(error)
  return ''


def test_warnings_do_not_stop_a_training(folder, capsys):
  shutil.copy(folder / 'images/val/0.jpg', folder / 'images/val/1.jpg')
  assert refusal(folder) == ''
  out = capsys.readouterr().out
  assert '8 of 8 samples of train and 2 of 2 samples of val: 1 warning (' in out
  assert 'warning: duplicates (val)' in out


def test_number_of_samples_before_a_training(folder, capsys):
  assert refusal(folder, **{'data.doctor_samples': 0}) == ''
  assert capsys.readouterr().out == ''
  assert not (folder / 'run').exists()
  refusal(folder, **{'data.doctor_samples': 1})
  assert '1 of 8 samples of train and 1 of 2' in capsys.readouterr().out


def test_samples_that_training_may_skip(folder, capsys):
  skip = '--config.data.skip_unreadable=true'
  cut(folder / 'images' / 'train' / '1.jpg')
  assert refusal(folder).endswith(f'cannot be read: {skip}')
  # Other errors are not skipped.
  other = refusal(folder, **{'model.num_classes': 5})
  assert 'nevertheless' in other
  assert other.endswith('doctor_samples=0')
  skipping = {'data.skip_unreadable': 'true'}
  capsys.readouterr()
  assert refusal(folder, **skipping) == ''
  assert 'error: unreadable (train)' in capsys.readouterr().out
  cut(folder / 'images' / 'val' / '1.jpg')  # Evaluation skips nothing.
  error = refusal(folder, **skipping)
  assert 'error: unreadable (val)' in error
  assert 'Samples of val must be repaired' in error
  assert 'skip_unreadable' not in error


def test_training_starts_again_after_an_error_of_the_doctor(folder, tmp_path):
  """In the same process, as in a notebook, which keeps the error."""
  cut(folder / 'images' / 'train' / '1.jpg')
  errors = []
  for _ in range(2):  # The second would find that another process trains.
    with pytest.raises(UserError, match='error: unreadable') as error:
      train(folder_config(folder), tmp_path / 'run')
    errors.append(error)


def test_command_that_examines_everything():
  words = ['--config', 'my config.py:mini', '--workdir', 'runs/a']
  words += ['--config.data.data_dir', 'data', '--config.seed=3']
  assert examine.examine_command(words) == (
    "python -m resnest_jax.data.doctor --config 'my config.py:mini' "
    '--config.data.data_dir=data --config.seed=3 --out doctor'
  )
