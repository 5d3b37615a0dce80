r"""Compiles training and evaluation for TPUs and GPUs that are not there.

    pip install -r requirements-ahead.txt
    python benchmarks/compile_ahead.py --rows ade20k_pspnet \
        --topologies v5e:2x2 h200:8 --out benchmarks/results
    python benchmarks/compile_ahead.py --topologies cpu --mini

XLA's compilers for TPU and GPU run on any machine; they say how much memory a
program takes, what devices send each other, and what it calls. They do not say
how long it takes. `cpu`, the CPU devices that are there, needs no compiler
next to JAX's own.

Flags with several values are combined with each other. With `--out` figures are
kept in DIR/compile_ahead-CHIP.json as they come; what is there already is not
compiled again (but with `--again`). docs/scale.md and docs/memory.md show them.
"""

import argparse
import itertools
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Compilers for other platforms are called explicitly.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
# Nobody is kept from a chip: there is none.
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', 'true')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import rich.console

from benchmarks import hlo
from benchmarks.ahead import Case, Results, show
from benchmarks.flags import add_out, gigabytes, natural, positive
from benchmarks.report import describe_machine
from benchmarks.topologies import (
  NAMES,
  PLATFORMS,
  count_devices,
  find_devices,
  split_name,
)
from resnest_jax import sharding
from resnest_jax.checkpoints.state import abstract_state
from resnest_jax.config import load_config
from resnest_jax.config_keys import classifies
from resnest_jax.errors import UserError, run
from resnest_jax.inference.protocols import make_protocol
from resnest_jax.inference.steps import compile_views, make_finish
from resnest_jax.models import implementations
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.text import duration
from resnest_jax.training.step import create_training

ROWS = [
  f'{data}_{head}'
  for data in ('ade20k', 'cityscapes')
  for head in ('fcn', 'pspnet', 'deeplabv3', 'deeplabv3plus')
]
DEPTHS = (50, 101, 200, 269)
ENCODING = [
  'ade20k_encoding_fcn_50',
  *(f'ade20k_encoding_deeplabv3_{depth}' for depth in DEPTHS),
]
IMAGENET = [f'imagenet_resnest{depth}' for depth in DEPTHS]
# Padded shapes of images and labels that the data sets have most often.
BUCKETS = {'ade20k': (512, 704), 'cityscapes': (1024, 2048)}
LOWEST = 9  # XLA's `EFFORT_O0`
OUT_OF_MEMORY = re.compile(r'Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm')
UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30}


# --- Compiling ---------------------------------------------------------------


def configure(case: Case) -> Any:
  """The configuration of a case."""
  config = load_config(f'configs/{case.row}.py:{case.argument}')
  config.model.dtype = case.dtype
  config.train.batch_size = case.batch_size
  config.train.micro_batch_size = case.micro_batch_size
  config.train.remat = case.remat
  if case.stage_sizes:
    config.model.stage_sizes = case.stage_sizes
  return config


