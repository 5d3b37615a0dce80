"""The log of a run that was interrupted and continued."""

import json

from resnest_jax.training.logs import RunLog, duration


def steps(path):
  return [json.loads(line)['step'] for line in path.read_text().splitlines()]


def test_continuing_drops_what_lies_beyond_the_checkpoint(tmp_path):
  log = RunLog(tmp_path, 0)
  for step in (10, 20, 30):
    log.write(step, {'loss': 1.0 / step})
  log.close()
  with log.path.open('a') as file:
    file.write('{"step": 40, "lo')  # Cut off by a kill.
  log = RunLog(tmp_path, 20)
  assert steps(log.path) == [10, 20]
  log.write(30, {'loss': 0.5})
  log.close()
  assert steps(log.path) == [10, 20, 30]
  assert json.loads(log.path.read_text().splitlines()[-1])['loss'] == 0.5


def test_duration():
  assert duration(3723.4) == '1:02:03'
  assert duration(59.7) == '1:00'
  assert duration(7) == '0:07'
