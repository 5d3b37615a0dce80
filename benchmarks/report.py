"""What all benchmarks write beside their figures, and where."""

import datetime
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from resnest_jax import runtime


def describe_machine() -> dict[str, Any]:
  """Where and when something was measured."""
  return {
    'cpu': _cpu_name(),
    'cores': count_cores(),
    'date': datetime.date.today().isoformat(),
    'versions': runtime.versions(),
  }


def count_cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0))


def _cpu_name() -> str:
  try:
    text = Path('/proc/cpuinfo').read_text('utf-8')
  except OSError:
    text = ''
  found = re.search(r'^model name\s*: (.*)$', text, re.M)
  return found[1] if found else platform.processor() or platform.machine()


def write_result(out: Path, name: str, result: dict[str, Any]) -> Path:
  """Writes `OUT/NAME-DATE.json`; a result of the same day is replaced."""
  out.mkdir(parents=True, exist_ok=True)
  path = out / f'{name}-{result["date"]}.json'
  path.write_text(json.dumps(result, indent=2) + '\n', 'utf-8')
  print(f'written to {path}')
  return path
