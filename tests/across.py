"""Begins trainings under one Python and resumes them under another.

    python tests/across.py .venv/bin/python .venv-oldest/bin/python

From there on the losses must be those of a run without a break, within `LIMIT`.
In float64: in float32 the roundings of two versions of JAX grow tenfold every
two steps while the rate is high. Further arguments are flags of train.py.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hosts
import kills

STEPS, LIMIT = 20, 1e-4
LAST = 2 * STEPS
FLAGS = [f'--config.train.{x}_steps={LAST}' for x in ('total', 'eval')]
FLAGS += [f'--config.train.checkpoint_steps={STEPS}']
FLAGS += ['--config.train.log_steps=1', '--config.model.dtype=float64']


def main():
  """Prints a line for each direction; the exit status says whether all hold."""
  first, second, *flags = sys.argv[1:]
  with tempfile.TemporaryDirectory() as name:
    kills.make_data(Path(name, 'data'))
    orders = (first, second), (second, first)
    worst = [compare(Path(name), *order, flags) for order in orders]
  sys.exit(not all(each < LIMIT for each in worst))


def compare(folder, first, second, flags):
  """The largest relative difference of a loss after the resumption."""
  workdir = Path(tempfile.mkdtemp(dir=folder))
  words = [*kills.command(folder / 'data', workdir), *FLAGS, *flags]

  def train(python):  # Loss by step, and what was printed.
    said = subprocess.check_output([python, *words], cwd=hosts.ROOT, text=True)
    lines = map(json.loads, (workdir / 'log.jsonl').open())
    return {x['step']: x['loss'] for x in lines if 'loss' in x}, said

  undisturbed, _ = train(first)
  shutil.rmtree(workdir / 'checkpoints' / str(LAST))
  resumed, said = train(second)
  assert f'resuming after step {STEPS} of {LAST}' in said, said
  steps = range(STEPS + 1, LAST + 1)
  worst = max(abs(resumed[x] / undisturbed[x] - 1) for x in steps)
  print(f'{first}, then {second}: the losses differ by {worst:.1e} at most')
  return worst


if __name__ == '__main__':
  main()
