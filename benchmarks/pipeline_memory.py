"""Watches the memory of the training pipeline: it must not grow.

    python benchmarks/pipeline_memory.py --config configs/ade20k_pspnet.py:mini

Reads and augments samples of prepared data, as training does, for as long as
asked (20000 samples if not), and prints the peak of this process' memory as it
goes. The last line is by how much the peak grew after the first tenth, in
which threads, readers and their buffers come to be.
"""

import contextlib
import resource
import sys
import time
from pathlib import Path

import rich.console
import rich.table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flags import add_out, positive
from benchmarks.report import describe_machine, write_result
from resnest_jax.config import flag_parser, parse_flags
from resnest_jax.data.datasets import open_data
from resnest_jax.data.pipeline import make_train_iterator
from resnest_jax.errors import UserError, run

ROWS = 10


def peak_mb() -> float:
  """The largest resident memory this process ever had, in 10^6 bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / 1e6 if sys.platform == 'darwin' else peak * 1024 / 1e6


def watch(config, num_samples: int) -> list[dict[str, float]]:
  """Reads `num_samples` and more; peaks at the end of each tenth of them."""
  batch_size = config.train.batch_size
  steps = -(-num_samples // (batch_size * ROWS))  # Of a tenth.
  batches = make_train_iterator(
    config.data,
    open_data(config.data, config.data.train_split),
    seed=config.seed,
    batch_size=batch_size,
    total_steps=steps * ROWS,
  )
  rows, start = [], time.perf_counter()
  with contextlib.closing(batches):
    for step, _ in enumerate(batches, 1):
      if step % steps == 0:
        rows.append(
          {
            'samples': step * batch_size,
            'seconds': time.perf_counter() - start,
            'peak_mb': peak_mb(),
          }
        )
  return rows


def main() -> None:
  """Reads the command line, watches, prints and writes."""
  parser = flag_parser(__doc__.splitlines()[0], workdir_required=False)
  parser.add_argument(
    '--samples', type=positive, default=20_000, help='how many (default: 20000)'
  )
  add_out(parser)
  flags = parse_flags(parser)
  if flags.samples < 1:
    raise UserError(f'--samples is {flags.samples}; it must be 1 or more')
  rows = watch(flags.config, flags.samples)
  table = rich.table.Table(flags.config.name)
  for column in ('samples', 'images/s', 'peak MB'):
    table.add_column(column, justify='right')
  for row in rows:
    table.add_row(
      f'{row["samples"]}',
      f'{row["samples"] / row["seconds"]:.1f}',
      f'{row["peak_mb"]:.1f}',
    )
  rich.console.Console().print(table)
  growth = rows[-1]['peak_mb'] - rows[0]['peak_mb']
  print(f'the peak grew by {growth:.1f} MB after the first tenth')
  if flags.out:
    result = describe_machine() | {'config': flags.config.name, 'rows': rows}
    write_result(flags.out, 'pipeline_memory', result)


if __name__ == '__main__':
  run(main)