def abstract_batch(config: Any, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, types and placement of a batch of the training pipeline."""
  crop = tuple(config.data.crop_size)
  image = {'image': ((*crop, 3), jnp.uint8), 'size': ((2,), jnp.int32)}
  if classifies(config):
    of_class = {'label': ((), jnp.int32), 'shift': ((3,), jnp.float32)}
    shapes, placed = image | of_class, {}
  else:
    of_pixels = {'label': (crop, jnp.uint8), 'photometric': ((5,), jnp.float32)}
    shapes, placed = image | of_pixels, sharding.batch_shardings(mesh)
  return {
    key: jax.ShapeDtypeStruct(
      (config.train.batch_size, *shape),
      dtype,
      sharding=placed.get(key, sharding.batch_sharding(mesh)),
    )
    for key, (shape, dtype) in shapes.items()
  }


def lower_training(config: Any, mesh: Any) -> dict[str, Any]:
  """The training step, lowered, by name."""
  sharding.check_batch_size(config.train.batch_size, mesh)
  training = create_training(config, mesh)
  state = abstract_state(
    training.model, training.optimizer, mesh, ema=config.train.ema_decay > 0
  )
  return {'step': training.step.lower(state, abstract_batch(config, mesh))}


def lower_evaluation(config: Any, mesh: Any) -> dict[str, Any]:
  """The network and what follows it for the most frequent bucket, lowered."""
  batch_size, classes = config.train.batch_size, config.model.num_classes
  sharding.check_batch_size(batch_size, mesh)
  model = create_segmentor(config.model)
  views = compile_views(
    model, classes, make_protocol(config), mesh, jnp.float32, lambda *_: None
  )
  name = config.data.name.removesuffix('_mini')
  canvas = config.data.crop_size if '_mini' in config.name else BUCKETS[name]
  placed = sharding.batch_sharding(mesh)

  def struct(shape, dtype):
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=placed)

  whole = sharding.replicated(mesh)
  variables = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    variable_shapes(model),
  )
  sizes = struct((2,), jnp.int32)
  images, label = struct((*canvas, 3), jnp.uint8), struct(canvas, jnp.uint8)
  network = views.forward.lower(variables, images, sizes)
  (logits,) = jax.tree.leaves(network.out_info)
  logits = struct(logits.shape[1:], logits.dtype)
  finish = make_finish(views.build, classes, mesh)
  return {
    'network': network,
    'finish': finish.lower(tuple(canvas), (logits, sizes), label, sizes),
  }


def measure(case: Case) -> dict[str, Any]:
  """Compiles a case's programs; figures of each by its name.

  One that does not fit into a TPU's memory has what the compiler says it would
  take, as `memory_gb`, and nothing else.
  """
  config = configure(case)
  memory = case.memory and 1e9 * case.memory
  devices = find_devices(case.topology, memory)
  mesh = sharding.make_mesh(devices=devices)
  training = case.program == 'train'
  lower = lower_training if training else lower_evaluation
  start = time.perf_counter()
  # Not those of the CPU, on which this runs.
  with implementations.use(platform=PLATFORMS[devices[0].platform]):
    chosen = dict(implementations.current())
    lowered = lower(config, mesh)
  seconds = time.perf_counter() - start
  figures = {
    name: compile_one(program, devices, case.effort)
    for name, program in lowered.items()
  }
  return {
    'devices': len(devices),
    'device_kind': devices[0].device_kind,
    'forms': chosen,
    'lower_seconds': round(seconds, 1),
    'programs': figures,
  }


def memory_needed(error: jax.errors.JaxRuntimeError) -> float | None:
  """GB that a TPU's compiler says that it would need, if that is the error."""
  found = OUT_OF_MEMORY.search(str(error))
  return float(found[1]) * UNITS[found[2]] / 1e9 if found else None


def compile_one(
  lowered: Any, devices: list[Any], effort: float
) -> dict[str, Any]:
  """Compiles a program; its figures."""
  options: dict[str, Any] = {}
  if devices[0].platform in ('cuda', 'gpu'):
    # Autotuning needs the device; what LLVM does to kernels changes no figure.
    # Triton finds no tiles for some products without it.
    options = {
      'xla_gpu_autotune_level': '0',
      'xla_backend_optimization_level': '0',
      'xla_gpu_enable_triton_gemm': False,
    }
  elif effort:
    options = {'optimization_level': LOWEST}
  start = time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options=options or None)
  except jax.errors.JaxRuntimeError as error:
    if not (needed := memory_needed(error)):
      raise
    return {'fits': False, 'memory_gb': needed}
  seconds = time.perf_counter() - start
  memory, text = compiled.memory_analysis(), compiled.as_text()
  parts = {
    'arguments_gb': memory.argument_size_in_bytes,
    'temporaries_gb': memory.temp_size_in_bytes,
    'outputs_gb': memory.output_size_in_bytes - memory.alias_size_in_bytes,
  }
  contents = hlo.read(text)
  return {
    'fits': True,
    'memory_gb': sum(parts.values()) / 1e9,
    **{name: value / 1e9 for name, value in parts.items()},
    'code_mb': memory.generated_code_size_in_bytes / 1e6,
    'collectives': {
      kind: value._asdict() for kind, value in contents.collectives.items()
    },
    'all_reduce_bytes': contents.dtypes,
    'largest_gathered_bytes': contents.gathered,
    'custom_calls': contents.custom_calls,
    'fusions': contents.fusions,
    'loops_of_unknown_length': contents.endless,
    'gflops': (compiled.cost_analysis() or {}).get('flops', 0) / 1e9,
    'compile_seconds': round(seconds, 1),
  }


