r"""Compiles training and evaluation for TPUs and GPUs that are not there.

    pip install -r requirements-ahead.txt
    python benchmarks/compile_ahead.py --rows ade20k_pspnet \
        --topologies v5e:2x2 h200:8 --out benchmarks/results
    python benchmarks/compile_ahead.py --topologies cpu --mini

XLA's compilers for TPU and GPU run on any machine; they say how much memory a
program takes, what devices send each other, and what it calls. They do not say
how long it takes. `cpu`, the CPU devices that are there, needs no compiler
beside JAX's own.

Flags with several values are combined with each other. With `--out` figures are
kept in DIR/compile_ahead-CHIP.json as they come; what is there already is not
compiled again (but with `--again`). docs/scale.md and docs/memory.md show them.
"""

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Compilers for other platforms are called explicitly.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table

from benchmarks import hlo
from benchmarks.report import describe_machine
from benchmarks.topologies import (
  CHIPS,
  NAMES,
  count_devices,
  find_devices,
  split_name,
)
from resnest_jax.config import load_config
from resnest_jax.errors import run
from resnest_jax.evaluation.inference import compile_views, make_finish
from resnest_jax.evaluation.protocols import make_protocol
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.training import sharding
from resnest_jax.training.logs import duration
from resnest_jax.training.plan import parse_memory
from resnest_jax.training.step import abstract_state, create_training

ROWS = [
  f'{data}_{head}'
  for data in ('ade20k', 'cityscapes')
  for head in ('fcn', 'pspnet', 'deeplabv3', 'deeplabv3plus')
]
# Padded shapes of images and labels that the data sets have most often.
BUCKETS = {'ade20k': (512, 704), 'cityscapes': (1024, 2048)}
OUT_OF_MEMORY = re.compile(r'Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm')
UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30}


class Case(NamedTuple):
  """One program for some devices.

  Attributes:
    row: a file in configs/.
    argument: after the colon of the configuration, 'mini' or ''.
    topology: see `topologies.NAMES`.
    program: 'train' or 'eval'.
    batch_size: over all devices; of 'eval' as well.
    micro_batch_size: likewise; 0: the whole batch.
    remat: see `config.train.remat`.
    accumulation: see `config.train.accumulation`.
    dtype: of the activations.
    memory: GB of a GPU that the compiler is told of; None: all of it.
  """

  row: str
  argument: str
  topology: str
  program: str
  batch_size: int
  micro_batch_size: int
  remat: str
  accumulation: str
  dtype: str
  memory: float | None

  def describe(self) -> str:
    """A line for the eye."""
    words = [self.row, self.topology, self.program, f'batch {self.batch_size}']
    if self.micro_batch_size:
      words.append(f'as {self.micro_batch_size} {self.accumulation}')
    if self.remat != 'none':
      words.append(f'remat {self.remat}')
    if self.memory:
      words.append(f'{self.memory:g} GB')
    return ' '.join([*words, self.dtype])


# --- Compiling ---------------------------------------------------------------


def configure(case: Case) -> Any:
  """The configuration of a case."""
  config = load_config(f'configs/{case.row}.py:{case.argument}')
  config.model.dtype = case.dtype
  config.train.batch_size = case.batch_size
  config.train.micro_batch_size = case.micro_batch_size
  config.train.remat = case.remat
  config.train.accumulation = case.accumulation
  return config


def abstract_batch(batch_size: int, crop: tuple[int, int], mesh: Any) -> dict:
  """Shapes, types and placement of a batch of the training pipeline."""
  shapes = {
    'image': ((*crop, 3), jnp.uint8),
    'label': (tuple(crop), jnp.uint8),
    'size': ((2,), jnp.int32),
    'photometric': ((5,), jnp.float32),
  }
  return {
    key: jax.ShapeDtypeStruct(
      (batch_size, *shapes[key][0]), shapes[key][1], sharding=placed
    )
    for key, placed in sharding.batch_shardings(mesh).items()
  }


def lower_training(config: Any, mesh: Any) -> dict[str, Any]:
  """The training step, lowered, by name."""
  sharding.check_batch_size(config.train.batch_size, mesh)
  training = create_training(config, mesh)
  state = abstract_state(
    training.model, training.optimizer, mesh, ema=config.train.ema_decay > 0
  )
  batch = abstract_batch(config.train.batch_size, config.data.crop_size, mesh)
  return {'step': training.step.lower(state, batch)}


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
  lower = lower_training if case.program == 'train' else lower_evaluation
  start = time.perf_counter()
  lowered = lower(config, mesh)
  seconds = time.perf_counter() - start
  figures = {
    name: compile_one(program, devices) for name, program in lowered.items()
  }
  return {
    'devices': len(devices),
    'device_kind': devices[0].device_kind,
    'lower_seconds': round(seconds, 1),
    'programs': figures,
  }


def compile_one(lowered: Any, devices: list[Any]) -> dict[str, Any]:
  """Compiles a program; its figures."""
  # Autotuning needs the device; what LLVM does to kernels changes no figure.
  options = {
    'xla_gpu_autotune_level': '0',
    'xla_backend_optimization_level': '0',
  }
  on_gpu = devices[0].platform in ('cuda', 'gpu')
  start = time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options=options if on_gpu else None)
  except jax.errors.JaxRuntimeError as error:
    found = OUT_OF_MEMORY.search(str(error))
    if not found:
      raise
    needed = float(found[1]) * UNITS[found[2]]
    return {'fits': False, 'memory_gb': needed / 1e9}
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


