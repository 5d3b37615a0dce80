r"""The cycles that a TPU's compiler expects of a training step, without a TPU.

    pip install -r requirements-ahead.txt
    python benchmarks/tpu_clock.py --row ade20k_pspnet --topology v5e:1x1 \
        --batch_size 8 --out benchmarks/results
    python benchmarks/tpu_clock.py --compare A.json B.json

XLA's cost model writes cycles next to each operation of a compiled program.
They are added up by part of the network and by kind of work, and loops count as
often as they run. Nothing runs: cycles are an estimate, and
benchmarks/results/README.md says how far off it may be. A gradient of a kernel
that updates it at once counts as the layer's.

A program takes minutes to compile and is kept in a folder, so that it is read
at once the next time. `--row` is a file in configs/, or a network of others
whose speed is published: see `peer_networks`.
"""

import argparse
import gzip
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

# Compilers for other platforms are called explicitly.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
# Nobody is kept from a chip: there is none.
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', 'true')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from benchmarks import hlo, peer_networks
from benchmarks.ahead import Case
from benchmarks.compile_ahead import configure, lower_training, memory_needed
from benchmarks.flags import DTYPES, add_out, folder, natural, positive
from benchmarks.report import (
  describe_machine,
  draw_bars,
  print_table,
  write_result,
)
from benchmarks.topologies import CHIPS, PLATFORMS, find_devices, split_name
from resnest_jax import sharding
from resnest_jax.config import load_config
from resnest_jax.errors import UserError, run
from resnest_jax.models import implementations

NETWORK = ('stem', 'stage 1', 'stage 2', 'stage 3', 'stage 4')
NETWORK += ('head', 'auxiliary head')
# In the order of a step.
PARTS = (
  *('batch and optimizer', *(f'{part}, forward' for part in NETWORK)),
  *('loss', *(f'{part}, backward' for part in NETWORK), 'no layer'),
)


def part_of(name: str) -> str:
  """The part of the network, one of `PARTS`, that an operation belongs to."""
  if not name:
    return 'no layer'
  if 'jvp(' not in name:
    return 'batch and optimizer'
  if stage := re.search(r'/layer(\d)_', name):
    part = f'stage {stage[1]}'
  elif '/auxiliary_head/' in name:
    part = 'auxiliary head'
  elif '/decode_head/' in name:
    part = 'head'
  elif re.search(r'jvp\([A-Z]', name):  # The network, and nothing inside of it.
    part = 'stem'
  else:
    return 'loss'
  return f'{part}, {"backward" if "transpose(jvp" in name else "forward"}'


def by_part(operations: Iterable[hlo.Operation]) -> dict[str, dict[str, int]]:
  """Cycles by part and by kind of work, without those that are not there."""
  found: Counter[tuple[str, str]] = Counter()
  for name, kind, cycles in operations:
    found[part_of(name), kind] += cycles
  return {
    part: {kind: found[part, kind] for kind in hlo.KINDS if found[part, kind]}
    for part in PARTS
    if any(found[part, kind] for kind in hlo.KINDS)
  }


def largest(
  operations: Iterable[hlo.Operation], count: int
) -> list[dict[str, Any]]:
  """What takes most cycles; blocks of a stage are added up."""
  found: Counter[tuple[str, str]] = Counter()
  for name, kind, cycles in operations:
    # Blocks that are alike have the name of the first of them.
    name = re.sub(r'/jit\(core_fn\)|(?<=/layer\d)_\d+', '', name)
    found[name, kind] += cycles
  return [
    {'name': name, 'kind': kind, 'cycles': cycles}
    for (name, kind), cycles in found.most_common(count)
  ]


# --- Compiling ---------------------------------------------------------------


def lower(case: Case, devices: list[Any]) -> Any:
  """The step of a row or of a peer's network, lowered."""
  if case.row in peer_networks.NETWORKS:
    return peer_networks.lower_training(
      case.row, case.batch_size, case.dtype, devices[0]
    )
  # Not those of the CPU, on which this runs.
  with implementations.use(platform=PLATFORMS[devices[0].platform]):
    mesh = sharding.make_mesh(devices=devices)
    return lower_training(configure(case), mesh)['step']


