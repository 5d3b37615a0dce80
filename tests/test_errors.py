"""How scripts end: one line and a status."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from resnest_jax.errors import TRACEBACK, UserError, run


def out_of_memory():
  jnp.zeros((2**20, 2**24))  # 70 TB


def out_of_host_memory():
  np.zeros(2**50)  # 9 PB


def refuse():
  raise UserError('there is no x; give y.')


def read_long_name():
  Path('x' * 5000).read_text()


def read_folder():
  Path('/').read_text()


def lose_storage():
  raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), b'/mnt/\xff')


@pytest.mark.parametrize(
  ('main', 'line'),
  [
    (out_of_memory, 'the device has too little memory (JaxRuntimeError: RES'),
    (out_of_host_memory, 'this machine has too little memory (MemoryError: U'),
    (refuse, 'there is no x; give y.'),
    (read_long_name, 'x+ [.]{3} x+ cannot be used: File name too long. Give a'),
    (read_folder, '/ cannot be used: Is a directory. '),
    (lose_storage, '/mnt/.* cannot be used: Stale file handle. See whe'),
    (lambda: print(b'\xff'.decode()), "UnicodeDecodeError: 'utf-8' codec can"),
  ],
)
def test_script_ends_with_one_line_and_its_status(main, line, capsys):
  with pytest.raises(SystemExit) as ended:
    run(main)
  assert ended.value.code == 1
  (said,) = capsys.readouterr().err.splitlines()
  assert re.match(f'error: {line}'.replace('(', r'\('), said)
  assert len(said) < 700


def fail_at_zero():
  return 1 / 0


def test_fault_of_ours_says_where_and_keeps_the_traceback(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  with pytest.raises(SystemExit, match='1'):
    run(fail_at_zero)
  (said,) = capsys.readouterr().err.splitlines()
  line = fail_at_zero.__code__.co_firstlineno + 1
  where = rf'ZeroDivisionError: .*\({re.escape(__file__)}, line {line}\)'
  path = re.search(rf'{where}\. .* report it .* is in (.*)\.$', said)[1]
  assert 'in fail_at_zero\n' in Path(path).read_text()


def test_flag_shows_the_traceback_of_any_error(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['train.py', TRACEBACK])
  with pytest.raises(SystemExit, match='1'):
    run(refuse)
  said = capsys.readouterr().err
  assert 'in refuse\n' in said
  assert said.endswith('\nerror: there is no x; give y.\n')


def process(text, **options):
  return subprocess.Popen(
    [sys.executable, '-c', text],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=Path(__file__).parent.parent,
    env={x: y for x, y in os.environ.items() if x != 'PYTHONUNBUFFERED'},
    **options,
  )


READS_HANG = """
import time
from resnest_jax.errors import run
from resnest_jax.threads import map_in_threads
def read(seconds):
  if seconds == 99:
    print('ready', flush=True)
  time.sleep(seconds)
run(lambda: list(map_in_threads(read, [0, 100, 99], 3)), 'stopped.')
"""
IMPORTS = """
import sys, time
from resnest_jax.errors import run
def main():
  print('ready', flush=True)
  import resnest_jax.data.datasets
  time.sleep(60)
run(main, 'stopped.')
"""


@pytest.mark.parametrize('text', [READS_HANG, IMPORTS])
def test_interrupt_ends_at_once(text):
  with process(text) as ended:
    assert ended.stdout.readline() == 'ready\n'
    time.sleep(0.5)
    ended.send_signal(signal.SIGINT)
    _, err = ended.communicate(timeout=20)
  assert (ended.returncode, err) == (130, 'stopped.\n')


IMPORTED = """
import os, signal, time
try:
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(5)
except KeyboardInterrupt:
  raise ImportError('An extension cannot be initialized.') from None
"""


def test_interrupt_of_an_import_that_takes_it_for_its_own(tmp_path):
  """As the initialization of numpy in C."""
  (tmp_path / 'imported.py').write_text(IMPORTED)
  text = (
    f'import sys\nsys.path.append({str(tmp_path)!r})\n'
    'from resnest_jax.errors import run\ndef main():\n  import imported\n'
    "run(main, 'stopped.')"
  )
  with process(text) as ended:
    _, err = ended.communicate(timeout=20)
  assert (ended.returncode, err) == (130, 'stopped.\n')


CLOSED = """
import os, sys
from resnest_jax.errors import run
from resnest_jax.training.stopping import Stopper
def main():
  with open(sys.argv[1], 'w') as file, Stopper().listen():
    print('said', flush=True)
    os.write(1, b'by C')
    os.write(2, b'by C')
    file.write('kept')
run(main)
"""


def test_closed_streams_spoil_no_file(tmp_path):
  shell = 'exec "$0" -c "$1" "$2" >&- 2>&-'
  words = ['bash', '-c', shell, sys.executable, CLOSED, tmp_path / 'file']
  ended = subprocess.run(words, cwd=Path(__file__).parent.parent)
  assert ended.returncode == 0
  assert (tmp_path / 'file').read_text() == 'kept'


PRINTS = """
from resnest_jax.errors import run
def main():
  for number in range(10**6):
    print('line', number)
run(main, 'stopped.')
"""
HELPS = """
import sys
from resnest_jax.errors import run
from resnest_jax.flags import Parser
sys.argv = ['x', '--help']
def main():
  input()
  Parser(description='x' * 100).parse_args()
run(main, 'stopped.')
"""


@pytest.mark.parametrize('text', [PRINTS, HELPS])
def test_output_that_nobody_reads_ends_without_a_traceback(text):
  with process(text, stdin=subprocess.PIPE) as ended:
    if text == PRINTS:
      assert ended.stdout.readline() == 'line 0\n'
    ended.stdout.close()
    ended.stdin.write('\n')
    ended.stdin.close()
    err = ended.stderr.read()
  assert err == 'nobody reads the output: stopped.\n'
  assert ended.returncode == 128 + signal.SIGPIPE
