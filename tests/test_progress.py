"""What is printed: names are no markup, whatever characters they have."""

import io
import re
import sys
import types

import numpy as np
import pytest
import rich.table

from resnest_jax import progress
from resnest_jax.data.sampling import share_table
from resnest_jax.errors import UserError, run

# They mean something to some sink: markup, emoji, HTML, a formula.
NAMES = ['[void]', 'a[/b]', ':car:', '{task.total}', 'x\\', '<b>&amp;', '$a_1$']
NAMES += ['sky [blue]', 'road [/red]', '\u80cc\u666f']


def printed(*contents):
  stream = io.StringIO()
  for content in contents:
    progress.console(file=stream, width=400).print(content, soft_wrap=True)
  return stream.getvalue()


def test_tables_and_lines_have_names_as_they_are():
  lines = [f'written to runs/{name}/eval' for name in NAMES]
  assert printed(*lines).splitlines() == lines
  counts = np.ones((2, len(NAMES)), int)
  shares = printed(share_table(counts, np.ones(2) / 2, NAMES)).splitlines()
  assert [row.split('\u2502')[1].strip() for row in shares[4:-1]] == NAMES
  titled = rich.table.Table(*NAMES, title=' '.join(NAMES))
  assert all(printed(titled).count(name) == 2 for name in NAMES)


def test_progress_bars_have_names_as_they_are(monkeypatch):
  monkeypatch.setattr('sys.stdout', stream := io.StringIO())
  with progress.evaluation_progress() as bars:
    for name in NAMES:
      bars.add_task(name, total=1)
  assert all(name in stream.getvalue() for name in NAMES)


def test_long_work_prints_a_line_a_minute_into_a_file(monkeypatch):
  monkeypatch.setattr('sys.stdout', stream := io.StringIO())
  times = iter([0.0, 30.0, 61.0, 61.0, 90.0, 122.0, 122.0])
  clock = types.SimpleNamespace(monotonic=lambda: next(times))
  monkeypatch.setattr(progress, 'time', clock)
  with progress.evaluation_progress() as bars:
    # The tasks' own clock is another one.
    task = bars.add_task('evaluating', total=9)
    bars.update(task, completed=1)
    for _ in range(3):
      bars.advance(task)
  lines = stream.getvalue().splitlines()
  assert [re.search(r'(\d)/9', line)[1] for line in lines] == ['2', '4', '4']


def test_only_this_console_is_used(root):
  # Any other takes brackets in names for markup.
  others = re.compile(r'Console\(|rich\.print\(|from rich import')
  paths = [*root.glob('*.py'), *(root / 'resnest_jax').rglob('*.py')]
  found = [x for x in paths if others.search(x.read_text('utf-8'))]
  assert found == [root / 'resnest_jax/progress.py']


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8'])
def test_what_the_terminal_lacks_is_escaped(encoding, monkeypatch):
  def main():
    print('\u80cc [x]', 'stra\udcdfe')
    raise UserError('no \u53f6\udcdf')

  stream = io.TextIOWrapper(io.BytesIO(), encoding)
  for name in ('stdout', 'stderr'):
    monkeypatch.setattr(sys, name, stream)
  with pytest.raises(SystemExit, match='1'):
    run(main)
  lines = '\u80cc [x] stra\\udcdfe\nerror: no \u53f6\\udcdf\n'
  assert stream.buffer.getvalue() == lines.encode(encoding, 'backslashreplace')
