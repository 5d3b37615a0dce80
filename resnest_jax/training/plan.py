"""Proposes how a row's batch fits into a device's memory.

    python -m resnest_jax.training.plan --config configs/ade20k_pspnet.py \
        --memory 16GB

It computes nothing: all is estimated from shapes (`estimate`). docs/memory.md
explains the ways and what they cost.
"""

import argparse
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.table
from ml_collections import ConfigDict

from resnest_jax.config import flag_parser, parse_flags
from resnest_jax.errors import UserError, run

# Of the memory that is named; the rest is for fragments and the libraries.
USABLE = 0.9
UNITS = {'GB': 1e9, 'GIB': 2**30, 'MB': 1e6, 'MIB': 2**20}


class Way(NamedTuple):
  """How a batch may be computed; the fields are keys of the configuration."""

  dtype: str
  remat: str
  micro_batch_size: int  # Over all devices; 0: the whole batch.
  accumulation: str

  def flags(self) -> str:
    """The command line's flags that choose it."""
    flags = [f'--config.model.dtype={self.dtype}']
    flags.append(f'--config.train.remat={self.remat}')
    if self.micro_batch_size:
      flags.append(f'--config.train.micro_batch_size={self.micro_batch_size}')
      flags.append(f'--config.train.accumulation={self.accumulation}')
    return ' '.join(flags)


def parse_memory(text: str) -> float:
  """Bytes of '16GB', '80 GiB', '900MB'.

  Raises:
    UserError: it is none of these, or not positive.
  """
  match = re.fullmatch(r'\s*([0-9.]+)\s*([A-Za-z]+)\s*', text)
  try:
    number = float(match[1]) * UNITS[match[2].upper()]
  except (TypeError, ValueError, KeyError):
    number = 0
  if not number > 0:
    raise UserError(
      f'--memory is {text!r}; give a number and a unit, as 16GB or 80GiB.'
    )
  return number


def ways(config: ConfigDict, devices: int) -> Iterator[Way]:
  """From the fastest and most faithful on.

  Rematerialisation changes no result, bfloat16 rounds, exact accumulation
  takes long, plain accumulation has other statistics.
  """
  batch_size = config.train.batch_size
  dtypes = dict.fromkeys((config.model.dtype, 'bfloat16'))
  for dtype in dtypes:
    for remat in ('none', 'blocks', 'stages'):
      yield Way(dtype, remat, 0, 'plain')
  micros = [
    size
    for size in range(batch_size - 1, 0, -1)
    if batch_size % size == 0 and size % devices == 0
  ]
  for accumulation, least in (('exact', 1), ('plain', 2)):
    for dtype in dtypes:
      for remat in ('blocks', 'stages'):
        for micro in micros:
          if micro >= least:
            yield Way(dtype, remat, micro, accumulation)


def plan(
  config: ConfigDict, memory: float, devices: int
) -> tuple[list[tuple[Way, Any]], int | None]:
  """Estimates of the ways that are worth a look, and the first that fits.

  Args:
    config: a row.
    memory: bytes of one device.
    devices: that share the batch.

  Returns:
    Ways with their estimates, and the index of the proposed one, or None. Of
    ways that differ in the micro-batch alone there is one: the largest that
    fits, or else the smallest.
  """
  from resnest_jax.models import forms
  from resnest_jax.models.segmentor import create_segmentor
  from resnest_jax.training.estimate import estimate, measure_parts
  from resnest_jax.training.freezing import train_the_rest
  from resnest_jax.training.optimizer import create_optimizer

  optimizer = train_the_rest(
    create_optimizer(config.optimizer, config.train.total_steps),
    config.train.freeze,
    config.model.frozen_bn if config.train.freeze_norms else 'none',
  )
  models, parts = {}, {}
  found: dict[tuple, tuple[Way, Any]] = {}
  for way in ways(config, devices):
    if way.dtype not in models:
      settings = config.model.to_dict() | {'dtype': way.dtype}
      models[way.dtype] = create_segmentor(settings)
      with forms.use('gpu'):
        parts[way.dtype] = measure_parts(
          models[way.dtype], config.data.crop_size
        )
    kind = way._replace(micro_batch_size=bool(way.micro_batch_size))
    if kind in found and found[kind][1].total <= USABLE * memory:
      continue
    images = config.train.batch_size // devices
    found[kind] = (
      way,
      estimate(
        models[way.dtype],
        optimizer,
        parts[way.dtype],
        config.data.crop_size,
        images=images,
        micro_images=way.micro_batch_size // devices or images,
        exact=way.accumulation == 'exact',
        remat=way.remat,
        ema=config.train.ema_decay > 0,
      ),
    )
  rows = list(found.values())
  fitting = [
    index
    for index, (_, bytes_) in enumerate(rows)
    if bytes_.total <= USABLE * memory
  ]
  return rows, fitting[0] if fitting else None


def show(rows: list, chosen: int | None) -> rich.table.Table:
  """The estimates as a table, in GB."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for column in ('dtype', 'micro-batch', 'remat', 'accumulation'):
    table.add_column(column)
  for column in (*rows[0][1]._fields, 'total'):
    table.add_column(column, justify='right', no_wrap=True)
  for index, (way, bytes_) in enumerate(rows):
    micro = str(way.micro_batch_size or 'whole')
    accumulation = way.accumulation if way.micro_batch_size else ''
    table.add_row(
      *(way.dtype, micro, way.remat, accumulation),
      *(f'{value / 1e9:.2f}' for value in (*bytes_, bytes_.total)),
      style='bold green' if index == chosen else '',
    )
  return table


def make_parser() -> argparse.ArgumentParser:
  """The command line's flags."""
  parser = flag_parser(
    'Proposes micro-batches, rematerialisation and type for a row.',
    workdir_required=False,
  )
  parser.add_argument(
    '--memory', required=True, help='of one device: 16GB, 80GiB'
  )
  parser.add_argument(
    '--devices', type=int, default=1, help='that share the batch; default: 1'
  )
  return parser


def main() -> None:
  """Reads the command line, estimates, prints."""
  flags = parse_flags(make_parser())
  config, devices = flags.config, flags.devices
  memory = parse_memory(flags.memory)
  batch_size = config.train.batch_size
  if devices < 1 or batch_size % devices:
    raise UserError(
      f'--devices is {devices}; it has to divide the batch of {batch_size} '
      '(config.train.batch_size).'
    )
  if config.model.num_classes == 0:
    raise UserError(
      'config.model.num_classes is 0, as many as the data has: give the '
      'number, --config.model.num_classes=NUMBER.'
    )
  rows, chosen = plan(config, memory, devices)
  height, width = config.data.crop_size
  console = rich.console.Console(width=120)  # As wide as the table needs.
  console.print(
    f'{config.name}: {batch_size} images of {height}x{width} on {devices} '
    f'device{"s" if devices > 1 else ""}; GB on each, estimated',
    highlight=False,
  )
  console.print(show(rows, chosen))
  limit = USABLE * memory / 1e9
  if chosen is None:
    raise UserError(
      f'nothing fits into {USABLE:.0%} of {flags.memory} ({limit:.3g} GB): '
      'take more devices, a smaller crop (config.data.crop_size) or batch '
      '(config.train.batch_size).'
    )
  print(f'the first that fits into {USABLE:.0%} of {flags.memory}:')
  print(f'  {rows[chosen][0].flags()}')


if __name__ == '__main__':
  run(main)
