"""Times functions in turns, so that what else a machine does meets them all."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks.flags import positive

# On a CPU that others use as well, the time of all threads of this process says
# more than the time that passes.
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


def add_flags(parser: argparse.ArgumentParser, rounds: int) -> None:
  """The flags `--rounds` and `--clock`."""
  parser.add_argument(
    '--rounds',
    type=positive,
    default=rounds,
    help='medians are over these (default: %(default)s)',
  )
  parser.add_argument(
    '--clock',
    choices=CLOCKS,
    default='wall',
    help='cpu: the time of all threads of the process, for a shared CPU',
  )


def interleaved(
  ways: Mapping[str, Callable[[], Any]],
  rounds: int,
  clock: str,
  least: float = 0.0,
) -> dict[str, list[float]]:
  """Seconds that a call takes, of each way and round.

  Args:
    ways: name -> function without arguments; JAX's results are waited for.
    rounds: how often each has its turn, after one that warms up.
    clock: of `CLOCKS`.
    least: seconds that a turn lasts at least: quick ones are called more often,
      and their mean counts.
  """

  def turn(function: Callable[[], Any], calls: int) -> float:
    start = CLOCKS[clock]()
    for _ in range(calls):
      result = function()
    jax.block_until_ready(result)
    return (CLOCKS[clock]() - start) / calls

  calls = {}
  for name, function in ways.items():
    turn(function, 1)
    calls[name] = max(1, round(least / turn(function, 1))) if least else 1
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(rounds):
    for name, function in ways.items():
      seconds[name].append(turn(function, calls[name]))
  return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
  """The median of each way."""
  return {name: statistics.median(found) for name, found in seconds.items()}
