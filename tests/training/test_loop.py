"""Whose a workdir is, and what is looked at before anything slow."""

import json

import jax
import jax.numpy as jnp
import pytest
from small import MINI, small_config

from resnest_jax.config import load_config
from resnest_jax.errors import UserError
from resnest_jax.training import loop
from resnest_jax.training.logs import RunLog
from resnest_jax.training.step import create_training
from resnest_jax.training.workdir import claim_workdir


def claim(workdir, **overrides):
  claim_workdir(workdir, load_config(MINI, overrides)).close()


@pytest.fixture
def started(tmp_path):
  """A start that wrote its configuration and a line of its log."""
  claim(tmp_path, seed=1)
  log = RunLog(tmp_path, 0)
  log.write(0, {'compile_seconds': 1.0})
  log.close()
  (tmp_path / 'class_pixels.npy').write_bytes(b'counts of other data')
  (tmp_path / 'notes.txt').write_text('mine')
  return tmp_path


def content(workdir):
  """The seed in the configuration, and the names of the files."""
  names = {x.name for x in workdir.rglob('*') if x.is_file()}
  seed = json.loads((workdir / 'config.json').read_text())['seed']
  return seed, {name.partition('.tfevents')[0] for name in names}


LOGS = {'log.jsonl', 'class_pixels.npy', 'events.out'}
KEPT = {'.lock', 'config.json', 'notes.txt'}


def test_start_without_a_checkpoint_gives_way(started, capsys):
  # Killed while it saved.
  (started / 'checkpoints' / '2.orbax-checkpoint-tmp-0').mkdir(parents=True)
  claim(started, seed=2)
  (line,) = capsys.readouterr().out.splitlines()
  assert 'beginning anew' in line
  assert line.endswith('(seed: 1 before, 2 now)')
  assert content(started) == (2, KEPT)


def test_a_start_that_gives_way_removes_nothing_behind_a_link(tmp_path):
  workdir, theirs = tmp_path / 'run', tmp_path / 'all' / 'events.out.tfevents.1'
  theirs.parent.mkdir()
  theirs.touch()
  claim(workdir, seed=1)
  (workdir / 'tensorboard').symlink_to(theirs.parent)
  (workdir / 'class_pixels.npy').symlink_to(theirs)
  claim(workdir, seed=2)
  assert theirs.exists()
  assert content(workdir) == (2, {'.lock', 'config.json'})


def test_same_configuration_keeps_what_is_there(started, capsys):
  claim(started, **{'seed': 1, 'eval.overlays': 1})
  assert capsys.readouterr().out == ''
  assert content(started) == (1, KEPT | LOGS)


def test_run_with_a_checkpoint_is_not_replaced(started):
  checkpoints = started / 'checkpoints'
  (checkpoints / '2').mkdir(parents=True)
  # Its weights serve another run, unless the network is another one, or only
  # an interrupted state is there.
  remedy = f'a new --workdir and --config.pretrained={started}'
  for refused, told, said in (
    ({'seed': 2}, r'\(seed: 1 before, 2 now\)', True),
    ({'train.total_steps': 9}, 'train.total_steps', True),
    ({'optimizer.learning_rate': 0.3}, 'optimizer.learning_rate', True),
    ({'model.width': 24}, 'model.width', False),
  ):
    with pytest.raises(UserError, match=told) as error:
      claim(started, **{'seed': 1} | refused)
    assert (remedy in str(error.value)) == said
  assert content(started) == (1, KEPT | LOGS)
  checkpoints.rename(started / 'interrupted')
  with pytest.raises(UserError, match='Choose another --workdir') as error:
    claim(started, seed=2)
  assert 'pretrained' not in str(error.value)
  (started / 'config.json').unlink()
  with pytest.raises(UserError, match='checkpoints but no config'):
    claim(started)


@pytest.mark.parametrize(
  'text',
  [
    b'{"architectures": []}',
    *(b'{"mod', b'\x80\x02]q\xff', b'[' * 10**5, b'7', b'[]'),
    b'{"model": 3, "data": {}, "train": {}}',
    b'{"model": {"width": 1e999}, "data": {}, "train": {}}',
  ],
  ids=range(8),
)
def test_config_of_something_else_is_not_replaced(text, tmp_path):
  saved = tmp_path / 'config.json'
  saved.write_bytes(text)
  with pytest.raises(UserError, match='not written by train'):
    claim(tmp_path)
  assert saved.read_bytes() == text


def test_folder_in_the_place_of_the_config_is_told(tmp_path):
  (tmp_path / 'config.json').mkdir()
  with pytest.raises(UserError, match='not written by train'):
    claim(tmp_path)


def test_out_of_memory_is_one_error_with_its_remedies(
  mini_data_dir, tmp_path, monkeypatch
):
  def hungry(state, batch):
    return state, {'loss': jnp.zeros((2**20, 2**24)) + state.step}  # 70 TB

  def create_hungry_training(config, mesh):
    step = jax.jit(hungry, donate_argnums=0)
    return create_training(config, mesh)._replace(step=step)

  monkeypatch.setattr(loop, 'create_training', create_hungry_training)
  data = {'data.data_dir': str(mini_data_dir), 'data.doctor_samples': 0}
  remedies = r'train\.remat.*train\.micro_batch_size.*:16gb'
  with pytest.raises(UserError, match=f'too little memory.*{remedies}'):
    loop.train(small_config(**data), tmp_path)
