"""Begins trainings under one Python, resumes them under another, and compares.

    python tests/across.py .venv/bin/python .venv-oldest/bin/python

Each of the two trains without a break; the other resumes its run from the
checkpoint in the middle. From there to the end the losses must be the same
within `LIMIT`. They are computed in float64: in float32 the roundings of two
versions of JAX grow tenfold every two steps while the rate is high. Further
arguments are flags of train.py.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import kills

STEPS, LIMIT = 20, 1e-4
FLAGS = [
  '--config.model.dtype=float64',
  f'--config.train.total_steps={2 * STEPS}',
  f'--config.train.checkpoint_steps={STEPS}',
  f'--config.train.eval_steps={2 * STEPS}',
  '--config.train.log_steps=1',
]


def main():
  """Prints a line for each direction; the exit status says whether all hold."""
  pythons, flags = sys.argv[1:3], sys.argv[3:]
  if len(pythons) < 2:
    sys.exit(f'error: give two Pythons.{__doc__}')
  with tempfile.TemporaryDirectory() as name:
    kills.make_data(Path(name, 'data'))
    orders = pythons, pythons[::-1]
    worst = [compare(Path(name), *order, flags) for order in orders]
  sys.exit(not all(each < LIMIT for each in worst))


def compare(folder, first, second, flags):
  """The largest relative difference of a loss after the resumption."""
  workdir = Path(tempfile.mkdtemp(dir=folder))
  _, *train = [*kills.command(folder / 'data', workdir), *FLAGS, *flags]
  run(first, *train)
  undisturbed = losses(workdir)
  shutil.rmtree(workdir / 'checkpoints' / str(2 * STEPS))
  said = run(second, *train)
  assert f'resuming after step {STEPS} of {2 * STEPS}' in said, said
  resumed = losses(workdir)
  steps = range(STEPS + 1, 2 * STEPS + 1)
  worst = max(abs(resumed[x] / undisturbed[x] - 1) for x in steps)
  print(
    f'begun under {first}, resumed under {second}: losses of {STEPS} steps '
    f'differ by at most {worst:.1e}, {LIMIT:.0e} is allowed'
  )
  return worst


def losses(workdir):
  """Loss by step."""
  lines = map(json.loads, (workdir / 'log.jsonl').read_text().splitlines())
  return {line['step']: line['loss'] for line in lines if 'loss' in line}


def run(*command):
  """Returns what it prints; errors go to the terminal."""
  return subprocess.check_output(command, cwd=kills.ROOT, text=True)


if __name__ == '__main__':
  main()
