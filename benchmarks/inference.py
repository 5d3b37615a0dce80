"""Times inference with a configuration's network on this machine.

    python benchmarks/inference.py --config configs/ade20k_pspnet.py \
        --batch_size 4 --dtype bfloat16

From uint8 pictures to label maps of the same size, in two ways by turns: with
the variables as inputs, as eval.py and predict.py have it, and with the gains
of batch normalisation folded into the kernels, as the exports have it. Prints
images/s, compile seconds, memory and how many pixels differ; `--out DIR` keeps
them as JSON and draws them (where matplotlib is installed), `--smoke` takes a
tiny network, a small picture and few rounds. Weights are random. Needs jax,
flax and optax, and ml_collections to read a `.py`; the `config.json` of a run
is read without it.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flags import SMOKE, TINY, add_out, add_smoke, positive
from benchmarks.report import (
  describe_machine,
  device_name,
  draw_bars,
  print_table,
  write_result,
)
from benchmarks.timing import add_flags, interleaved, medians
from benchmarks.train_step import read_config
from resnest_jax import runtime
from resnest_jax.errors import run
from resnest_jax.export.folding import folded
from resnest_jax.export.program import make_program
from resnest_jax.models import implementations
from resnest_jax.models.initial import initial_variables
from resnest_jax.models.segmentor import create_segmentor

FOLDED = 'norms folded'


def programs(
  model: Any, variables: Any, size: tuple[int, int]
) -> dict[str, tuple[Callable, tuple]]:
  """Functions that end with the pictures, and what comes before those."""

  def as_inputs(variables, images):
    return make_program(model, variables, size)(images)[0]

  def constants(images):
    return folded(make_program(model, variables, size))(images)[0]

  placed = jax.tree.map(jnp.asarray, variables)
  return {
    'variables as inputs': (as_inputs, (placed,)),
    FOLDED: (constants, ()),
  }


def measure(
  config: dict, batch_size: int, size: tuple[int, int], rounds: int, clock: str
) -> dict[str, Any]:
  """Compiles and times both ways."""
  model = create_segmentor(config['model'])
  variables = initial_variables(model, 0)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch_size, *size, 3), np.uint8)
  images = jnp.asarray(images)
  figures: dict[str, dict[str, Any]] = {}
  calls, labels = {}, {}
  for name, (function, given) in programs(model, variables, size).items():
    print(f'compiling: {name}', file=sys.stderr, flush=True)
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*given, images)
    lower_seconds = time.perf_counter() - start
    start = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    figures[name] = {
      'lower_seconds': lower_seconds,
      'compile_seconds': time.perf_counter() - start,
      'temporary_mb': memory.temp_size_in_bytes / 1e6,
    }
    calls[name] = lambda run=compiled, given=given: run(*given, images)
    labels[name] = np.asarray(calls[name]())
  for name, seconds in medians(interleaved(calls, rounds, clock)).items():
    figures[name] |= {
      'images_per_second': batch_size / seconds,
      'milliseconds': 1e3 * seconds,
    }
  as_inputs, constants = labels.values()
  return {
    'ways': figures,
    'pixels_that_differ': int(np.count_nonzero(as_inputs != constants)),
    'pixels': as_inputs.size,
  }


def main() -> None:
  """Reads the command line, measures, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--config',
    default='configs/ade20k_pspnet.py',
    help='default: %(default)s; with :mini it fits a laptop',
  )
  parser.add_argument('--batch_size', type=positive, default=1)
  parser.add_argument(
    '--size',
    type=positive,
    nargs=2,
    metavar=('HEIGHT', 'WIDTH'),
    help="pixels; default: the config's crop",
  )
  parser.add_argument('--dtype', help="default: the config's")
  add_flags(parser, 10)
  add_smoke(parser)
  add_out(parser, 'JSON and picture')
  flags = parser.parse_args()
  config = read_config(flags.config)
  config['model']['dtype'] = flags.dtype or config['model']['dtype']
  size = tuple(flags.size or config['data']['crop_size'])
  if flags.smoke:
    config['model'] |= TINY
    size, flags.rounds = (32, 48), 2
  result = describe_machine() | {
    'config': config['name'],
    'devices': runtime.describe_devices(),
    'dtype': config['model']['dtype'],
    'batch_size': flags.batch_size,
    'size': size,
    'rounds': flags.rounds,
    'clock': flags.clock,
    'forms': dict(implementations.current()),
    **measure(config, flags.batch_size, size, flags.rounds, flags.clock),
  }
  print_table(
    ['', 'images/s', 'lower, s', 'compile, s', 'temporaries, MB'],
    [
      [
        name,
        f'{way["images_per_second"]:.3g}',
        f'{way["lower_seconds"]:.1f}',
        f'{way["compile_seconds"]:.1f}',
        f'{way["temporary_mb"]:.0f}',
      ]
      for name, way in result['ways'].items()
    ],
  )
  print(f'{result["pixels_that_differ"]} of {result["pixels"]} pixels differ')
  if flags.smoke:
    print(SMOKE)
  if flags.out:
    name = f'inference-{result["config"]}-{result["dtype"]}'
    name = f'{name}-b{flags.batch_size}-{device_name()}'
    path = write_result(flags.out, name, result, flags.smoke)
    draw_bars(
      path.with_suffix('.png'),
      {
        'images/s': {
          name: way['images_per_second'] for name, way in result['ways'].items()
        }
      },
      'images/s',
      f'{result["config"]}, {result["devices"]}, batch {flags.batch_size}, '
      f'{size[0]} x {size[1]}',
    )


if __name__ == '__main__':
  run(main)
