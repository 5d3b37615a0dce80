"""Processes that take part in one computation, on this machine."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(*command, devices, **variables):
  """Starts `python COMMAND` with so many devices; the output is piped."""
  count = f'device_count={devices}'
  variables |= {
    'XLA_FLAGS': re.sub(r'device_count=\d+', count, os.environ['XLA_FLAGS']),
    'PYTHONPATH': os.pathsep.join([f'{ROOT}', f'{ROOT}/tests']),
  }
  return subprocess.Popen(
    [sys.executable, *map(str, command)],
    cwd=ROOT,
    env=os.environ | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_pair(*command, devices=2, second_only=()):
  """Starts it as two processes that join; one may have flags of its own."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  flags = ('--coordinator', f'127.0.0.1:{port}', '--num_processes', 2)
  return [
    start(*command, *flags, '--process_id', host, *more, devices=devices)
    for host, more in enumerate(((), second_only))
  ]


def finish(process, status=0, timeout=300):
  """Waits for the end; returns what was printed and the errors."""
  try:
    stdout, stderr = process.communicate(timeout=timeout)
  finally:
    process.kill()
  assert process.returncode == status, stdout + stderr
  return stdout, stderr
