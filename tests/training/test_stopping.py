"""Signals, at any moment: what is saved and how the process ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

BEGIN = """
import hashlib, os, signal, sys, threading, time
from resnest_jax.errors import UserError
from resnest_jax.training import stopping

def save():
  assert threading.current_thread() is not threading.main_thread()
  print('saved', flush=True)
  return 'step 7 is saved'

stopper = stopping.Stopper()
with stopper.listen():
"""
READY = "  print('ready', flush=True)\n"
# C code that returns in hours.
COMPUTE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"


class Ended:
  """A process of this text that gets signals once it has said 'ready'."""

  def __init__(self, root, text, *signals, pause=0.0, **options):
    with subprocess.Popen(
      [sys.executable, '-c', BEGIN + text],
      cwd=root,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      **options,
    ) as process:
      assert process.stdout.readline() == 'ready\n'
      started = time.monotonic()
      for number in signals:
        time.sleep(pause)
        process.send_signal(number)
      self.out, self.err = process.communicate(timeout=60)
    self.status = process.returncode
    self.seconds = time.monotonic() - started


IN_C = f'  with stopper.waiting(save):\n  {READY}    {COMPUTE}'
IN_STEPS = """
  with stopper.busy():
    with stopper.waiting(save):
      pass
    print('ready', flush=True)
    while not stopper.requested(3):
      time.sleep(0.01)
    time.sleep(0.5)  # Nobody else may end it here.
    def save_here():
      print('by the main thread')
      return ''
    stopper.stop(save_here)
"""
SLOW = """
  stopping.DUPLICATE_SECONDS = 0.5
  def slow():
    time.sleep({seconds})
    print('saved', flush=True)
    return ''
  with stopper.waiting(slow):
    print('ready', flush=True)
    time.sleep(60)
"""
FULL = f"""
  def fail():
    raise UserError('the disk is full')
  with stopper.waiting(fail):
  {READY}    {COMPUTE}"""
HUNG = f"""
  with stopper.waiting(save, lambda: 'no data for 9 s.'):
  {READY}    {COMPUTE}"""
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
HUP = signal.SIGHUP


@pytest.mark.parametrize(
  ('text', 'signals', 'status', 'out', 'err'),
  [
    # In C code it is saved and ended at once.
    *(
      (
        *(IN_C, [number], status, 'saved\n'),
        rf'stopped by {number.name}; step 7 is saved.*the same command resumes',
      )
      for number, status in ((TERM, 75), (USR1, 75), (HUP, 75), (INT, 130))
    ),
    # Before and after the training there is nothing to save.
    (f'{READY}  {COMPUTE}', [TERM], 75, '', 'stopped by SIGTERM'),
    # Between steps the main thread saves.
    (IN_STEPS, [TERM], 75, 'by the main thread\n', 'stopped by SIGTERM'),
    (IN_STEPS, [INT], 130, 'by the main thread\n', 'stopped by SIGINT'),
    # The same signal to the group is no second one.
    (SLOW.format(seconds=1), [TERM, TERM], 75, 'saved\n', ''),
    # What cannot be saved is an error.
    (FULL, [TERM], 1, '', r'(^|\n)error: the disk is full\n$'),
    (HUNG, [], 1, 'saved\n', r'^error: no data for 9 s\. step 7 is saved\n$'),
  ],
)
def test_end_with_the_state_saved(root, text, signals, status, out, err):
  ended = Ended(root, text, *signals)
  assert (ended.status, ended.out) == (status, out)
  assert re.search(err, ended.err, re.DOTALL)
  assert ended.err.count('stopped by') <= 1
  assert ended.seconds < 20


def test_a_second_signal_ends_at_once(root):
  ended = Ended(root, SLOW.format(seconds=50), TERM, TERM, pause=1.0)
  assert (ended.status, ended.out) == (75, '')
  assert 'SIGTERM again: ended at once' in ended.err
  assert ended.seconds < 30


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
@pytest.mark.parametrize('where', ['pipe', 'terminal'])
def test_state_is_saved_when_nobody_reads_the_output(root, text, where):
  here, there = os.pipe() if where == 'pipe' else os.openpty()
  words = [sys.executable, '-c', BEGIN + text]
  process = subprocess.Popen(
    words, cwd=root, stdout=there, stderr=subprocess.PIPE, text=True
  )
  os.close(there)
  assert os.read(here, 5) == b'ready'
  os.close(here)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75, err
  first, *middle, last = err.splitlines()
  assert first.startswith('SIGPIPE: stopping')
  assert middle == ['saved']
  assert last.startswith(
    'stopped by SIGPIPE; step 3 is saved; the same command'
  )


def test_what_was_ignored_stays_ignored_and_handlers_come_back(root):
  text = """
  print('ready', flush=True)
  time.sleep(1)
print(*map(int, map(signal.getsignal, (signal.SIGTERM, signal.SIGINT))))
"""

  def ignore():
    signal.signal(signal.SIGINT, signal.SIG_IGN)

  ended = Ended(root, text, signal.SIGINT, preexec_fn=ignore)
  assert ended.status == 0
  default, ignored = int(signal.SIG_DFL), int(signal.SIG_IGN)
  assert ended.out.split() == [str(default), str(ignored)]


SEVERAL = """
  import jax
  jax.distributed.initialize('localhost:{port}', 1, 0)
  with stopper.busy():
    print('ready', flush=True)
    step = 0
    while not stopper.requested(step):
      step += 1
      time.sleep(0.02)
  print('agreed', flush=True)
  os._exit(0)
"""


@pytest.mark.parametrize('number', [TERM, USR1])
def test_several_processes_agree_on_the_step(root, number):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    text = SEVERAL.format(port=free.getsockname()[1])
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  ended = Ended(root, text, number, env=environment)
  assert (ended.status, ended.out) == (0, 'agreed\n')