# --- Results -----------------------------------------------------------------


class Results:
  """Figures by case, in one file for each kind of device."""

  def __init__(self, out: Path | None):
    """Reads what is there; None: nothing is kept."""
    self._out, self._files = out, {}

  def _read(self, kind: str) -> list[dict[str, Any]]:
    if kind not in self._files:
      path = self._out and self._path(kind)
      known = path and path.exists()
      self._files[kind] = json.loads(path.read_text('utf-8')) if known else []
    return self._files[kind]

  def _path(self, kind: str) -> Path:
    return self._out / f'compile_ahead-{kind}.json'

  def find(self, case: Case) -> dict[str, Any] | None:
    """The figures of a case, or None."""
    for entry in self._read(split_name(case.topology)[0]):
      if entry['case'] == case._asdict():
        return entry
    return None

  def add(self, case: Case, figures: dict[str, Any]) -> dict[str, Any]:
    """Keeps figures, and writes them if there is a folder."""
    kind = split_name(case.topology)[0]
    entries = self._read(kind)
    if before := self.find(case):
      entries.remove(before)
    entry = {'case': case._asdict(), **figures}
    entries.append(entry)
    if self._out:
      self._out.mkdir(parents=True, exist_ok=True)
      temporary = self._path(kind).with_suffix('.part')
      temporary.write_text(json.dumps(entries, indent=1) + '\n', 'utf-8')
      temporary.replace(self._path(kind))
    return entry


def show(entries: list[dict[str, Any]]) -> rich.table.Table:
  """Memory, messages and calls, one line a program."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  table.add_column('program')
  for column in (
    'GB a chip',
    'of',
    'temporaries',
    'all-reduces',
    'MB',
    'others',
    'cuDNN',
    'fusions',
    'TFLOP',
    's',
  ):
    table.add_column(column, justify='right', no_wrap=True)
  for entry in entries:
    case = Case(**entry['case'])
    chip = CHIPS.get(split_name(case.topology)[0])
    limit = case.memory or (chip and chip.memory)
    for name, program in entry['programs'].items():
      style = '' if not limit or program['memory_gb'] <= limit else 'red'
      line = [
        f'{case.describe()}: {name}'
        if case.program == 'eval'
        else case.describe(),
        f'{program["memory_gb"]:.2f}',
        f'{limit:.3g}' if limit else '',
      ]
      if program['fits']:
        messages = {
          kind: value for kind, value in program['collectives'].items()
        }
        reduced = messages.pop('all-reduce', {'count': 0, 'bytes': 0})
        others = ' '.join(
          f'{value["count"]} {kind}' for kind, value in messages.items()
        )
        calls = program['custom_calls'].items()
        cudnn = sum(n for target, n in calls if '__cudnn' in target)
        line += [
          f'{program["temporaries_gb"]:.2f}',
          f'{reduced["count"]}',
          f'{reduced["bytes"] / 1e6:.1f}',
          others,
          f'{cudnn}',
          f'{program["fusions"]}',
          f'{program["gflops"] / 1e3:.2f}',
          f'{program["compile_seconds"]:.0f}',
        ]
      table.add_row(*line, style=style)
  return table


def cases(flags: argparse.Namespace) -> Iterator[Case]:
  """All combinations of the flags."""
  argument = 'mini' if flags.mini else ''
  for (
    row,
    topology,
    program,
    micro,
    remat,
    accumulation,
    dtype,
    memory,
  ) in itertools.product(
    *(flags.rows, flags.topologies, flags.programs, flags.micro_batch_size),
    *(flags.remat, flags.accumulation, flags.dtype, flags.memory),
  ):
    config = load_config(f'configs/{row}.py:{argument}')
    part = config.train if program == 'train' else config.eval
    batch_size = flags.batch_size or part.batch_size
    if flags.images:
      batch_size = flags.images * count_devices(topology)
    yield Case(
      row,
      argument,
      topology,
      program,
      batch_size,
      micro,
      remat,
      accumulation,
      dtype,
      memory,
    )


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
    '--batch_size', type=int, help="over all devices; default: the row's"
  )
  batch.add_argument('--images', type=int, help='on each device, instead')
  parser.add_argument(
    '--micro_batch_size',
    nargs='+',
    type=int,
    default=[0],
    help='over all devices (default: 0, the whole batch)',
  )
  parser.add_argument('--remat', nargs='+', default=['none'])
  parser.add_argument('--accumulation', nargs='+', default=['plain'])
  parser.add_argument('--dtype', nargs='+', default=['bfloat16'])
  parser.add_argument(
    '--memory',
    nargs='+',
    type=lambda text: parse_memory(text) / 1e9,
    default=[None],
    help='of a GPU that is like the named one, as 24GB',
  )
  parser.add_argument('--mini', action='store_true', help='of all rows')
  parser.add_argument('--out', type=Path, metavar='DIR', help='for the JSON')
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
    print(f'{number + 1}/{len(todo)} {case.describe()}', flush=True)
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
