"""The doctor as users meet it: the command, real files, before a training."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
from data.garden import BLACK_AND_WHITE
from data.pictures import few_bits
from data.refusals import refused
from small import MINI as CONFIG
from trouble import small_files

from resnest_jax import drawing
from resnest_jax.checkpoints.store import has_checkpoint
from resnest_jax.data.datasets import PreparedSplit
from resnest_jax.data.doctor import examine
from resnest_jax.data.doctor.__main__ import main
from resnest_jax.errors import UserError
from resnest_jax.training.loop import train


@pytest.fixture
def run(call, mini_data_dir, capsys):
  """`run('--out', ...)`: what the command prints."""

  def run(*flags, data_dir=mini_data_dir):
    call(main, '--config', CONFIG, f'--config.data.data_dir={data_dir}', *flags)
    return capsys.readouterr().out

  return run


def test_clean_data(run_script, mini_data_dir, tmp_path):
  data_dir = f'--config.data.data_dir={mini_data_dir}'
  flags = '--config', CONFIG, data_dir, '--out', tmp_path
  process = run_script('-m', 'resnest_jax.data.doctor', *flags)
  assert '32/32 images' in process.stderr
  assert '24 of 24 samples of train and 8 of 8' in process.stdout
  assert 'nothing wrong' in process.stdout
  assert 'classes do not occur in 24 samples' in process.stdout
  content = json.loads((tmp_path / 'doctor.json').read_text())
  assert content['findings'] == []
  facts = content['splits']['train']
  assert facts['seen'] == facts['samples'] == 24
  split = PreparedSplit('ade20k_mini', mini_data_dir, 'train')
  sky = sum((sample['label'] == 2).any() for sample in split)
  assert facts['classes'][2]['images'] == sky
  # Eight samples of each split, two in a row of 4 x (320 + 12) + 3 x 12.
  assert cv2.imread(str(tmp_path / 'doctor.png')).shape[1] == 1364


def test_damaged_records(run, damaged_dir, tmp_path, capsys):
  with pytest.raises(SystemExit, match='1'):
    run('--out', tmp_path, data_dir=damaged_dir)
  said = r'(?s)error: unreadable \(train\)\n.*data\.prepare ade20k_mini'
  assert re.search(said, capsys.readouterr().out)
  (finding,) = json.loads((tmp_path / 'doctor.json').read_text())['findings']
  assert 0 < finding['count'] == len(finding['samples']) < 24
  assert 'of ade20k_mini, split train' in finding['samples'][0]


def test_some_samples_of_one_split_are_spread_evenly(run):
  out = run('--split', 'validation', '--samples', '3')
  assert out.splitlines()[-1] == '3 of 8 samples of validation: nothing wrong'
  assert drawing.spread(5, 5) == drawing.spread(5, 9) == [0, 1, 2, 3, 4]
  assert drawing.spread(11, 3) == [0, 5, 10]
  chosen = drawing.spread(20210, 50)
  assert len(set(chosen)) == 50
  assert set(np.diff(chosen)) == {412, 413}
  refused('at least 1', run, '--samples', '0')
  refused('fiers have not', run, '--config', 'configs/imagenet_resnest50.py')


def test_a_report_is_replaced_and_other_files_are_not(run, tmp_path):
  out = tmp_path / 'new' / 'folder'
  report = out / 'doctor.json'
  for number in (2, 3):
    run('--out', out, '--samples', number)
    content = json.loads(report.read_text())
    assert content['splits']['train']['seen'] == number
  report.write_text('{"mine": 1}')
  refused(r'doctor\.json exists and is not', run, '--out', out)
  assert report.read_text() == '{"mine": 1}'


def test_findings_are_printed_where_no_report_is_written(run, tmp_path, capsys):
  too_large = r'cannot write .*too large .*doctor\.json'
  with small_files(), pytest.raises(UserError, match=too_large):
    run('--samples', '2', '--out', tmp_path)
  assert '2 of 24 samples of train' in capsys.readouterr().out
  (tmp_path / 'file').touch()
  no_folder = r'cannot write .*File exists.*another fo'
  refused(no_folder, run, '--out', tmp_path / 'file')
  assert capsys.readouterr().out == ''


def cut(path):
  path.write_bytes(path.read_bytes()[:-40])


def test_errors_stop_a_training(run_script, damaged_dir, tmp_path):
  data_dir = f'--config.data.data_dir={damaged_dir}'
  command = 'train.py', '--config', CONFIG, data_dir, '--workdir', tmp_path
  error = run_script(*command, status=1).stderr
  assert error.startswith('error: the label doctor found errors')
  assert 'Traceback' not in error
  assert 'error: unreadable (train)' in error
  assert (tmp_path / 'doctor.json').exists()
  # It may begin again, with other flags as well.
  assert not has_checkpoint(tmp_path)


def refusal(garden, **overrides):
  """What the doctor says before a training, '' if it lets it begin."""
  garden.overrides = overrides
  try:
    examine.check_before_training(*garden.splits(), garden.root / 'run')
  except UserError as error:
    return str(error)
  return ''


def test_a_training_begins_after_the_remedy(garden, capsys):
  garden.classes(BLACK_AND_WHITE)
  garden.write(lambda ids: few_bits(ids > 0, 1))
  text = refusal(garden)
  assert 'error: mask_depth (train)' in text
  assert 'nevertheless' not in text
  remedy = re.search('What to do: (.*?masks_ids[.])', text, re.DOTALL)[1]
  garden.obey(remedy)
  assert refusal(garden, **garden.overrides) == ''
  assert 'nothing wrong' in capsys.readouterr().out


def test_warnings_of_so_many_samples_do_not_stop_a_training(garden, capsys):
  assert refusal(garden, **{'data.doctor_samples': 0}) == ''
  assert capsys.readouterr().out == ''
  assert not (garden.root / 'run').exists()
  refusal(garden, **{'data.doctor_samples': 1})
  assert '1 of 4 samples of train and 1 of 2' in capsys.readouterr().out
  shutil.copy(garden.image('val/4'), garden.image('val/5'))
  assert refusal(garden) == ''
  out = capsys.readouterr().out
  assert '4 of 4 samples of train and 2 of 2 samples of val: 1 warning (' in out
  assert 'warning: duplicates (val)' in out


def test_samples_that_training_may_skip(garden, capsys):
  cut(garden.image('train/1'))
  text = refusal(garden)
  assert f'Samples: {garden.image("train/1")} cannot be decoded' in text
  skip = '--config.data.skip_unreadable=true'
  assert text.endswith(f'cannot be read: {skip}')
  # Other errors are not skipped.
  other = refusal(garden, **{'model.num_classes': 5})
  assert 'nevertheless' in other
  assert other.endswith('doctor_samples=0')
  skipping = {'data.skip_unreadable': 'true'}
  capsys.readouterr()
  assert refusal(garden, **skipping) == ''
  assert 'error: unreadable (train)' in capsys.readouterr().out
  cut(garden.image('val/5'))  # Evaluation skips nothing.
  error = refusal(garden, **skipping)
  said = r'(?s)error: unreadable \(val\).*Samples of val must be repaired'
  assert re.search(said, error)
  assert 'skip_unreadable' not in error


def test_training_starts_again_after_an_error_of_the_doctor(garden):
  cut(garden.image('train/1'))
  config, kept = garden.splits()[0], []
  # In the same process, as in a notebook, which keeps the error: the second
  # would find that another process trains.
  for _ in range(2):
    with pytest.raises(UserError, match='error: unreadable') as error:
      train(config, garden.root / 'run')
    kept.append(error)


def test_command_that_examines_everything():
  words = ['--config', 'my config.py:mini', '--workdir', 'runs/a']
  words += ['--config.data.data_dir', 'data', '--config.seed=3']
  assert examine.examine_command(words) == (
    "python -m resnest_jax.data.doctor '--config=my config.py:mini' "
    '--config.data.data_dir=data --config.seed=3 --out=doctor'
  )
