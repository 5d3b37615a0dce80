"""Processes that take part in one computation, on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(devices):
  """The tests' variables, with another number of virtual devices."""
  flags = [
    flag
    for flag in os.environ['XLA_FLAGS'].split()
    if 'device_count' not in flag
  ]
  flags.append(f'--xla_force_host_platform_device_count={devices}')
  paths = [str(ROOT), str(ROOT / 'tests')]
  return os.environ | {
    'XLA_FLAGS': ' '.join(flags),
    'PYTHONPATH': os.pathsep.join(paths),
  }


def start(*command, devices):
  """Starts `python COMMAND` with so many devices; the output is piped."""
  return subprocess.Popen(
    [sys.executable, *map(str, command)],
    cwd=ROOT,
    env=environment(devices),
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
