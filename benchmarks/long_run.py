"""Whether training becomes slower or larger with time.

    python benchmarks/long_run.py --steps 2000 --out benchmarks/results

Draws a small data set, trains on it with `train.py` in a process of its own,
evaluations and checkpoints included, and compares the last hundred steps with
the first (after a hundred to warm up): milliseconds a step, the medians of the
log's lines, and resident memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flags import add_out, positive
from benchmarks.report import describe_machine, write_result
from resnest_jax.errors import UserError, run

ROOT = Path(__file__).resolve().parent.parent
LOG_STEPS = 10
# As small as it gets: it is the loop that is watched.
SMALL = (
  '--config.model.width=8',
  '--config.model.stem_width=8',
  '--config.model.head_channels=16',
  '--config.model.aux_channels=8',
  '--config.data.image_scale=64,64',
  '--config.data.scale_range=1.0,1.5',
  '--config.data.crop_size=32,32',
  '--config.data.doctor_samples=0',
  '--config.train.batch_size=4',
  '--config.train.keep_checkpoints=2',
  f'--config.train.log_steps={LOG_STEPS}',
  '--config.eval.batch_size=4',
  '--config.eval.bucket=64',
)


def prepare(folder: Path) -> None:
  """A data set of 24 and 8 images."""
  arguments = ('ade20k_mini', '--images', '24', '8', '--data_dir', folder)
  command = (sys.executable, '-m', 'resnest_jax.data.prepare', *arguments)
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def train(data: Path, workdir: Path, steps: int) -> list[dict[str, float]]:
  """Step, milliseconds a step and megabytes of memory at each line of the log.

  Raises:
    UserError: the training failed; the message ends with what it said.
  """
  command = [
    *(sys.executable, 'train.py', '--config', 'configs/ade20k_pspnet.py:mini'),
    *SMALL,
    f'--config.data.data_dir={data}',
    f'--config.train.total_steps={steps}',
    f'--config.train.eval_steps={max(steps // 4, LOG_STEPS)}',
    f'--config.train.checkpoint_steps={max(steps // 20, LOG_STEPS)}',
    *('--workdir', str(workdir)),
  ]
  memory, said = {}, []
  with subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | {'PYTHONUNBUFFERED': '1'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as process:
    for line in process.stdout:
      said.append(line)
      if line.startswith('step ') and 'images/s' in line:
        step = int(line.split()[1].partition('/')[0])
        memory[step] = psutil.Process(process.pid).memory_info().rss / 1e6
        if step % (steps // 10) == 0:
          print(line.rstrip(), f' {memory[step]:.0f} MB', flush=True)
  if process.returncode:
    raise UserError(f'the training failed: {"".join(said[-5:])}')
  log = map(json.loads, (workdir / 'log.jsonl').read_text().splitlines())
  return [
    {
      'step': row['step'],
      'milliseconds': 1e3 * row['step_seconds'],
      'megabytes': memory[row['step']],
    }
    for row in log
    if 'step_seconds' in row
  ]


def compare(rows: list[dict[str, float]], steps: int) -> dict[str, float]:
  """Medians of the first tenth after the warm-up and of the last.

  Args:
    rows: of `train`.
    steps: how many steps warm up, are the first ones and the last ones.
  """
  last = rows[-1]['step']
  parts = {
    'first': [x for x in rows if steps < x['step'] <= 2 * steps],
    'last': [x for x in rows if last - steps < x['step']],
  }
  return {
    f'{name}_{key}': statistics.median(x[key] for x in part)
    for name, part in parts.items()
    for key in ('milliseconds', 'megabytes')
  }


def main() -> None:
  """Reads the command line, trains, compares and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--steps', type=positive, default=2000, help='default: 2000'
  )
  add_out(parser)
  flags = parser.parse_args()
  part = min(100, flags.steps // 3)
  if part < LOG_STEPS:
    raise UserError(f'--steps is {flags.steps}; give {3 * LOG_STEPS} or more.')
  with tempfile.TemporaryDirectory() as folder:
    prepare(Path(folder) / 'data')
    rows = train(Path(folder) / 'data', Path(folder) / 'run', flags.steps)
  found = compare(rows, part)
  print(
    f'{part} steps after the first {part}: '
    f'{found["first_milliseconds"]:.1f} ms, {found["first_megabytes"]:.0f} MB; '
    f'the last {part}: {found["last_milliseconds"]:.1f} ms, '
    f'{found["last_megabytes"]:.0f} MB'
  )
  if flags.out:
    result = describe_machine() | {'steps': flags.steps, **found, 'rows': rows}
    write_result(flags.out, 'long_run', result)


if __name__ == '__main__':
  run(main)
