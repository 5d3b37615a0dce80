"""Times the training step of a configuration on this machine.

    python benchmarks/train_step.py --config configs/ade20k_pspnet.py \
        --batch_size 16 --dtype bfloat16

Prints compile seconds, ms a step, images/s, memory, and the share of the
device's peak that the model's operations (three times those of the forward
pass) make up; `--out DIR` keeps them as JSON. Data is random and stays on the
device. Needs jax, flax and optax, and ml_collections to read a `.py`; the
`config.json` of a run is read without it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flags import add_out, positive
from benchmarks.flops import count_flops
from benchmarks.report import describe_machine, device_name, write_result
from resnest_jax import runtime, sharding
from resnest_jax.checkpoints.state import create_state
from resnest_jax.errors import UserError, run
from resnest_jax.models import implementations
from resnest_jax.models.initial import initial_variables
from resnest_jax.models.segmentor import scanned
from resnest_jax.text import duration
from resnest_jax.training.step import compile_step, create_training

# Makers' figures for dense bfloat16 matrix products, operations/s a device.
PEAK = {
  'NVIDIA H200': 989e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA A100-SXM4-40GB': 312e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
}


def read_config(spec: str) -> dict:
  """A configuration as nested dicts, from a `.py[:argument]` or a `.json`."""
  if spec.endswith('.json'):
    try:
      return json.loads(Path(spec).read_text('utf-8'))
    except (OSError, ValueError) as error:
      raise UserError(
        f'--config {spec} cannot be read ({error}); name the config.json of a '
        "run's folder, or a file in configs/."
      ) from error
  from resnest_jax.config import load_config

  return load_config(spec).to_dict()


def random_batch(batch_size: int, crop: tuple[int, int], classes: int) -> dict:
  """A batch as the training pipeline makes it."""
  rng = np.random.default_rng(0)
  shape = (batch_size, *crop)
  return {
    'image': rng.integers(0, 256, (*shape, 3), np.uint8),
    'label': rng.integers(0, classes, shape, np.uint8),
    'size': np.tile(np.asarray(crop, np.int32), (batch_size, 1)),
    'photometric': np.tile(
      np.asarray([0, 1, 1, 0, 1], np.float32), (batch_size, 1)
    ),
  }


def matmul_rate(dtype: str) -> float:
  """Operations/s of a large matrix product on one device, as measured."""
  n = 8192 if jax.default_backend() != 'cpu' else 2048
  x = jnp.ones((n, n), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(x, x))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready([product(x, x) for _ in range(4)])
    times.append((time.perf_counter() - start) / 4)
  return 2 * n**3 / min(times)


def measure(config: dict, crop: tuple[int, int], steps: int) -> dict:
  """Compiles and times the step; a dict of figures."""
  batch_size = config['train']['batch_size']
  mesh = sharding.make_mesh()
  sharding.check_batch_size(batch_size, mesh)
  model, optimizer, _, step = create_training(config, mesh)
  variables = initial_variables(scanned(model, False), 0)
  state = create_state(model, optimizer, variables, mesh)
  classes = config['model']['num_classes']
  batch = sharding.shard_batch(random_batch(batch_size, crop, classes), mesh)

  print('compiling: anew, and three times from a cache on disk', flush=True)
  compiled, anew = compile_step(step, state, batch)
  cached = []
  for _ in range(3):
    jax.clear_caches()
    cached.append(compile_step(step, state, batch)[1]['compile_seconds'])
  memory = compiled.memory_analysis()

  seconds, shown = [], time.perf_counter()
  for number in range(steps + 2):  # The first two warm up.
    start = time.perf_counter()
    state, scalars = compiled(state, batch)
    jax.block_until_ready((state, scalars))
    seconds.append(time.perf_counter() - start)
    if time.perf_counter() - shown > 5:
      shown = time.perf_counter()
      left = duration((steps + 1 - number) * seconds[-1])
      print(f'step {number + 1} of {steps + 2}, ETA {left}', flush=True)
  step_seconds = statistics.median(seconds[2:])

  images = jax.ShapeDtypeStruct((batch_size, *crop, 3), jnp.float32)
  forward = count_flops(
    partial(model.apply, state.variables(), train=False), images
  )
  rate = 3 * forward / step_seconds / mesh.size
  measured = matmul_rate(config['model']['dtype'])
  stats = jax.local_devices()[0].memory_stats() or {}
  peak = PEAK.get(jax.devices()[0].device_kind)
  return {
    **anew,
    'cached_compile_seconds': statistics.median(cached),
    'step_ms': 1e3 * step_seconds,
    'images_per_second': batch_size / step_seconds,
    'forward_gflop_per_image': forward / batch_size / 1e9,
    'model_tflops_per_device': rate / 1e12,
    'share_of_matmul_rate': rate / measured,
    'matmul_tflops_per_device': measured / 1e12,
    'share_of_peak': rate / peak if peak else None,
    'program_gb': (
      memory.temp_size_in_bytes
      + memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    )
    / 1e9,
    'peak_gb': stats.get('peak_bytes_in_use', 0) / 1e9 or None,
    'final_loss': float(scalars['loss']),
  }


def main() -> None:
  """Reads the command line, measures, prints and writes."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--config',
    default='configs/ade20k_pspnet.py',
    help='default: %(default)s; with :mini it fits a laptop',
  )
  parser.add_argument(
    '--batch_size', type=positive, help="default: the config's"
  )
  parser.add_argument(
    '--crop',
    type=positive,
    nargs=2,
    metavar=('HEIGHT', 'WIDTH'),
    help="pixels; default: the config's",
  )
  parser.add_argument('--dtype', help="default: the config's")
  parser.add_argument(
    '--steps',
    type=positive,
    default=20,
    help='timed steps; default: %(default)s',
  )
  parser.add_argument(
    '--blocks',
    choices=implementations.IMPLEMENTATIONS['blocks'],
    help="default: the platform's choice, see docs/performance.md",
  )
  add_out(parser)
  flags = parser.parse_args()

  config = read_config(flags.config)
  config['model']['dtype'] = flags.dtype or config['model']['dtype']
  batch_size = flags.batch_size or config['train']['batch_size']
  config['train']['batch_size'] = batch_size
  crop = tuple(flags.crop or config['data']['crop_size'])
  runtime.set_up_compiler()
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  choice = {'blocks': flags.blocks} if flags.blocks else {}
  with tempfile.TemporaryDirectory() as cache, implementations.use(**choice):
    jax.config.update('jax_compilation_cache_dir', cache)
    figures = measure(config, crop, flags.steps)
    chosen = dict(implementations.current())
  result = {
    'config': config['name'],
    'dtype': config['model']['dtype'],
    'batch_size': batch_size,
    'crop': crop,
    'devices': runtime.describe_devices(),
    'forms': chosen,
    **figures,
    **describe_machine(),
  }
  for name, value in result.items():
    if not isinstance(value, dict) and value is not None:
      shown = f'{value:.4g}' if isinstance(value, float) else value
      print(f'{name:26} {shown}')
  if flags.out:
    name = f'train_step-{result["config"]}-{result["dtype"]}-b{batch_size}'
    write_result(flags.out, f'{name}-{device_name()}', result)


if __name__ == '__main__':
  run(main)
