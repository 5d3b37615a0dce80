"""Logs of a run that was interrupted, Weights & Biases, profiles."""

import json
import struct

import jax.numpy as jnp
import pytest
import wandb
from small import small_config
from wandb.proto.wandb_internal_pb2 import Record

from resnest_jax.errors import UserError
from resnest_jax.training.logs import RunLog, start_wandb
from resnest_jax.training.profiling import Profile, parse_steps


def logged(log):
  return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_continuing_drops_what_lies_beyond_the_checkpoint(tmp_path):
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


def history(paths):
  """The scalars in files that `wandb sync` would send."""
  rows = []
  for path in paths:
    data = path.read_bytes()[7:]  # After a header, records in LevelDB's format.
    while data:
      _, length, kind = struct.unpack('<IHB', data[:7])
      assert kind == 1  # A whole one.
      items = Record.FromString(data[7 : 7 + length]).history.item
      data = data[7 + length :]
      named = {''.join(x.nested_key) or x.key: x.value_json for x in items}
      if named:
        rows.append({k: json.loads(v) for k, v in named.items() if k[0] != '_'})
  return rows


def test_weights_and_biases_get_the_scalars_and_go_on(tmp_path, monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  for step in (1, 2):
    log = RunLog(tmp_path, step - 1)
    config = small_config(**{'seed': 7, 'train.wandb': 'rows'})
    log.wandb = start_wandb(tmp_path, config)
    log.write(step, {'loss': 0.5 * step})
    assert wandb.run.config['seed'] == 7
    assert wandb.run.project == 'rows'
    log.close()
    assert wandb.run is None
  runs = sorted((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))
  known = (tmp_path / 'wandb' / 'run_id').read_text()
  assert {path.stem for path in runs} == {f'run-{known}'}
  assert history(runs) == [{'loss': 0.5}, {'loss': 1.0}]
