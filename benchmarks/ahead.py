"""What is compiled ahead, the file of figures, and the table of them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import rich.box
import rich.table

from benchmarks.topologies import CHIPS, split_name


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
    dtype: of the activations.
    memory: GB of a GPU that the compiler is told of; None: all of it.
    stage_sizes: blocks of the backbone's stages; None: the row's.
    effort: of a TPU's compiler: 0, its default, or -1, at which it takes a
      fraction of the time; messages are the same, and memory is more than at 0.
  """

  row: str
  argument: str
  topology: str
  program: str
  batch_size: int
  micro_batch_size: int
  remat: str
  dtype: str
  memory: float | None = None
  stage_sizes: tuple[int, ...] | None = None
  effort: float = 0.0

  def describe(self) -> str:
    """A line for the eye."""
    row = f'{self.row}:{self.argument}' if self.argument else self.row
    words = [row, self.topology, self.program, f'batch {self.batch_size}']
    if self.micro_batch_size:
      words.append(f'as {self.micro_batch_size}')
    if self.remat != 'none':
      words.append(f'remat {self.remat}')
    if self.memory:
      words.append(f'{self.memory:g} GB')
    if self.stage_sizes:
      words.append('-'.join(map(str, self.stage_sizes)))
    if self.effort:
      words.append(f'effort {self.effort:g}')
    return ' '.join([*words, self.dtype])


def read_case(entry: dict[str, Any]) -> Case:
  """The case of which an entry of a file has figures."""
  case = Case(**entry['case'])
  sizes = case.stage_sizes
  return case._replace(stage_sizes=tuple(sizes) if sizes else None)


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
      if read_case(entry) == case:
        return entry
    return None

  def add(self, case: Case, figures: dict[str, Any]) -> dict[str, Any]:
    """Keeps figures, and writes them if there is a folder."""
    kind = split_name(case.topology)[0]
    if self._out:  # Another process may have added to it.
      self._files.pop(kind, None)
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
    case = read_case(entry)
    chip = CHIPS.get(split_name(case.topology)[0])
    limit = case.memory or (chip and chip.memory)
    for name, program in entry['programs'].items():
      style = '' if not limit or program['memory_gb'] <= limit else 'red'
      title = case.describe()
      line = [
        f'{title}: {name}' if case.program == 'eval' else title,
        f'{program["memory_gb"]:.2f}',
        f'{limit:.3g}' if limit else '',
      ]
      if program['fits']:
        messages = dict(program['collectives'])
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
