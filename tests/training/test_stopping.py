"""Signals, at any moment: what is saved and how the process ends."""

import os
import signal
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


@pytest.mark.parametrize(
  ('number', 'status'),
  [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)],
)
def test_in_c_code_it_is_saved_and_ended_at_once(root, number, status):
  text = f'  with stopper.waiting(save):\n  {READY}    {COMPUTE}'
  ended = Ended(root, text, number)
  assert (ended.status, ended.out) == (status, 'saved\n')
  assert f'stopped by {number.name}; step 7 is saved' in ended.err
  assert 'the same command goes on' in ended.err
  assert ended.seconds < 20


def test_before_and_after_the_training_there_is_nothing_to_save(root):
  ended = Ended(root, f'{READY}  {COMPUTE}', signal.SIGTERM)
  assert (ended.status, ended.out) == (75, '')


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


@pytest.mark.parametrize(
  ('number', 'status'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_between_steps_the_main_thread_saves(root, number, status):
  ended = Ended(root, IN_STEPS, number)
  assert (ended.status, ended.out) == (status, 'by the main thread\n')
  assert ended.err.count('stopped by') == 1


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


def test_a_second_signal_ends_at_once(root):
  text = SLOW.format(seconds=50)
  ended = Ended(root, text, signal.SIGTERM, signal.SIGTERM, pause=1.0)
  assert (ended.status, ended.out) == (75, '')
  assert 'SIGTERM again: ended at once' in ended.err
  assert ended.seconds < 30


def test_the_same_signal_to_the_group_is_no_second_one(root):
  text = SLOW.format(seconds=1)
  ended = Ended(root, text, signal.SIGTERM, signal.SIGTERM)
  assert (ended.status, ended.out) == (75, 'saved\n')


def test_state_that_cannot_be_saved_is_an_error(root):
  text = f"""
  def fail():
    raise UserError('the disk is full')
  with stopper.waiting(fail):
  {READY}    {COMPUTE}"""
  ended = Ended(root, text, signal.SIGTERM)
  assert ended.status == 1
  assert ended.err.splitlines()[-1] == 'error: the disk is full'


def test_hung_data_end_with_the_state_saved(root):
  text = f"""
  with stopper.waiting(save, lambda: 'no data for 9 s.'):
  {READY}    {COMPUTE}"""
  ended = Ended(root, text)
  assert (ended.status, ended.out) == (1, 'saved\n')
  assert ended.err == 'error: no data for 9 s. step 7 is saved\n'


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


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_several_processes_agree_on_the_step(root, number, free_port):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  text = SEVERAL.format(port=free_port)
  ended = Ended(root, text, number, env=environment)
  assert (ended.status, ended.out) == (0, 'agreed\n')


@pytest.fixture
def free_port():
  """A TCP port that was free just now."""
  import socket

  with socket.socket() as server:
    server.bind(('localhost', 0))
    return server.getsockname()[1]
