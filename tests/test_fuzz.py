"""Damaged and odd inputs of all kinds, for a while; `fuzz.py` has more."""

import re

import pytest

pytestmark = pytest.mark.long

# Faults as the commands must not have them, added to the kinds.
PLANTED = """import ctypes, sys, threading, time
sys.path.insert(0, 'tests')
import fuzz
def start(thread):
  thread.start()
  thread.join()
def refuse(text):
  raise fuzz.UserError(text)
fuzz.SECONDS, fuzz.GIGABYTES, fuzz.LINE = 9, 0.4, 999
fuzz.KINDS |= {
  'divides': lambda *_: 1 / 0,
  'crashes': lambda *_: ctypes.string_at(0),
  'hangs': lambda *_: time.sleep(99),
  'grows': lambda *_: b'x' * 2**29,
  'thread': lambda *_: start(threading.Thread(target=lambda: 1 / 0)),
  'lengthy': lambda *_: refuse('x ' * 999),
  'short': lambda *_: refuse('x'),
}
if __name__ == '__main__':
  fuzz.main()"""


def counts(run_script, *words, **options):
  """Kind -> inputs that were used, refused, failed; and what was printed."""
  printed = run_script(*words, **options).stdout
  rows = re.findall(r'^(\w+) +(\d+) +(\d+) +(\d+) +[\d.]+ s$', printed, re.M)
  return {kind: tuple(map(int, number)) for kind, *number in rows}, printed


def test_a_while_of_damaged_inputs(run_script):
  words = 'tests/fuzz.py', '--seconds', 90, '--inputs', 2000
  of, _ = counts(run_script, *words)
  assert len(of) == 16
  assert all(sum(numbers) > 2 and not numbers[2] for numbers in of.values())
  used, refused, _ = map(sum, zip(*of.values(), strict=True))
  # Neither is everything refused at the door, nor is nothing damaged.
  assert used > 20
  assert refused > 50


def test_faults_of_each_kind_are_noticed(run_script, tmp_path):
  (tmp_path / 'planted.py').write_text(PLANTED)
  names = ('divides', 'crashes', 'hangs', 'grows', 'thread', 'lengthy', 'short')
  words = tmp_path / 'planted.py', '--only', *names, '--inputs', len(names)
  of, printed = counts(run_script, *words, status=1)
  assert {x: of[x][2] for x in of} == dict.fromkeys(names, 1) | {'short': 0}
  assert 'ZeroDivisionError' in printed
