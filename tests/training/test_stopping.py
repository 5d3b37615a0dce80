"""Signals, at any moment: what is saved and how the process ends."""

import os
import re
import signal
import sys
import time
from subprocess import PIPE, Popen

import pytest
from hosts import finish, start

BEGIN = """
import hashlib, os, signal, sys, threading, time
from resnest_jax.errors import UserError
from resnest_jax.training import stopping

def save():
  assert threading.current_thread() is not threading.main_thread()
  print('saved', flush=True)
  return 'step 7 is saved'

def fail():
  raise UserError('the disk is full')

stopper = stopping.Stopper()
with stopper.listen():
"""
READY = "  print('ready', flush=True)\n"
# C code that returns in hours.
COMPUTE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"


def ended(text, *signals, status=75, pause=0.0, first=''):
  """Output and errors of a process that gets signals once it is 'ready'."""
  process = start('-c', first + BEGIN + text, devices=1, JAX_PLATFORMS='cpu')
  assert process.stdout.readline() == 'ready\n'
  for number in signals:
    time.sleep(pause)
    process.send_signal(number)
  return finish(process, status, timeout=20)


def in_c(task):
  return f'  with stopper.waiting({task}):\n  {READY}    {COMPUTE}'


IN_STEPS = """
  with stopper.busy():
    with stopper.waiting(save):
      pass
    print('ready', flush=True)
    step = 0
    while not stopper.requested(step):
      step += 1
      time.sleep(0.01)
    time.sleep(0.5)  # Nobody else may end it here.
    stopper.stop(lambda: print('by the main thread') or '')
"""
# Several processes agree on a step, here one with itself.
JOINED = f"""
  import jax
  port = 20_000 + os.getpid() % 10_000
  jax.distributed.initialize(f'localhost:{{port}}', 1, 0)
{IN_STEPS}"""
# One that waits for the others, in C code.
LATER = f'  threading.Timer(2, os.kill, [os.getpid(), 15]).start()\n{READY}'
ALONE = JOINED.replace(' 1, 0)', ' 2, 0)').replace('  jax.', f'{LATER}  jax.')
SLOW = """
  stopping.DUPLICATE_SECONDS = 0.5
  with stopper.waiting(lambda: time.sleep({}) or save()):
    print('ready', flush=True)
    time.sleep(60)
"""
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
HUP = signal.SIGHUP
SAVED = 'step 7 is saved.*the same command resumes'


@pytest.mark.parametrize(
  ('text', 'signals', 'status', 'out', 'err'),
  [
    # In C code it is saved and ended at once.
    (in_c('save'), [TERM], 75, 'saved\n', f'stopped by SIGTERM; {SAVED}'),
    (in_c('save'), [USR1], 75, 'saved\n', f'stopped by SIGUSR1; {SAVED}'),
    (in_c('save'), [HUP], 75, 'saved\n', f'stopped by SIGHUP; {SAVED}'),
    (in_c('save'), [INT], 130, 'saved\n', f'stopped by SIGINT; {SAVED}'),
    # Before and after the training there is nothing to save.
    (f'{READY}  {COMPUTE}', [TERM], 75, '', 'stopped by SIGTERM'),
    # Between steps the main thread saves.
    (IN_STEPS, [TERM], 75, 'by the main thread\n', 'stopped by SIGTERM'),
    (IN_STEPS, [INT], 130, 'by the main thread\n', 'stopped by SIGINT'),
    (JOINED, [TERM], 75, 'by the main thread\n', 'stopped'),
    (ALONE, [], 75, '', 'stopped by SIGTERM'),
    (f"  stopper.rest = 'end'\n{READY}  {COMPUTE}", [TERM], 75, '', '; end'),
    (JOINED, [USR1], 75, 'by the main thread\n', 'stopped by SIGUSR1'),
    # The same signal to the group is no second one.
    (SLOW.format(1), [TERM, TERM], 75, 'saved\n', f'by SIGTERM; {SAVED}'),
    # What cannot be saved is an error.
    (in_c('fail'), [TERM], 1, '', r'(^|\n)error: the disk is full\n$'),
    (
      *(in_c("save, lambda: 'no data for 9 s.'"), [], 1, 'saved\n'),
      r'^error: no data for 9 s\. step 7 is saved\n$',
    ),
  ],
)
def test_end_with_the_state_saved(text, signals, status, out, err):
  output, errors = ended(text, *signals, status=status)
  assert output == out
  assert re.search(err, errors, re.DOTALL)
  assert errors.count('stopped by') <= 1


def test_a_second_signal_ends_at_once():
  output, errors = ended(SLOW.format(50), TERM, TERM, pause=1.0)
  assert output == ''
  assert 'SIGTERM again: ended at once' in errors


PRINTING = """
  with stopper.busy():
    print('ready', flush=True)
    while not stopper.requested(3):
      print('step', flush=True)
      sys.stdout.write('more' * 5000)
      time.sleep(0.01)
    stopper.stop(lambda: os.write(2, b'saved\\n') and 'step 3 is saved')
"""
WAITING = """
  with stopper.waiting(lambda: os.write(2, b'saved\\n') and 'step 3 is saved'):
    print('ready', flush=True)
    while True:
      print('evaluating', flush=True)
"""


@pytest.mark.parametrize('text', [PRINTING, WAITING])
@pytest.mark.parametrize('ends', [os.pipe, os.openpty])
def test_state_is_saved_when_nobody_reads_the_output(root, text, ends):
  here, there = ends()
  words = [sys.executable, '-c', BEGIN + text]
  process = Popen(words, cwd=root, stdout=there, stderr=PIPE, text=True)
  os.close(there)
  assert os.read(here, 5) == b'ready'
  os.close(here)
  _, errors = finish(process, status=75, timeout=60)
  first, *middle, last = errors.splitlines()
  assert first.startswith('SIGPIPE: stopping')
  assert middle == ['saved']
  assert last.startswith(
    'stopped by SIGPIPE; step 3 is saved; the same command'
  )


def test_what_was_ignored_stays_ignored_and_handlers_come_back():
  text = f"""
{READY}  time.sleep(1)
print(*map(int, map(signal.getsignal, (signal.SIGTERM, signal.SIGINT))))
"""
  ignore = 'import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)'
  output, _ = ended(text, INT, status=0, first=ignore)
  assert output.split() == [
    f'{int(x)}' for x in (signal.SIG_DFL, signal.SIG_IGN)
  ]
