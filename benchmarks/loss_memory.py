"""Memory of the loss: in tiles of rows, and of logits upsampled as a whole.

    python benchmarks/loss_memory.py
    python benchmarks/loss_memory.py --batch_size 16 --size 512 --classes 150

Bytes are those that XLA plans for value and gradient besides inputs and
outputs (`memory_analysis`); nothing of that size is run. With `--timed 2` both
are also run for two images, by turns. `--smoke` takes small images. Needs jax
and NumPy; with matplotlib `--out` draws.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flags import SMOKE, add_out, add_smoke, natural, positive
from benchmarks.report import (
  describe_machine,
  draw_bars,
  print_table,
  write_result,
)
from benchmarks.timing import add_flags, interleaved, medians
from resnest_jax import runtime
from resnest_jax.errors import run
from resnest_jax.labels import IGNORE
from resnest_jax.losses.pixels import segmentation_loss
from resnest_jax.models.layers import resize

STRIDE = 8  # Of the logits.


def tiled(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Ours: the mean over all pixels."""
  return segmentation_loss(logits, labels, avg_non_ignore=False)[0]


def plain(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The same of upsampled logits."""
  log_softmax = jax.nn.log_softmax(resize(logits, labels.shape[1:]))
  valid = labels != IGNORE
  chosen = jnp.take_along_axis(
    log_softmax, jnp.where(valid, labels, 0)[..., None], -1
  )[..., 0]
  return -jnp.sum(jnp.where(valid, chosen, 0)) / labels.size


WAYS = {'in tiles': tiled, 'upsampled': plain}


def compiled(
  loss: Callable, batch: int, size: int, classes: int, dtype: Any = jnp.float32
) -> jax.stages.Compiled:
  """Value and gradient for logits of stride 8, compiled."""
  small = size // STRIDE
  logits = jax.ShapeDtypeStruct((batch, small, small, classes), dtype)
  labels = jax.ShapeDtypeStruct((batch, size, size), jnp.int32)
  return jax.jit(jax.value_and_grad(loss)).lower(logits, labels).compile()


def temporary_bytes(loss: Callable, batch: int, size: int, classes: int) -> int:
  """What its program needs besides inputs and outputs."""
  program = compiled(loss, batch, size, classes)
  return program.memory_analysis().temp_size_in_bytes


def seconds(
  batch: int, size: int, classes: int, rounds: int, clock: str
) -> dict:
  """Medians of a run of both ways."""
  rng = np.random.default_rng(0)
  small = size // STRIDE
  logits = rng.standard_normal((batch, small, small, classes), np.float32)
  labels = rng.integers(0, classes, (batch, size, size), np.int32)
  logits, labels = jnp.asarray(logits), jnp.asarray(labels)
  programs = {
    name: compiled(loss, batch, size, classes) for name, loss in WAYS.items()
  }
  return medians(
    interleaved(
      {
        name: lambda run=program: run(logits, labels)
        for name, program in programs.items()
      },
      rounds,
      clock,
    )
  )


def main() -> None:
  """Reads the command line, measures, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--batch_size', type=positive, default=16)
  parser.add_argument('--size', type=positive, default=512, help='of the crop')
  parser.add_argument('--classes', type=positive, default=150)
  parser.add_argument(
    '--timed', type=natural, default=0, metavar='IMAGES', help='run these, too'
  )
  add_flags(parser, 5)
  add_smoke(parser)
  add_out(parser, 'JSON and picture')
  flags = parser.parse_args()
  if flags.smoke:
    flags.batch_size, flags.size, flags.classes, flags.timed = 2, 64, 10, 1
  shape = flags.batch_size, flags.size, flags.classes
  found = {name: temporary_bytes(loss, *shape) for name, loss in WAYS.items()}
  result = describe_machine() | {
    'devices': runtime.describe_devices(),
    'batch_size': flags.batch_size,
    'size': flags.size,
    'classes': flags.classes,
    'clock': flags.clock,
    'temporary_bytes': found,
    'ratio': found['upsampled'] / found['in tiles'],
  }
  columns, rows = ['', 'MB'], [[n, f'{b / 1e6:.1f}'] for n, b in found.items()]
  if flags.timed:
    times = seconds(flags.timed, *shape[1:], flags.rounds, flags.clock)
    result |= {'timed_images': flags.timed, 'seconds': times}
    columns.append(f'ms, {flags.timed} images')
    for row, value in zip(rows, times.values(), strict=True):
      row.append(f'{1e3 * value:.1f}')
  print_table(columns, rows)
  print(f'upsampled takes {result["ratio"]:.1f} times as much memory')
  if flags.smoke:
    print(SMOKE)
  if flags.out:
    path = write_result(flags.out, 'loss_memory', result, flags.smoke)
    draw_bars(
      path.with_suffix('.png'),
      {'temporaries': {name: n / 1e6 for name, n in found.items()}},
      'MB',
      f'{flags.batch_size} x {flags.size} x {flags.size} x {flags.classes}',
    )


if __name__ == '__main__':
  run(main)