def compile_step(case: Case, options: dict[str, str]) -> tuple[Any, str]:
  """Compiles a step; its figures, and the program's text."""
  devices = find_devices(case.topology)
  lowered, start = lower(case, devices), time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options=options or None)
  except jax.errors.JaxRuntimeError as error:
    if needed := memory_needed(error):
      raise UserError(
        f'{case.describe()} takes {needed:.1f} GB and does not fit; try '
        '--remat blocks or a smaller --batch_size.'
      ) from error
    raise
  memory, peer = compiled.memory_analysis(), case.row in peer_networks.NETWORKS
  figures = {
    'case': case._asdict(),
    'options': options,
    # A peer's step is that of one device.
    'devices': 1 if peer else len(devices),
    'device_kind': devices[0].device_kind,
    'compiler': f'libtpu {metadata.version("libtpu")}',
    'flops': compiled.cost_analysis()['flops'],
    'temporaries_gb': memory.temp_size_in_bytes / 1e9,
    'compile_seconds': round(time.perf_counter() - start, 1),
  }
  return figures | describe_machine(), compiled.as_text()


def kept_step(
  case: Case, options: dict[str, str], keep: Path, again: bool
) -> tuple[dict[str, Any], str]:
  """`compile_step`, whose result is kept in a folder, or from there."""
  words = [case.describe(), *(f'{k}={v}' for k, v in options.items())]
  path = keep / (re.sub(r'[^\w=.-]+', '-', ' '.join(words)) + '.gz')
  if again or not path.exists():
    print(f'{" ".join(words)}: compiling, which takes minutes', flush=True)
    figures, text = compile_step(case, options)
    keep.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    with gzip.open(part, 'wt', encoding='utf-8') as file:
      file.write(f'{json.dumps(figures)}\n{text}')
    part.replace(path)
  print(f'read from {path}')
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    return json.loads(file.readline()), file.read()


# --- Reading -----------------------------------------------------------------


def read_step(figures: dict[str, Any], text: str) -> dict[str, Any]:
  """The result of a compiled step."""
  operations = list(hlo.operations(text))
  cycles = sum(x.cycles for x in operations)
  chip = CHIPS[split_name(figures['case']['topology'])[0]]
  seconds = cycles / chip.hertz
  return figures | {
    'cycles': cycles,
    'cycles_an_image': cycles // figures['case']['batch_size'],
    'megahertz': round(chip.hertz / 1e6),
    'images_a_second': figures['case']['batch_size'] / seconds,
    'share_of_peak': figures['flops'] / (seconds * chip.teraflops * 1e12),
    'share_moving_data': share(by_part(operations), 'moving data'),
    'parts': by_part(operations),
    'largest': largest(operations, 20),
  }


def share(parts: dict[str, dict[str, int]], kind: str) -> float:
  """The part of all cycles that are of a kind."""
  total = sum(sum(kinds.values()) for kinds in parts.values())
  return sum(kinds.get(kind, 0) for kinds in parts.values()) / total


def title_of(result: dict[str, Any]) -> str:
  """A line for the eye."""
  case = result['case']
  words = [case['row'], case['topology'], f'batch {case["batch_size"]}']
  words += [f'remat {case["remat"]}'] if case['remat'] != 'none' else []
  words += [f'{key}={value}' for key, value in result['options'].items()]
  return ' '.join(words)


def show(result: dict[str, Any]) -> None:
  """Prints the table of a result."""
  rows = []
  every = result['parts'] | {
    'all': sum(map(Counter, result['parts'].values()), Counter())
  }
  for part, kinds in every.items():
    cells = [sum(kinds.values()), *(kinds.get(kind, 0) for kind in hlo.KINDS)]
    rows.append([part, *(f'{x / 1e6:.1f}' for x in cells)])
  print_table(['M cycles', 'all', *hlo.KINDS], rows)
  print()
  rows = [
    [x['name'].removeprefix('jit(train_step)/'), x['kind'], x['cycles']]
    for x in result['largest']
  ]
  rows = [[a or '-', b, f'{c / 1e6:.1f}'] for a, b, c in rows]
  print_table(['the largest operations', 'kind', 'M cycles'], rows)
  print(
    f'\n{title_of(result)}: {result["cycles"] / 1e6:.1f} M cycles, '
    f'{result["cycles_an_image"] / 1e6:.1f} M an image, '
    f'{result["images_a_second"]:.1f} images/s at '
    f'{result["megahertz"] / 1e3:.2f} GHz, '
    f'{result["share_of_peak"]:.0%} of the peak, '
    f'{result["share_moving_data"]:.0%} moving data, '
    f'{result["temporaries_gb"]:.2f} GB of temporaries'
  )


