"""A run's folder: whose it is, and the logs and profiles in it; its memory."""

import json
import shutil
import struct
import time

import jax
import jax.numpy as jnp
import pytest
import wandb
from evaluation import class_runs
from small import MINI, small_config
from wandb.proto.wandb_internal_pb2 import Record
from weights import built

from resnest_jax.checkpoints.manager import steps_in
from resnest_jax.checkpoints.store import interrupted_dir
from resnest_jax.config import load_config
from resnest_jax.config_keys import MAIN_SCORES
from resnest_jax.errors import UserError
from resnest_jax.training import loop
from resnest_jax.training.logs import RunLog, start_wandb
from resnest_jax.training.profiling import Profile, parse_steps
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


def test_out_of_memory_has_remedies(mini_data_dir, tmp_path, monkeypatch):
  def hungry(state, batch):
    return state, {'loss': jnp.zeros((2**20, 2**24)) + state.step}  # 70 TB

  def create_hungry_training(*arguments, **options):
    step = jax.jit(hungry, donate_argnums=0)
    return create_training(*arguments, **options)._replace(step=step)

  monkeypatch.setattr(loop, 'create_training', create_hungry_training)
  data = {'data.data_dir': str(mini_data_dir), 'data.doctor_samples': 0}
  remedies = r'train\.remat.*train\.micro_batch_size.*:16gb'
  with pytest.raises(UserError, match=f'too little memory.*{remedies}'):
    loop.train(small_config(**data), tmp_path)


def logged(log):
  return [json.loads(line) for line in log.path.read_text().splitlines()]


@pytest.mark.parametrize('main', MAIN_SCORES)
def test_scores_of_an_evaluation_that_is_repeated_are_dropped(main, tmp_path):
  log = RunLog(tmp_path, 0)
  for step in (10, 20):
    log.write(step, {'loss': 1.0})
    log.write(step, {main: 0.5})
  log.close()
  RunLog(tmp_path, 20, evaluate=True).close()
  kept = [{'step': 10, 'loss': 1.0}, {'step': 10, main: 0.5}]
  assert logged(log) == [*kept, {'step': 20, 'loss': 1.0}]


def test_continuing_drops_what_lies_beyond_the_checkpoint(tmp_path):
  (tmp_path / 'log.jsonl').symlink_to('elsewhere')  # Replaced, not followed.
  log = RunLog(tmp_path, 0)
  for step in (10, 20, 30):
    log.write(step, {'loss': 1.0 / step})
  log.close()
  with log.path.open('ab') as file:
    file.write(b'[3]\n7\n{"step": null}\n{"loss": 1}\n' + b'[' * 10000)
    file.write(b'\n\x80\xff\n{"step": 40, "lo')  # Cut off by a kill.
  log = RunLog(tmp_path, 20)
  kept = [{'step': 10, 'loss': 0.1}, {'step': 20, 'loss': 0.05}]
  assert logged(log) == kept
  log.write(30, {'loss': 0.5})
  log.close()
  assert logged(log) == [*kept, {'step': 30, 'loss': 0.5}]
  assert not (tmp_path / 'elsewhere').exists()


def test_writing_for_tensorboard_does_not_load_torch(run_script, tmp_path):
  program = (
    'import sys, pathlib; from resnest_jax.training.logs import RunLog\n'
    'log = RunLog(pathlib.Path(sys.argv[1]), 0)\n'
    'log.write(1, {"loss": 0.5}); log.close()\n'
    'print("torch" in sys.modules); import torch; print(torch.ones(2).sum())'
  )
  done = run_script('-c', program, tmp_path)
  assert done.stdout == 'False\ntensor(2.)\n'


def test_steps_of_a_profile():
  assert [parse_steps(x) for x in ('10:15', '3:3')] == [(10, 15), (3, 3)]
  for text in ('10', '5:', '0:3', '7:6'):
    with pytest.raises(UserError, match=f'--profile {text}: .* step'):
      parse_steps(text)


@pytest.mark.parametrize(('steps', 'some'), [((2, 9), True), ((5, 6), False)])
def test_profile_that_is_cut_off_is_still_written(tmp_path, steps, some):
  """One beyond the end of the run traces nothing."""
  profile = Profile(tmp_path, steps)
  for step in (1, 2):
    profile.before(step)
    profile.after(step, jnp.ones(3).sum())
  profile.close()
  assert any(tmp_path.rglob('*.xplane.pb')) == some
  profile.before(3)  # Is over.
  profile.close()


def history(path):
  """The scalars in a file that `wandb sync` would send."""
  data = path.read_bytes()[7:]  # After a header, records in LevelDB's format.
  while data:
    _, length, kind = struct.unpack('<IHB', data[:7])
    assert kind == 1  # A whole one.
    items = Record.FromString(data[7 : 7 + length]).history.item
    data = data[7 + length :]
    named = {''.join(x.nested_key) or x.key: x.value_json for x in items}
    if named:
      yield {k: json.loads(v) for k, v in named.items() if k[0] != '_'}


def test_weights_and_biases_get_the_scalars_and_go_on(tmp_path, monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  for step in (1, 2):
    config = small_config(**{'seed': 7, 'train.wandb': 'rows'})
    log = RunLog(tmp_path, step - 1, wandb=start_wandb(tmp_path, config))
    log.write(step, {'loss': 0.5 * step})
    assert wandb.run.config['seed'] == 7
    assert wandb.run.project == 'rows'
    log.close()
    assert wandb.run is None
    time.sleep(1)  # The folder of a run is named by the second.
  runs = sorted((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))
  known = (tmp_path / 'wandb' / 'run_id').read_text()
  assert {path.stem for path in runs} == {f'run-{known}'}
  rows = [row for path in runs for row in history(path)]
  assert rows == [{'loss': 0.5}, {'loss': 1.0}]


def test_damage_that_an_evaluation_finds_loses_no_step(tmp_path):
  data = class_runs.write_pictures(tmp_path / 'data')
  (data / 'train').unlink()
  shutil.copytree(data / 'val', data / 'train')
  picture = data / 'val/ant/0.png'
  whole = picture.read_bytes()
  picture.write_bytes(whole[:99])
  keys = {'data.data_dir': str(data), 'model.frozen_bn': 'none'}
  keys |= {'train.batch_size': 4, 'train.total_steps': 2}
  keys['optimizer.warmup_steps'] = 0
  config = load_config(class_runs.ROW, class_runs.OVERRIDES | keys)
  run = tmp_path / 'run'
  built.refused(r'ant/0\.png', loop.train, config, run)
  assert steps_in(interrupted_dir(run)) == [2]
  picture.write_bytes(whole)
  loop.train(config, run)
  lines = [json.loads(x) for x in (run / 'log.jsonl').read_text().splitlines()]
  assert [x['step'] for x in lines if 'top1' in x] == [2]
  assert [x['step'] for x in lines if 'loss' in x] == [2]
