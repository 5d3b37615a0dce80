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

from small import MINI, small_flags

ROOT = Path(__file__).resolve().parent.parent
STEPS, LIMIT = 20, 1e-4
FLAGS = small_flags(
  {
    **{'model.dtype': 'float64', 'model.head': 'fcn', 'model.radix': 1},
    **{'train.total_steps': 2 * STEPS, 'train.checkpoint_steps': STEPS},
    **{'train.eval_steps': 2 * STEPS, 'train.log_steps': 1},
    **{'train.pictures': 0, 'data.doctor_samples': 0},
  }
)


def main() -> None:
  """Prints a line for each direction; the exit status says whether all hold."""
  pythons, flags = sys.argv[1:3], sys.argv[3:]
  if len(pythons) < 2:
    sys.exit(f'error: give two Pythons.{__doc__}')
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    prepare = ('-m', 'resnest_jax.data.prepare', 'ade20k_mini')
    run(pythons[0], *prepare, '--images', '24', '8', '--data_dir', folder)
    flags = [*FLAGS, f'--config.data.data_dir={folder}', *flags]
    worst = [
      compare(folder / f'run{i}', *order, flags)
      for i, order in enumerate((pythons, pythons[::-1]))
    ]
  sys.exit(not all(each < LIMIT for each in worst))


def compare(workdir: Path, first: str, second: str, flags: list[str]) -> float:
  """The largest relative difference of a loss after the resumption."""
  train = ('train.py', '--config', MINI, *flags, '--workdir', workdir)
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


def losses(workdir: Path) -> dict[int, float]:
  """Loss by step."""
  lines = map(json.loads, (workdir / 'log.jsonl').read_text().splitlines())
  return {line['step']: line['loss'] for line in lines if 'loss' in line}


def run(python: str, *arguments: str | Path) -> str:
  """Returns what it prints; ends with its errors where it fails."""
  command = [python, *map(str, arguments)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f'{" ".join(map(str, arguments))}\n{done.stdout}{done.stderr}')
  return done.stdout


if __name__ == '__main__':
  main()
