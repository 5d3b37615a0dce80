"""Damaged and odd inputs of all kinds, for a minute; `fuzz.py` has more."""

import re

import pytest

pytestmark = pytest.mark.long

# Faults as the commands must not have them, added to the kinds.
PLANTED = """
import ctypes, sys, threading, time
sys.path.insert(0, 'tests')
import fuzz
from resnest_jax.errors import UserError

def thread():
  t = threading.Thread(target=lambda: 1 / 0)
  t.start()
  t.join()

def refuse(text):
  raise UserError(text)

FAULTS = {
  'divides': lambda: 1 / 0,
  'crashes': lambda: ctypes.string_at(0),
  'hangs': lambda: time.sleep(99),
  'grows': lambda: b'x' * 2**29,
  'thread': thread,
  'lengthy': lambda: refuse('x ' * 999),
  'short': lambda: refuse('x'),
}
fuzz.SECONDS, fuzz.GIGABYTES, fuzz.LINE = 9, 0.4, 999
for name, fault in FAULTS.items():
  fuzz.KINDS[name] = lambda rng, source, fault=fault: fault()
if __name__ == '__main__':
  fuzz.main()
"""


def counts(printed):
  """Kind -> inputs that were used, refused, failed."""
  rows = re.findall(r'^(\w+) +(\d+) +(\d+) +(\d+) +[\d.]+ s$', printed, re.M)
  return {kind: tuple(map(int, number)) for kind, *number in rows}


def test_a_minute_of_damaged_inputs(run_script):
  printed = run_script(
    'tests/fuzz.py', '--seconds', 60, '--inputs', 2000
  ).stdout
  of = counts(printed)
  assert len(of) == 14
  assert all(sum(numbers) > 2 and not numbers[2] for numbers in of.values())
  used, refused = (sum(x[i] for x in of.values()) for i in (0, 1))
  # Neither is everything refused at the door, nor is nothing damaged.
  assert used > 20
  assert refused > 50


def test_faults_of_each_kind_are_noticed(run_script, tmp_path):
  (tmp_path / 'planted.py').write_text(PLANTED)
  names = ('divides', 'crashes', 'hangs', 'grows', 'thread', 'lengthy', 'short')
  words = '--only', *names, '--inputs', len(names)
  process = run_script(tmp_path / 'planted.py', *words, status=1)
  failed = {
    name: numbers[2] for name, numbers in counts(process.stdout).items()
  }
  assert failed == dict.fromkeys(names, 1) | {'short': 0}
  assert 'ZeroDivisionError' in process.stdout
