"""How long a run lasts, when it stops early, and the weights that it keeps."""

import json
import shutil

import jax
import numpy as np
import pytest
from checkpoints.stored import make_state
from data.refusals import refused
from ml_collections import ConfigDict
from small import MINI, scalars, small_config

from resnest_jax.checkpoints.state import Run
from resnest_jax.checkpoints.store import load_checkpoint
from resnest_jax.config import fit_total_steps, load_config
from resnest_jax.data.datasets import open_splits
from resnest_jax.data.sampling import weigh_classes
from resnest_jax.training.loop import train


def steps_of(images, **keys):
  config = load_config(MINI, {f'train.{k}': v for k, v in keys.items()})
  fit_total_steps(config, images)
  assert config.train.total_epochs is None
  return config.train.total_steps


def test_epochs_are_as_many_steps_as_show_all_images():
  assert steps_of(24, total_epochs=3, batch_size=4) == 18
  assert steps_of(25, total_epochs=3, batch_size=4) == 19  # 75 of 76 slots.
  assert steps_of(1, total_epochs=1, batch_size=4) == 1
  assert steps_of(24, total_steps=7) == 7
  many = {'total_epochs': 2**31 - 1, 'batch_size': 4}
  refused('total_steps is .* at most 2147483647', steps_of, 24, **many)


def test_warm_up_is_compared_with_the_steps_of_the_epochs():
  config = load_config(
    MINI, {'optimizer.warmup_steps': 400, 'train.total_epochs': 50}
  )
  refused('below train.total_steps, 313', fit_total_steps, config, 100)


def test_when_a_run_is_over():
  keys = {'total_steps': 90, 'early_stop': 2}
  over = [
    Run(make_state(), step=step, stale=stale).is_over(keys)
    for step, stale in ((50, 1), (50, 2), (50, 3), (90, 0))
  ]
  assert over == [False, True, True, True]
  assert not Run(make_state(), step=50, stale=2).is_over(
    keys | {'early_stop': 0}
  )
  # Not rated yet.
  assert not Run(make_state(), step=90, evaluating=True).is_over(keys)


ENDLESS = {
  **{'train.total_epochs': 2, 'train.eval_steps': 2, 'train.early_stop': 2},
  **{'train.checkpoint_steps': 1, 'train.keep_checkpoints': 20},
  **{'train.pictures': 0, 'data.doctor_samples': 0},
  'loss.class_weights': 'inverse_sqrt',
  # Nothing is learnt: each evaluation has the score of the first.
  **{'model.frozen_bn': 'all', 'optimizer.learning_rate': 1e-30},
  'optimizer.min_learning_rate': 0.0,
}


@pytest.fixture(scope='module')
def early(mini_data_dir, written_run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('early') / 'run'
  places = {'data.data_dir': str(mini_data_dir)}
  places['pretrained'] = str(written_run)
  train(config := small_config(**ENDLESS, **places), workdir)
  return workdir, config


def about(workdir, step):
  place = workdir / 'checkpoints' / str(step) / 'about' / 'metadata'
  return json.loads(place.read_text())


def test_early_stop_and_its_resumes(early, tmp_path, capsys):
  workdir, config = early
  assert config.train.total_steps == 12
  assert [step for step, _ in scalars(workdir, 'mIoU')] == [2, 4, 6]
  assert [about(workdir, step)['stale'] for step in (2, 5, 6)] == [0, 1, 2]
  # Started again it does nothing, and says how to go on.
  train(config, workdir)
  said = capsys.readouterr().out
  assert 'nothing to do: stopped at step 6, after 2 evaluations with' in said
  assert 'early_stop=0' in said
  assert f'--config.pretrained={workdir}' in said
  # Killed before its end it ends alike; it counts its pixels anew.
  again = shutil.copytree(workdir, tmp_path / 'again')
  shutil.rmtree(again / 'checkpoints' / '6')
  (again / 'class_pixels.npy').unlink()
  train(config, again)
  kept = [(x / 'class_pixels.npy').read_bytes() for x in (workdir, again)]
  assert kept[0] == kept[1]
  assert about(again, 6) == about(workdir, 6)
  trees = [load_checkpoint(x)[1] for x in (workdir, again)]
  jax.tree.map(np.testing.assert_array_equal, *trees)
  assert scalars(again, 'loss') == scalars(workdir, 'loss')
  # Without the key it goes on.
  config.train.early_stop = 0
  train(config, again)
  assert [step for step, _ in scalars(again, 'mIoU')][-1] == 12


def test_weights_of_a_run_are_those_of_its_pixels(early, tmp_path):
  workdir, config = early
  split = open_splits(config).train
  expected = weigh_classes(config, split, None)
  # As numbers they give the same run; nothing else does.
  numbers = ConfigDict(config)
  numbers.train.total_steps = 2
  with numbers.ignore_type():
    numbers.loss.class_weights = tuple(expected)
  train(numbers, tmp_path)
  assert scalars(tmp_path, 'loss')[:2] == scalars(workdir, 'loss')[:2]
  numbers.loss.class_weights = None
  train(numbers, tmp_path / 'plain')
  assert scalars(tmp_path / 'plain', 'loss') != scalars(tmp_path, 'loss')