def cases(flags: argparse.Namespace) -> Iterator[Case]:
  """All combinations of the flags."""
  argument = 'mini' if flags.mini else ''
  for row, topology, program, micro, *settings in itertools.product(
    *(flags.rows, flags.topologies, flags.programs, flags.micro_batch_size),
    *(flags.remat, flags.dtype, flags.memory),
  ):
    config = load_config(f'configs/{row}.py:{argument}')
    if program == 'eval' and classifies(config):
      raise UserError(
        f'--programs eval is for segmentors, and {row} is a classifier.'
      )
    part = config.train if program == 'train' else config.eval
    batch_size = flags.batch_size or part.batch_size
    if flags.images:
      batch_size = flags.images * count_devices(topology)
    sizes = flags.stage_sizes and tuple(flags.stage_sizes)
    if micro is None:
      micro = config.train.micro_batch_size
    settings = [micro, *settings, sizes, flags.effort]
    yield Case(row, argument, topology, program, batch_size, *settings)


def make_parser() -> argparse.ArgumentParser:
  """The command line's flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--rows',
    nargs='+',
    default=ROWS,
    metavar='ROW',
    help='files in configs/ (default: the eight of the table)',
  )
  parser.add_argument(
    '--topologies',
    nargs='+',
    required=True,
    metavar='NAME',
    help=f'such as {", ".join(NAMES)}',
  )
  parser.add_argument(
    '--programs',
    nargs='+',
    default=['train'],
    choices=('train', 'eval'),
    help='the training step, the evaluation of a bucket (default: train)',
  )
  batch = parser.add_mutually_exclusive_group()
  batch.add_argument(
    '--batch_size', type=positive, help="over all devices; default: the row's"
  )
  batch.add_argument('--images', type=positive, help='on each device, instead')
  parser.add_argument(
    '--micro_batch_size',
    nargs='+',
    type=natural,
    default=[None],
    help="over all devices; 0: the whole batch; default: the row's",
  )
  parser.add_argument('--remat', nargs='+', default=['none'])
  parser.add_argument('--dtype', nargs='+', default=['bfloat16'])
  parser.add_argument(
    '--memory',
    nargs='+',
    type=gigabytes,
    default=[None],
    help='of a GPU that is like the named one, as 24GB',
  )
  parser.add_argument(
    '--stage_sizes',
    nargs=4,
    type=natural,
    metavar='BLOCKS',
    help="of the backbone, to compile less than the row's",
  )
  parser.add_argument(
    '--effort',
    type=float,
    choices=(-1, 0),
    default=0.0,
    help="of a TPU's compiler; at -1 quick, programs take more memory",
  )
  parser.add_argument('--mini', action='store_true', help='of all rows')
  add_out(parser)
  parser.add_argument(
    '--again', action='store_true', help='compile also what DIR has'
  )
  return parser


def main() -> None:
  """Reads the command line, compiles, prints and writes."""
  flags = make_parser().parse_args()
  wanted, results = list(cases(flags)), Results(flags.out)
  for case in wanted:
    split_name(case.topology)
  todo = [case for case in wanted if flags.again or not results.find(case)]
  machine, start = describe_machine(), time.perf_counter()
  for number, case in enumerate(todo):
    print(
      f'{number + 1}/{len(todo)} {case.describe()}: compiling, '
      'which takes minutes for a whole row',
      flush=True,
    )
    entry = results.add(case, measure(case) | machine)
    jax.clear_caches()
    passed = time.perf_counter() - start
    left = passed / (number + 1) * (len(todo) - number - 1)
    programs = entry['programs'].items()
    print(
      ', '.join(f'{k}: {v["memory_gb"]:.2f} GB' for k, v in programs),
      f'a chip; {duration(passed)}, ETA {duration(left)}',
      flush=True,
    )
  entries = [entry for case in wanted if (entry := results.find(case))]
  rich.console.Console(width=180).print(show(entries))


if __name__ == '__main__':
  run(main)
