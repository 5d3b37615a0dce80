"""What is printed: names are no markup, whatever characters they have."""

import io
import re

import numpy as np
import rich.table

from resnest_jax import progress
from resnest_jax.data.sampling import share_table

# They mean something to some sink: markup, emoji, HTML, a formula.
NAMES = [
  '[void]',
  'sky [blue]',
  'a[/b]',
  'road [/red]',
  ':car:',
  '{task.total}',
  'x\\',
  '<b>&amp;',
  '$a_1$',
  '\u80cc\u666f',
]


def printed(*contents):
  stream = io.StringIO()
  for content in contents:
    progress.console(file=stream, width=400).print(content, soft_wrap=True)
  return stream.getvalue()


def test_tables_and_lines_have_names_as_they_are():
  lines = [f'written to runs/{name}/eval' for name in NAMES]
  assert printed(*lines).splitlines() == lines
  counts = np.ones((2, len(NAMES) + 1), int)
  shares = printed(share_table(counts, np.ones(2) / 2, NAMES)).splitlines()
  assert [row.split('\u2502')[1].strip() for row in shares[4:-1]] == NAMES
  titled = rich.table.Table(*NAMES, title=' '.join(NAMES))
  assert all(printed(titled).count(name) == 2 for name in NAMES)


def test_progress_bars_have_names_as_they_are(monkeypatch):
  stream = io.StringIO()
  monkeypatch.setattr('sys.stdout', stream)
  with progress.evaluation_progress() as bars:
    for name in NAMES:
      bars.add_task(name, total=1)
  assert all(name in stream.getvalue() for name in NAMES)


def test_only_this_console_is_used(root):
  # Any other takes brackets in names for markup.
  others = re.compile(r'Console\(|rich\.print\(|from rich import')
  found = {
    path.relative_to(root).as_posix()
    for path in (*root.glob('*.py'), *(root / 'resnest_jax').rglob('*.py'))
    if others.search(path.read_text('utf-8'))
  }
  assert found == {'resnest_jax/progress.py'}


def test_what_the_terminal_lacks_is_escaped(run_script):
  code = (
    'import os, sys; from resnest_jax.errors import UserError, run\n'
    'def main():\n'
    "  print('\\u80cc [x]', os.fsdecode(b'stra\\xdfe'))\n"
    "  raise UserError('no \\u53f6\\udcdf')\n"
    'run(main)'
  )
  for encoding, word in (('ascii', r'\u80cc'), ('utf-8', '\u80cc')):
    process = run_script(
      '-c', code, status=1, environment={'PYTHONIOENCODING': encoding}
    )
    assert process.stdout == f'{word} [x] stra\\udcdfe\n'
    assert 'error: no ' in process.stderr
    assert '\\udcdf' in process.stderr
