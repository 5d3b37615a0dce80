"""Machine, versions and date, which all benchmarks write with their figures."""

import datetime
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
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


def device_name() -> str:
  """The kind of the devices, for the name of a file."""
  import jax

  return jax.devices()[0].device_kind.replace(' ', '_').lower()


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


def write_result(
  out: Path, name: str, result: dict[str, Any], smoke: bool = False
) -> Path:
  """Writes `OUT/NAME-DATE.json`; a result of the same day is replaced.

  That of a smoke run is `smoke-NAME-DATE.json`.
  """
  name = f'smoke-{name}' if smoke else name
  out.mkdir(parents=True, exist_ok=True)
  path = out / f'{name}-{result["date"]}.json'
  path.write_text(json.dumps(result, indent=2) + '\n', 'utf-8')
  print(f'written to {path}')
  return path


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  """Prints a table whose columns but the first are aligned to the right."""
  widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
  for cells in (columns, *rows):
    first, *others = (
      cell.rjust(width) if index else cell.ljust(width)
      for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    print('  '.join([first, *others]).rstrip())


def draw_bars(
  path: Path,
  groups: Mapping[str, Mapping[str, float]],
  unit: str,
  title: str,
  log: bool = False,
) -> None:
  """Draws groups of horizontal bars as a PNG, where matplotlib is installed.

  Args:
    path: of the PNG.
    groups: name of a group -> name of a bar -> length.
    unit: of the lengths.
    title: above the picture.
    log: of lengths that differ by orders of magnitude; bars begin at 1.
  """
  try:
    import matplotlib.figure  # No window system is needed.
  except ImportError:
    print('not drawn: matplotlib is not installed')
    return

  names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
  total = sum(len(bars) + 1 for bars in groups.values())
  figure = matplotlib.figure.Figure(
    (7, 1.3 + 0.22 * total), layout='constrained'
  )
  axes = figure.subplots()
  place, ticks = 0.0, []
  for bars in groups.values():
    ticks.append(place + (len(bars) - 1) / 2)
    for name, length in bars.items():
      color = f'C{names.index(name) % 10}'
      start = 1 if log else 0
      axes.barh(place, length - start, 0.9, left=start, color=color)
      shown = f' {length:.0f}' if length >= 100 else f' {length:.3g}'
      axes.text(length, place, shown, va='center', fontsize=7)
      place += 1
    place += 1
  axes.set_yticks(ticks, groups, fontsize=8)
  axes.invert_yaxis()
  axes.margins(x=0.1)
  if log:
    axes.set_xscale('log')
    axes.axvline(1, color='black', linewidth=0.8)
  axes.set_xlabel(unit)
  axes.set_title(title, fontsize=9)
  handles = [
    matplotlib.patches.Patch(color=f'C{index % 10}', label=name)
    for index, name in enumerate(names)
  ]
  figure.legend(
    handles=handles, fontsize=8, loc='outside lower center', ncols=4
  )
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=120)
  print(f'drawn to {path}')
