"""Processes that take part in one computation, on this machine."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(*command, devices, stderr=subprocess.PIPE, **variables):
  """Starts `python COMMAND` with so many devices; the output is piped."""
  flags = re.sub(r'(?<=count=)\d+', f'{devices}', os.environ['XLA_FLAGS'])
  ours = {'XLA_FLAGS': flags, 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT}/tests'}
  pipes = {'stdout': subprocess.PIPE, 'stderr': stderr, 'text': True}
  command = [sys.executable, *map(str, command)]
  environment = os.environ | ours | variables
  return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def join_flags(port, number, process_id):
  """What makes a command one of so many processes."""
  flags = ('--coordinator', f'127.0.0.1:{port}', '--num_processes', number)
  return *flags, '--process_id', process_id


def start_pair(*command, devices=2, second_only=()):
  """Starts it as two processes that join; one may have flags of its own."""
  port = free_port()
  return [
    start(*command, *join_flags(port, 2, host), *more, devices=devices)
    for host, more in enumerate(((), second_only))
  ]


def finish(process, status=0, timeout=300):
  """Waits for the end (None: any); returns what was printed and the errors."""
  try:
    stdout, stderr = process.communicate(timeout=timeout)
  finally:
    process.kill()
  assert status in (None, process.returncode), stdout + stderr
  return stdout, stderr


def error_of(process):
  """The line of a mistake that the process ends with."""
  return finish(process, status=1)[1].splitlines()[-1]
