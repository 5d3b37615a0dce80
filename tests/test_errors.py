"""How scripts end: one line and a status."""

import errno
import importlib
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
from hosts import finish, start

from resnest_jax.errors import TRACEBACK, UserError, explain, run


def out_of_memory():
  jnp.zeros((2**20, 2**24))  # 70 TB


def no_dispatch():
  raise RuntimeError('INTERNAL: Out of memory allocating 9 bytes.')


def refuse():
  raise UserError('there is no x; give y.')


def lose_storage():
  raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), b'/mnt/\xff')


def end(main, capsys):
  with pytest.raises(SystemExit) as ended:
    run(main)
  assert ended.value.code == 1
  return capsys.readouterr().err


ENDS = [
  (out_of_memory, 'the device has too little memory (JaxRuntimeError: RES'),
  (no_dispatch, 'the device has too little memory (RuntimeError: INTERNAL: '),
  (lambda: np.zeros(2**50), 'this machine has too little memory (MemoryError'),
  (refuse, 'there is no x; give y.'),
  (lambda: os.stat('x' * 5000), 'x+ [.]{3} x+ cannot be used: File name too'),
  (lambda: Path('/').read_text(), '/ cannot be used: Is a directory. '),
  (lose_storage, '/mnt/.* cannot be used: Stale file handle. See whe'),
  (lambda: print(b'\xff'.decode()), "UnicodeDecodeError: 'utf-8' codec can"),
]


@pytest.mark.parametrize(('main', 'line'), ENDS)
def test_script_ends_with_one_line_and_its_status(main, line, capsys):
  (said,) = end(main, capsys).splitlines()
  assert re.match(f'error: {line}'.replace('(', r'\('), said)
  assert len(said) < 700


def fail_at_zero():
  return 1 / 0


def test_fault_of_ours_says_where_and_keeps_it(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  (said,) = end(fail_at_zero, capsys).splitlines()
  line = fail_at_zero.__code__.co_firstlineno + 1
  where = rf'ZeroDivisionError: .*\({re.escape(__file__)}, line {line}\)'
  path = re.search(rf'{where}\. .* report it .* is in (.*)\.$', said)[1]
  assert 'in fail_at_zero\n' in Path(path).read_text()


def test_flag_shows_the_traceback_of_any_error(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['train.py', TRACEBACK])
  said = end(refuse, capsys)
  assert 'in refuse\n' in said
  assert said.endswith('\nerror: there is no x; give y.\n')


READS_HANG = """from resnest_jax.threads import map_in_threads
def main():
  list(map_in_threads(time.sleep, [0, 100, 99], 3))"""
# As the initialization of numpy in C takes the interrupt for its own.
IMPORTED = """Path('imported.py').write_text('''
try:
  __import__('time').sleep(60)
except KeyboardInterrupt:
  raise ImportError('An extension cannot be initialized.') from None
''')
sys.path.append('')
def main():
  import imported"""
PRINTS = """def main():
  for number in range(10**6):
    print('line', number)"""
HELPS = """from resnest_jax.flags import Parser
sys.argv = ['x', '--help']
def main():
  while not errors._output_is_gone():
    time.sleep(0.01)
  Parser(description='x' * 100).parse_args()"""
SCRIPT = """import os, sys, time
from pathlib import Path
from resnest_jax import errors
os.chdir(sys.argv[1])
{}
print('ready', flush=True)
errors.run(main, 'stopped.')"""


def started(main, folder):
  """Runs it in that folder, and waits until it is ready."""
  script = SCRIPT.format(main)
  process = start('-c', script, folder, devices=1, PYTHONUNBUFFERED='')
  assert process.stdout.readline() == 'ready\n'
  return process


@pytest.mark.parametrize('main', [READS_HANG, IMPORTED])
def test_interrupt_ends_at_once(main, tmp_path):
  process = started(main, tmp_path)
  time.sleep(0.5)
  process.send_signal(signal.SIGINT)
  assert finish(process, 130, timeout=20) == ('', 'stopped.\n')


@pytest.mark.parametrize('main', [PRINTS, HELPS])
def test_output_that_nobody_reads_ends_without_a_traceback(main, tmp_path):
  with started(main, tmp_path) as process:
    process.stdout.close()
    said = process.stderr.read()
  assert said == 'nobody reads the output: stopped.\n'
  assert process.returncode == 141


CLOSED = """import os, sys
from resnest_jax.errors import run
from resnest_jax.training.stopping import Stopper
def main():
  with open(sys.argv[1], 'w') as file, Stopper().listen():
    print('said', flush=True)
    os.write(1, b'by C')
    os.write(2, b'by C')
    file.write('kept')
run(main)"""


def test_closed_streams_spoil_no_file(root, tmp_path):
  shell = 'exec "$0" -c "$1" "$2" >&- 2>&-'
  words = ['bash', '-c', shell, sys.executable, CLOSED, tmp_path / 'file']
  subprocess.run(words, cwd=root, check=True)
  assert (tmp_path / 'file').read_text() == 'kept'


def test_a_missing_package_is_no_fault_of_ours():
  with pytest.raises(ModuleNotFoundError) as raised:
    importlib.import_module('no_such_package.inside')
  said = explain(raised.value)
  assert said.startswith('the package no_such_package is missing. Activate')
