"""What a TPU's compiler expects of every way to write a layer, without a TPU.

    pip install -r requirements-ahead.txt
    python benchmarks/forms_ahead.py --topology v5e:1x1 --out benchmarks/results

Layers and ways are those of conv_forms.py, forward with backward. Cycles are
the sum of what XLA's cost model writes next to each operation of the compiled
program, temporaries what the program needs besides inputs and outputs. Nothing
runs: cycles are the compiler's estimate, not a measurement. `cpu` has none.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

# Compilers for other platforms are called explicitly.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
# Nobody is kept from a chip: there is none.
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', 'true')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from benchmarks import hlo
from benchmarks.conv_forms import KINDS, Layer, chosen, layers, lowered
from benchmarks.flags import DTYPES, SMOKE, add_out, add_smoke, positive
from benchmarks.report import describe_machine, print_table, write_result
from benchmarks.topologies import PLATFORMS, find_devices
from resnest_jax.errors import run
from resnest_jax.models import implementations


def estimate(layer: Layer, device: Any, dtype: str) -> dict[str, Any]:
  """Cycles and bytes of a layer in all ways."""
  placed = jax.sharding.SingleDeviceSharding(device)
  arguments = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    for shape in layer.shapes
  ]
  platform = PLATFORMS[device.platform]
  figures = {}
  for name, program in lowered(layer, arguments, platform)[
    'with backward'
  ].items():
    compiled = program.compile()
    cycles = sum(x.cycles for x in hlo.operations(compiled.as_text()))
    figures[name] = {
      'cycles': cycles or None,
      'temporary_bytes': compiled.memory_analysis().temp_size_in_bytes,
    }
  with implementations.use(platform):
    best = chosen(layer.kind)
  return {
    'kind': layer.kind,
    'layer': layer.name,
    'chosen': best,
    'forms': figures,
  }


def rows_of(record: dict[str, Any]) -> list[list[str]]:
  """Lines of the table."""
  best = record['forms'][record['chosen']]['cycles']
  rows = []
  for name, figures in record['forms'].items():
    cycles = figures['cycles']
    rows.append(
      [
        f'{record["kind"]}: {record["layer"]}',
        name + (' *' if name == record['chosen'] else ''),
        f'{cycles / 1e6:.2f}' if cycles else '',
        f'{cycles / best:.2f}' if cycles else '',
        f'{figures["temporary_bytes"] / 1e6:.0f}',
      ]
    )
  return rows


def main() -> None:
  """Reads the command line, compiles, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--topology', default='v5e:1x1', help='a chip; default: %(default)s'
  )
  parser.add_argument('--batch_size', type=positive, default=16)
  parser.add_argument(
    '--size', type=positive, default=512, help='of the crop; default: 512'
  )
  parser.add_argument('--dtype', default='bfloat16', choices=DTYPES)
  parser.add_argument('--kinds', nargs='+', choices=KINDS, default=list(KINDS))
  add_smoke(parser)
  add_out(parser)
  flags = parser.parse_args()
  if flags.smoke:
    flags.batch_size, flags.size = 1, 32
  device = find_devices(flags.topology)[0]
  wanted = [
    layer
    for layer in layers(flags.batch_size, flags.size, 16 if flags.smoke else 1)
    if layer.kind in flags.kinds
  ]
  records = []
  for number, layer in enumerate(wanted):
    name = f'{layer.kind}: {layer.name}'
    print(f'{number + 1}/{len(wanted)} {name}', file=sys.stderr, flush=True)
    records.append(estimate(layer, device, flags.dtype))
  print_table(
    ['layer', 'implementation', 'M cycles', 'times *', 'temporaries, MB'],
    [row for record in records for row in rows_of(record)],
  )
  print(f'* is chosen on {device.device_kind}')
  if flags.smoke:
    print(SMOKE)
  if flags.out:
    result = describe_machine() | {
      'device': device.device_kind,
      'batch_size': flags.batch_size,
      'size': flags.size,
      'dtype': flags.dtype,
      'layers': records,
    }
    kind = device.device_kind.replace(' ', '_').lower()
    write_result(flags.out, f'forms_ahead-{kind}', result, flags.smoke)


if __name__ == '__main__':
  run(main)
