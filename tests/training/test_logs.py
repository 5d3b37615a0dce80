"""The log of a run that was interrupted and continued."""

import json

from resnest_jax.training.logs import RunLog


def steps(path):
  return [json.loads(line)['step'] for line in path.read_text().splitlines()]


def test_continuing_drops_what_lies_beyond_the_checkpoint(tmp_path):
  log = RunLog(tmp_path, 0)
  for step in (10, 20, 30):
    log.write(step, {'loss': 1.0 / step})
  log.close()
  with log.path.open('a') as file:
    file.write('[3]\n7\n{"step": null}\n{"loss": 1}\n' + '[' * 10000 + '\n')
  with log.path.open('ab') as file:
    file.write(b'\x80\xff\n{"step": 40, "lo')  # Cut off by a kill.
  log = RunLog(tmp_path, 20)
  assert steps(log.path) == [10, 20]
  log.write(30, {'loss': 0.5})
  log.close()
  assert steps(log.path) == [10, 20, 30]
  assert json.loads(log.path.read_text().splitlines()[-1])['loss'] == 0.5


def test_writing_for_tensorboard_does_not_load_torch(run_script, tmp_path):
  program = (
    'import sys, pathlib; from resnest_jax.training.logs import RunLog\n'
    'log = RunLog(pathlib.Path(sys.argv[1]), 0)\n'
    'log.write(1, {"loss": 0.5}); log.close()\n'
    'print("torch" in sys.modules); import torch; print(torch.ones(2).sum())'
  )
  done = run_script('-c', program, tmp_path)
  assert done.stdout == 'False\ntensor(2.)\n'
  assert len(list((tmp_path / 'tensorboard').glob('events*'))) == 1
