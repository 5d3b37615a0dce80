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


def started(workdir, **overrides):
  """A start that wrote its configuration and a line of its log."""
  claim(workdir, **overrides)
  log = RunLog(workdir, 0)
  log.write(0, {'compile_seconds': 1.0})
  log.close()
  (workdir / 'class_pixels.npy').write_bytes(b'counts of other data')
  (workdir / 'notes.txt').write_text('mine')


def files(workdir):
  return {
    path.name.partition('.tfevents')[0]
    for path in workdir.rglob('*')
    if path.is_file()
  }


def seed_of(workdir):
  return json.loads((workdir / 'config.json').read_text())['seed']


def test_start_without_a_checkpoint_gives_way(tmp_path, capsys):
  started(tmp_path, seed=1)
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp-0').mkdir()  # Killed.
  claim(tmp_path, seed=2)
  (line,) = capsys.readouterr().out.splitlines()
  assert 'beginning anew' in line
  assert line.endswith('(seed: 1 before, 2 now)')
  assert seed_of(tmp_path) == 2
  assert files(tmp_path) == {'.lock', 'config.json', 'notes.txt'}


def test_a_start_that_gives_way_removes_nothing_behind_a_link(tmp_path):
  theirs = tmp_path / 'all' / 'events.out.tfevents.1'
  theirs.parent.mkdir()
  theirs.touch()
  workdir = tmp_path / 'run'
  claim(workdir, seed=1)
  (workdir / 'tensorboard').symlink_to(theirs.parent)
  (workdir / 'class_pixels.npy').symlink_to(theirs)
  claim(workdir, seed=2)
  assert theirs.exists()
  assert files(workdir) == {'.lock', 'config.json'}


def test_same_configuration_keeps_what_is_there(tmp_path, capsys):
  started(tmp_path)
  before = files(tmp_path)
  claim(tmp_path, **{'eval.overlays': 1})
  assert capsys.readouterr().out == ''
  assert files(tmp_path) == before
  assert {'log.jsonl', 'class_pixels.npy', 'events.out'} <= before


def test_run_with_a_checkpoint_is_not_replaced(tmp_path):
  started(tmp_path, seed=1)
  before = files(tmp_path)
  (tmp_path / 'checkpoints' / '2').mkdir(parents=True)
  with pytest.raises(UserError, match=r'\(seed: 1 before, 2 now\)'):
    claim(tmp_path, seed=2)
  assert seed_of(tmp_path) == 1
  assert files(tmp_path) == before
  # Its weights serve another run, unless the network is another one, or only
  # an interrupted state is there.
  for refused, said in (
    ({'train.total_steps': 9}, True),
    ({'optimizer.learning_rate': 0.3}, True),
    ({'model.width': 24}, False),
  ):
    with pytest.raises(UserError) as error:
      claim(tmp_path, **{'seed': 1} | refused)
    remedy = f'a new --workdir and --config.pretrained={tmp_path}'
    assert (remedy in str(error.value)) == said
  (tmp_path / 'checkpoints').rename(tmp_path / 'interrupted')
  with pytest.raises(UserError, match='Choose another --workdir') as error:
    claim(tmp_path, seed=2)
  assert 'pretrained' not in str(error.value)
  (tmp_path / 'config.json').unlink()
  with pytest.raises(UserError, match='checkpoints but no config'):
    claim(tmp_path)


@pytest.mark.parametrize(
  'content',
  [
    b'{"architectures": []}',
    *(b'{"mod', b'\x80\x02]q\xff', b'[' * 10**5, b'7', b'[]'),
    b'{"model": 3, "data": {}, "train": {}}',
    b'{"model": {"width": 1e999}, "data": {}, "train": {}}',
  ],
  ids=range(8),
)
def test_config_of_something_else_is_not_replaced(content, tmp_path):
  (tmp_path / 'config.json').write_bytes(content)
  with pytest.raises(UserError, match='not written by train'):
    claim(tmp_path)
  assert (tmp_path / 'config.json').read_bytes() == content


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
  config = small_config(
    **{'data.data_dir': str(mini_data_dir), 'data.doctor_samples': 0}
  )
  remedies = r'train\.remat.*train\.micro_batch_size.*:16gb'
  with pytest.raises(UserError, match=f'too little memory.*{remedies}'):
    loop.train(config, tmp_path)
