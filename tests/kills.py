"""Kills a small training at random instants and compares what becomes of it.

    python tests/kills.py --kills 25

Each run is killed up to five times, started again with the same command, and
must end as one that nothing disturbed: with the same bits in every array, the
same log and checkpoints. The status is 1 if anything differs.
"""

import argparse
import collections
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1
from subprocess import PIPE, STDOUT, CompletedProcess

import hosts
import numpy as np
from small import small_flags

from resnest_jax.drawing import write_image

STEPS = 12
# The time goes into starting.
SMALL = {'model.head': 'fcn', 'model.radix': 1, 'model.head_channels': 8}
SMALL |= {'data.image_scale': (48, 48), 'data.doctor_samples': 0}
SMALL |= {'train.total_steps': STEPS, 'train.checkpoint_steps': 4}
SMALL |= {'train.eval_steps': 6, 'train.log_steps': 3}
SMALL |= {'eval.batch_size': 2, 'eval.bucket': 48}
# What differs from run to run.
SPEEDS = {'images_per_second', 'step_seconds', 'data_wait'}
SPEEDS |= {'trace_seconds', 'compile_seconds'}
# When to kill: after which line of the output, and up to how many seconds
# later. A save is recognised by its folder.
MOMENTS = {
  'start': ('', 4.0),
  'compile': ('compiling', 0.8),
  'step': ('step ', 0.2),
  'evaluation': ('step 6/', 0.6),
  'end': (f'step {STEPS}/', 0.8),
  'save': (None, 0.03),
}
# Exit statuses.
STATUS = {SIGKILL: -SIGKILL, SIGTERM: 75, SIGUSR1: 75, SIGINT: 130}
# When a process is ended, and how: a key of MOMENTS, a signal, and seconds
# after the moment has come.
Kill = collections.namedtuple('Kill', 'moment signal delay')


def make_data(folder):
  """Writes 16 training and 6 validation images with masks of three classes."""
  rng = np.random.default_rng(0)
  for split, number in (('train', 16), ('val', 6)):
    for index in range(number):
      mask = np.full((48, 48), index % 3, np.uint8)
      mask[8:40, 10:30] = (index + 1) % 3
      image = rng.integers(0, 60, (48, 48, 3), np.uint8) + 90 * mask[..., None]
      write_image(folder / 'images' / split / f'{index}.png', image)
      write_image(folder / 'masks' / split / f'{index}.png', mask)
  (folder / 'classes.txt').write_text('sky 0 0 255\nwall 255 0 0\nroad 0 255 0')


def command(data, workdir, **keys):
  """`keys` are dotted ones, as those of `SMALL`."""
  flags = small_flags(SMALL | keys)
  words = 'train.py', '--config', 'configs/folder.py:mini', *flags
  return *words, f'--config.data.data_dir={data}', '--workdir', workdir


def start(arguments, stderr=STDOUT, **variables):
  """On one device, which is quicker; both outputs can be read as one."""
  return hosts.start(*arguments, devices=1, stderr=stderr, **variables)


def run(arguments):
  process = start(arguments, PIPE)
  printed = hosts.finish(process, None, timeout=600)
  return CompletedProcess(arguments, process.returncode, *printed)


def run_and_kill(arguments, workdir, kill, **variables):
  """Kills it, unless it ends before: status, seconds to the end, output."""
  line, printed = MOMENTS[kill.moment][0], []
  with start(arguments, **variables) as process:
    if line is None:
      unfinished = 'checkpoints/*orbax-checkpoint-tmp*'
      while process.poll() is None and not any(workdir.glob(unfinished)):
        time.sleep(0.002)
    elif line:
      for text in process.stdout:
        printed.append(text)
        if text.startswith(line):
          break
    time.sleep(kill.delay)
    process.send_signal(kill.signal)  # Does nothing if it has ended.
    signalled = time.monotonic()
    printed.append(process.stdout.read())
  seconds = time.monotonic() - signalled
  return process.returncode, seconds, ''.join(printed)


def outcome(workdir):
  """All that a finished run must have in common with another, by name."""
  from resnest_jax.checkpoints import integrity, store

  with store.open_checkpoints(workdir, read_only=True) as kept:
    newest = kept.latest_step()
    trees, about = integrity.read_items(
      kept, newest, model=None, optimizer=None
    )
  found = {'scores': (about['best'], about['stale'], about['metrics'])}
  found['checkpoints'] = sorted(os.listdir(workdir / 'checkpoints'))
  found |= {x: (workdir / x).exists() for x in ('interrupted', 'curves.png')}
  for name, x in integrity.array_names(trees).items():
    found[name] = (x.shape, x.dtype.name, x.tobytes())
  lines = (workdir / 'log.jsonl').read_text().splitlines()
  for line in map(json.loads, lines):
    for name in line.keys() - SPEEDS - {'step'}:
      found.setdefault(f'log {name}', []).append((line['step'], line[name]))
  return found


def differences(run, undisturbed):
  """The names of what is not the same in two finished runs."""
  first, second = outcome(run), outcome(undisturbed)
  return sorted(x for x in {*first, *second} if first.get(x) != second.get(x))


def disturb(arguments, workdir, rng, most):
  """Kills a run up to `most` times; how often."""
  for number in range(most):
    moment, (_, late) = rng.choice(list(MOMENTS.items()))
    kill = Kill(moment, rng.choice(list(STATUS)), rng.uniform(0, late))
    status, seconds, printed = run_and_kill(arguments, workdir, kill)
    if status == 0:
      return number  # It was faster.
    said = f'{workdir}, {kill}: status {status} after {seconds:.1f} s'
    if status not in (STATUS[kill.signal], -kill.signal):
      sys.exit(f'{said}:\n{printed}')
    print(said, flush=True)
  return most


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=25, help='default: 25')
  parser.add_argument('--seed', type=int, default=0, help='of the instants')
  flags = parser.parse_args()
  import conftest  # noqa: F401  Sets the tests' variables.

  rng = random.Random(flags.seed)
  folder = Path(tempfile.mkdtemp(prefix='kills-'))
  data, undisturbed = folder / 'data', folder / 'undisturbed'
  make_data(data)
  run(command(data, undisturbed)).check_returncode()
  kills = runs = 0
  while kills < flags.kills:
    runs += 1
    workdir = folder / f'run-{runs}'
    arguments, most = command(data, workdir), min(5, flags.kills - kills)
    kills += (number := disturb(arguments, workdir, rng, most))
    if (last := run(arguments)).returncode:
      sys.exit(f'{workdir} needs a hand:\n{last.stdout}{last.stderr}')
    if differ := differences(workdir, undisturbed):
      sys.exit(f'{workdir} differs in {", ".join(differ[:9])}')
    print(f'run {runs}: the same bits after {number} kills', flush=True)
  print(f'{kills} kills of {runs} runs')
  shutil.rmtree(folder)


if __name__ == '__main__':
  main()