def compare(before: dict[str, Any], after: dict[str, Any]) -> None:
  """Prints M cycles an image of two results next to each other."""
  columns = []
  for result in before, after:
    parts = result['parts'].items()
    cycles = {part: sum(kinds.values()) for part, kinds in parts}
    cycles |= {
      f'all {kind}': sum(x.get(kind, 0) for _, x in parts) for kind in hlo.KINDS
    }
    cycles['all'] = result['cycles']
    images = 1e6 * result['case']['batch_size']
    columns.append(Counter({k: v / images for k, v in cycles.items()}))
  old, new = columns
  rows = [
    [
      name,
      f'{old[name]:.2f}',
      f'{new[name]:.2f}',
      f'{new[name] - old[name]:+.2f}',
    ]
    for name in old | new
  ]
  print(f'A: {title_of(before)}\nB: {title_of(after)}\n')
  print_table(['M cycles an image', 'A', 'B', 'B - A'], rows)


def option(text: str) -> tuple[str, str]:
  """'name=value' of XLA, for `type`."""
  name, equals, value = text.partition('=')
  if not (name and equals):
    raise argparse.ArgumentTypeError(f'{text!r}; write name=value')
  return name, value


def make_parser() -> argparse.ArgumentParser:
  """The command line's flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--row', default='ade20k_pspnet')
  parser.add_argument(
    '--topology', default='v5e:1x1', help='default: %(default)s'
  )
  parser.add_argument(
    '--batch_size', type=positive, help="over all devices; default: the row's"
  )
  parser.add_argument('--remat', default='none')
  parser.add_argument('--dtype', default='bfloat16', choices=DTYPES)
  parser.add_argument(
    '--stage_sizes',
    nargs=4,
    type=natural,
    metavar='BLOCKS',
    help="of the backbone, to compile less than the row's",
  )
  parser.add_argument(
    '--options',
    nargs='+',
    type=option,
    default=[],
    metavar='NAME=VALUE',
    help="of XLA's compiler, such as xla_tpu_scoped_vmem_limit_kib=65536",
  )
  parser.add_argument(
    '--keep',
    type=folder,
    default=Path('build/programs'),
    metavar='DIR',
    help='folder for compiled programs; default: %(default)s',
  )
  parser.add_argument(
    '--again', action='store_true', help='compile also what DIR has'
  )
  parser.add_argument(
    '--compare', nargs=2, type=Path, metavar='JSON', help='two results'
  )
  add_out(parser, 'the JSON and the picture')
  return parser


def case_of(flags: argparse.Namespace) -> Case:
  """The case of the flags."""
  chip = CHIPS.get(split_name(flags.topology)[0])
  if not (chip and chip.operations):
    known = ', '.join(name for name, chip in CHIPS.items() if chip.operations)
    raise UserError(
      f'--topology {flags.topology}: its compiler estimates no cycles, or the '
      f'clock is not known; there are {known}.'
    )
  batch_size, micro = flags.batch_size, 0
  if flags.row not in peer_networks.NETWORKS:
    train = load_config(f'configs/{flags.row}.py').train
    batch_size, micro = batch_size or train.batch_size, train.micro_batch_size
  sizes = flags.stage_sizes and tuple(flags.stage_sizes)
  settings = [micro, flags.remat, flags.dtype, None, sizes]
  return Case(
    flags.row, '', flags.topology, 'train', batch_size or 128, *settings
  )


def main() -> None:
  """Reads the command line, compiles what is not kept, prints and writes."""
  flags = make_parser().parse_args()
  if flags.compare:
    compare(*(json.loads(path.read_text('utf-8')) for path in flags.compare))
    return
  case = case_of(flags)
  kept = kept_step(case, dict(flags.options), flags.keep, flags.again)
  result = read_step(*kept)
  show(result)
  if flags.out:
    words = [case.row, case.topology, f'b{case.batch_size}']
    words += [case.remat] if case.remat != 'none' else []
    words += [f'{k}={v}' for k, v in flags.options]
    name = re.sub(r'[^\w=.-]+', '-', '-'.join(words))
    path = write_result(flags.out, f'tpu_clock-{name}', result)
    millions = {
      part: {kind: cycles / 1e6 for kind, cycles in kinds.items()}
      for part, kinds in result['parts'].items()
    }
    draw_bars(
      path.with_suffix('.png'), millions, 'million cycles', title_of(result)
    )


if __name__ == '__main__':
  run(main)
