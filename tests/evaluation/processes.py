"""An evaluation by two processes, as a cluster would start them.

`python tests/evaluation/processes.py OVERRIDES WORKDIR OUT` and flags of the
cluster. Each evaluation of `SPLITS` is a line of JSON; then comes that of a
run's checkpoint.
"""

import contextlib
import json
import os
import sys
import types
from pathlib import Path

import jax
import numpy as np
from evaluation import plain
from small import MINI

from resnest_jax import sharding
from resnest_jax.config import load_config
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.errors import UserError
from resnest_jax.evaluation.evaluate import evaluate
from resnest_jax.evaluation.evaluate_split import evaluate_split


def noise(number, low=(20, 20), high=(64, 64), seed=0):
  """A split of random pictures of sizes between two, both included."""
  rng, split = np.random.default_rng(seed), []
  drawn = rng.integers(low, np.add(high, 1), (number, 2)).tolist()
  for size in [low, high, *drawn][:number]:
    label = rng.integers(0, plain.CLASSES, size, np.uint8)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    name = f'image_{len(split)}'
    split.append({'image': image, 'label': label, 'name': name})
  return split


# Unevenly shared by two: three and two, one and none; and a wrong label.
SPLITS = noise(5), noise(1), noise(5)
SPLITS[2][3]['label'][0, 0] = plain.CLASSES


def outcome(split, mesh=None, batch_size=3, network=None):
  """Results of an evaluation, to be compared as JSON; or the error's text."""
  mesh = mesh or sharding.local_mesh()
  shown, batch_size = [], sharding.divisible_batch_size(batch_size, mesh)
  model, variables = network or (plain.Upsampler(), plain.VARIABLES)
  batches = make_eval_iterator(
    types.SimpleNamespace(num_threads=1, image_scale=(64, 64)),
    split,
    batch_size=batch_size,
    bucket=64,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  step = plain.make_step(model, mesh=mesh)
  given = step, variables, batches, plain.NAMES, len(split)
  try:
    with contextlib.closing(batches):
      found = evaluate(*given, on_image=lambda image: shown.append(image.index))
  except UserError as error:
    return str(error)
  return {
    'batch_size': batch_size,
    'shown': sorted(shown),
    'confusion': found.confusion.tolist(),
    'image_counts': found.image_counts.tolist(),
    'mIoU': found.scores.mIoU,
  }


def on_host(overrides, workdir, out, *flags):
  # One of JAX's ways to connect processes prints from several threads, so that
  # its lines are torn. It writes to descriptor 1; ours go to the pipe alone.
  sys.stdout = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  _, address, *_, index = flags
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(address, 2, int(index))
  for split in SPLITS:
    print(json.dumps(outcome(split)), flush=True)
  config = load_config(MINI, json.loads(overrides))
  evaluate_split(config, workdir=Path(workdir), out=Path(out))


if __name__ == '__main__':
  on_host(*sys.argv[1:])
