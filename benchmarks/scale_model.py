"""What a training step takes on 1 to 256 chips: a model, not a measurement.

    python benchmarks/scale_model.py --config configs/ade20k_pspnet.py \
        --chip v5e --images 4

Devices that share a batch send each other the sums of gradients and of batch
norm's statistics, and nothing else; how many bytes that is follows from the
parameters. What the compilers emitted (`benchmarks/results/compile_ahead-*`) is
held against it. What one chip computes is taken from `tpu_clock.py`'s results
where there is one for the row, the chip and as many images; other times follow
from makers' figures and the assumptions below.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table
from flax.traverse_util import flatten_dict

from benchmarks.ahead import read_case
from benchmarks.flags import positive
from benchmarks.flops import count_flops
from benchmarks.topologies import CHIPS, Chip
from resnest_jax.config import load_config
from resnest_jax.errors import UserError, run
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.segmentor import create_segmentor

RESULTS = Path(__file__).resolve().parent / 'results'

# Assumptions, none of them measured.
SHARE = 0.4  # of a chip's peak that operations reach, without a clock
START = 10e-6  # seconds until a message is under way
HOP = 1e-6  # and for each chip that it passes
DISK = 1e9  # bytes/s that a checkpoint is written with

# Images/s that one core reads, as measured (results/pipeline-*.json).
DECODE = {'ade20k': 120, 'cityscapes': 16}


class Messages(NamedTuple):
  """What a device sends in a step, as results of all-reduces.

  Attributes:
    gradients: bytes of all parameters' gradients but batch norm's.
    statistics: bytes of batch norm's sums, forward and backward; those of
      scale and bias are among them.
    rounds: messages that wait for each other.
  """

  gradients: int
  statistics: int
  rounds: int

  @property
  def total(self) -> int:
    """Bytes."""
    return self.gradients + self.statistics


def count_messages(config: Any, narrow: bool) -> Messages:
  """From the shapes of parameters alone.

  Forward, a batch norm needs two sums a channel, backward two more. Those of a
  block's shortcut travel with those of its last batch norm, and few values
  (the split attention's) take two rounds forward.

  Args:
    config: the whole configuration.
    narrow: gradients travel in the type of the activations, not float32.
  """
  variables = variable_shapes(create_segmentor(config.model))
  norms = flatten_dict(variables['batch_stats'])
  channels = {path[:-1]: x.size for path, x in norms.items()}
  scales = sum(channels.values())
  parameters = sum(x.size for x in jax.tree.leaves(variables['params']))
  itemsize = jnp.dtype(config.model.dtype).itemsize if narrow else 4
  apart = [path for path in channels if path[-1] != 'downsample_bn']
  few = [path for path in channels if path[-2:] == ('conv2', 'bn1')]
  return Messages(
    itemsize * (parameters - 2 * scales),
    4 * 4 * scales,
    2 * len(apart) + len(few),
  )


class Times(NamedTuple):
  """Seconds of a step, by what they are for."""

  compute: float
  gradients: float
  statistics: float

  @property
  def step(self) -> float:
    """All, one after the other: the worst case."""
    return sum(self)


def compute_seconds(
  config: Any, kind: str, images: int, folder: Path
) -> tuple[float, str]:
  """Seconds that one chip computes in a step, and where they are from."""
  chip = CHIPS[kind]
  for path in sorted(folder.glob('tpu_clock-*.json'), reverse=True):
    result = json.loads(path.read_text('utf-8'))
    case, wanted = read_case(result), (config.name, f'{kind}:1x1', images)
    plain = case.remat == 'none' and not (case.stage_sizes or result['options'])
    if plain and (case.row, case.topology, case.batch_size) == wanted:
      return result['cycles'] / chip.hertz, path.name
  operations = training_operations(config) * images
  assumed = f'{SHARE:.0%} of the peak, which is an assumption'
  return operations / (SHARE * 1e12 * chip.teraflops), assumed


def step_times(
  messages: Messages, compute: float, chip: Chip, devices: int
) -> Times:
  """Of one step.

  Args:
    messages: of it.
    compute: seconds that a device computes.
    chip: which.
    devices: that share the batch.
  """
  if devices == 1:
    return Times(compute, 0.0, 0.0)
  # A ring sends everything twice, but for a device's own part.
  inside = devices <= chip.host
  bandwidth = 1e9 * (chip.link if inside else chip.network)
  seconds = 2 * (devices - 1) / devices / bandwidth
  hops = 2 * math.isqrt(devices)
  return Times(
    compute,
    messages.gradients * seconds,
    messages.statistics * seconds + messages.rounds * (START + hops * HOP),
  )


def training_operations(config: Any) -> float:
  """Operations of one image: three times those of the forward pass."""
  model = create_segmentor(config.model)
  images = jax.ShapeDtypeStruct((1, *config.data.crop_size, 3), jnp.float32)
  forward = partial(model.apply, train=False)
  return 3 * count_flops(forward, variable_shapes(model), images)


def compare(folder: Path, chip: str = '*') -> list[dict[str, Any]]:
  """What compilers emitted for a chip (default: all), and what the model says.

  Every micro-batch has messages of its own, its gradients' among them.
  """
  found = []
  for path in sorted(folder.glob(f'compile_ahead-{chip}.json')):
    for entry in json.loads(path.read_text('utf-8')):
      case = read_case(entry)
      program = entry['programs'].get('step')
      plain = not case.micro_batch_size and case.remat == 'none'
      if (
        not program or not program['fits'] or entry['devices'] == 1 or not plain
      ):
        continue
      config = load_config(f'configs/{case.row}.py:{case.argument}')
      config.model.dtype = case.dtype
      if case.stage_sizes:
        config.model.stage_sizes = case.stage_sizes
      narrow = 'bf16' in program['all_reduce_bytes']
      micro = case.micro_batch_size or case.batch_size
      times = case.batch_size // micro
      messages = count_messages(config, narrow)
      emitted = program['collectives']['all-reduce']
      found.append(
        {
          'case': case,
          'predicted_bytes': times * messages.total,
          'emitted_bytes': emitted['bytes'],
          'predicted_rounds': times * messages.rounds,
          'emitted_rounds': emitted['count'],
          'others': sorted(program['collectives'].keys() - {'all-reduce'}),
        }
      )
  return found


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays or `jax.ShapeDtypeStruct`s of a tree."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def show_times(
  config: Any, kind: str, images: int, folder: Path
) -> rich.table.Table:
  """Seconds and rates by the number of chips."""
  chip = CHIPS[kind]
  messages = count_messages(config, narrow=True)
  compute, source = compute_seconds(config, kind, images, folder)
  optimizer_state = 2 * tree_bytes(
    variable_shapes(create_segmentor(config.model))
  )
  height, width = config.data.crop_size
  decode = DECODE[config.data.name.removesuffix('_mini')]
  table = rich.table.Table(
    title=f'{config.name}, {images} images a chip, {kind}',
    caption=f'compute: {source}',
    box=rich.box.SIMPLE_HEAD,
  )
  for column in (
    *('chips', 'batch', 'compute ms', 'gradients ms', 'statistics ms'),
    *('step ms', 'efficiency', 'images/s', 'MB/s a host', 'cores a host'),
    'checkpoint s',
  ):
    table.add_column(column, justify='right')
  for devices in (1, 4, 8, 16, 64, 256):
    times = step_times(messages, compute, chip, devices)
    rate = images * devices / times.step
    here = rate * min(chip.host, devices) / devices
    table.add_row(
      f'{devices}',
      f'{images * devices}',
      *(f'{1e3 * x:.1f}' for x in (*times, times.step)),
      f'{times.compute / times.step:.0%}',
      f'{rate:.0f}',
      f'{here * height * width * 4 / 1e6:.0f}',
      f'{here / decode:.1f}',
      f'{optimizer_state / DISK:.1f}',
    )
  return table


def main() -> None:
  """Reads the command line and prints both tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', default='configs/ade20k_pspnet.py')
  parser.add_argument('--chip', default='v5e', choices=CHIPS)
  parser.add_argument(
    '--images', type=positive, default=4, help='a chip; default: %(default)s'
  )
  parser.add_argument('--results', type=Path, default=RESULTS, metavar='DIR')
  flags = parser.parse_args()
  if not list(flags.results.glob('compile_ahead-*.json')):
    raise UserError(
      f'--results {flags.results} has no compile_ahead-*.json; '
      'benchmarks/compile_ahead.py --out writes them.'
    )
  config = load_config(flags.config)
  config.model.dtype = 'bfloat16'
  console = rich.console.Console(width=140)
  console.print(show_times(config, flags.chip, flags.images, flags.results))
  for row in compare(flags.results, flags.chip):
    bytes_ = row['predicted_bytes'], row['emitted_bytes']
    rounds = row['predicted_rounds'], row['emitted_rounds']
    console.print(
      f'{row["case"].describe()}: predicted {bytes_[0] / 1e6:.3f} MB in '
      f'{rounds[0]} messages, compiled {bytes_[1] / 1e6:.3f} MB in {rounds[1]}'
      f'{"".join(", " + kind for kind in row["others"])}',
      highlight=False,
    )


if __name__ == '__main__':
  run(main)
