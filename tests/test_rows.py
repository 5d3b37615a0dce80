"""Every row's small twin trains and is evaluated."""

import json
import math

import pytest
from hosts import ROOT
from lengths import others_long
from small import RUN

from resnest_jax.config import load_config
from resnest_jax.data.imagenet import DRAWN
from resnest_jax.labels import ADE20K, CITYSCAPES
from resnest_jax.training.loop import train

FOLDER = ROOT / 'configs'
ROWS = sorted(path.stem for path in FOLDER.glob('*_*.py'))
CLASSIFIERS = [row for row in ROWS if row.startswith('imagenet')]
ROWS = [row for row in ROWS if row.startswith(('ade20k', 'cityscapes'))]
# One of them in another way; test_train.py trains ade20k_pspnet.
VARIED = 'cityscapes_fcn'
VARIATION = {'train.batch_size': 8, 'train.micro_batch_size': 4}
VARIATION |= {'train.remat': 'blocks', 'train.ema_decay': 0.9}


def written(workdir):
  """Lines of the log, and the classes of the last checkpoint."""
  log = (workdir / 'log.jsonl').read_text().splitlines()
  about = (workdir / 'checkpoints/3/about/metadata').read_text()
  return [*map(json.loads, log)], tuple(json.loads(about)['classes'])


@pytest.mark.parametrize('row', others_long(ROWS, VARIED))
def test_three_steps_and_an_evaluation(row, request, tmp_path, capsys):
  ade20k = row.startswith('ade20k')
  labels = ADE20K if ade20k else CITYSCAPES
  data = 'mini_data_dir' if ade20k else 'mini_cityscapes_data_dir'
  overrides = RUN | (VARIATION if row == VARIED else {})
  overrides |= {'train.total_steps': 3, 'train.log_steps': 1}
  overrides['data.data_dir'] = str(request.getfixturevalue(data))
  config = load_config(FOLDER / f'{row}.py:mini', overrides)
  train(config, tmp_path)

  log, classes = written(tmp_path)
  losses = {line['step']: line for line in log if 'loss' in line}
  assert list(losses) == [1, 2, 3]
  # It begins with all classes alike. Ignored pixels count as 0.
  first, expected = losses[1], math.log(len(labels.classes))
  assert first['decode_loss'] == pytest.approx(expected, rel=0.1)
  both = 1 + config.loss.aux_weight
  assert first['loss'] == pytest.approx(both * expected, rel=0.1)
  assert all(math.isfinite(line['loss']) for line in losses.values())
  (scores,) = (line for line in log if 'mIoU' in line)
  assert 0 <= scores['mIoU'] <= scores['aAcc'] <= 1
  assert classes == labels.classes
  if row == VARIED:
    assert 'in 2 x 4 images: batch norm has' in capsys.readouterr().out


@pytest.mark.parametrize('row', others_long(CLASSIFIERS, CLASSIFIERS[-1]))
def test_classifier_trains_and_is_evaluated(
  row, mini_imagenet_data_dir, tmp_path
):
  values = {'model.width': 8, 'model.stem_width': 8, 'train.batch_size': 8}
  values |= {'data.crop_size': (32, 32), 'data.image_scale': (32, 32)}
  values |= {'train.norm_group': 4, 'train.total_steps': 3, 'loss.mixup': 0.2}
  values |= {'optimizer.warmup_steps': 1, 'train.log_steps': 1}
  values |= {'data.policy': 'autoaugment', 'eval.batch_size': 16}
  values['data.data_dir'] = str(mini_imagenet_data_dir)
  train(load_config(FOLDER / f'{row}.py:mini', values), tmp_path)
  log, classes = written(tmp_path)
  losses = [line['loss'] for line in log if 'accuracy' in line]
  assert len(losses) == 3
  assert losses[0] == pytest.approx(math.log(len(DRAWN)), rel=0.25)
  (scores,) = (line for line in log if 'top1' in line)
  assert 0 <= scores['top1'] <= scores['top5'] <= 1
  assert classes == DRAWN
