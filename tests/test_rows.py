"""Every row's small twin trains and is evaluated."""

import json
import math
from pathlib import Path

import pytest
from lengths import others_long
from small import RUN

from resnest_jax.config import load_config
from resnest_jax.labels import ADE20K, CITYSCAPES
from resnest_jax.training.loop import train

FOLDER = Path(__file__).parent.parent / 'configs'
ROWS = sorted(
  f.stem for f in FOLDER.glob('*.py') if f.stem not in ('common', 'folder')
)
# One of them in another way; test_train.py trains ade20k_pspnet.
VARIED = 'cityscapes_fcn'
VARIATION = {
  'train.batch_size': 8,
  'train.micro_batch_size': 4,
  'train.remat': 'blocks',
  'train.ema_decay': 0.9,
}


@pytest.mark.parametrize('row', others_long(ROWS, VARIED))
def test_three_steps_and_an_evaluation(
  row, mini_data_dir, mini_cityscapes_data_dir, tmp_path, capsys
):
  data_dir, labels = {
    'ade20k': (mini_data_dir, ADE20K),
    'cityscapes': (mini_cityscapes_data_dir, CITYSCAPES),
  }[row.partition('_')[0]]
  overrides = RUN | (VARIATION if row == VARIED else {})
  overrides |= {'train.total_steps': 3, 'train.log_steps': 1}
  overrides['data.data_dir'] = str(data_dir)
  train(load_config(FOLDER / f'{row}.py:mini', overrides), tmp_path)

  lines = (tmp_path / 'log.jsonl').read_text().splitlines()
  log = [json.loads(line) for line in lines]
  losses = {line['step']: line for line in log if 'loss' in line}
  assert list(losses) == [1, 2, 3]
  # It begins with every class as likely as any other; the auxiliary head's
  # weight is 0.4. Ignored pixels count as 0.
  first, expected = losses[1], math.log(len(labels.classes))
  assert first['decode_loss'] == pytest.approx(expected, rel=0.1)
  assert first['loss'] == pytest.approx(1.4 * expected, rel=0.1)
  assert all(math.isfinite(line['loss']) for line in losses.values())
  (scores,) = (line for line in log if 'mIoU' in line)
  assert 0 <= scores['mIoU'] <= scores['aAcc'] <= 1
  about = tmp_path / 'checkpoints' / '3' / 'about' / 'metadata'
  about = json.loads(about.read_text())
  assert tuple(about['classes']) == labels.classes
  if row == VARIED:
    assert 'in 2 x 4 images: batch norm has' in capsys.readouterr().out
