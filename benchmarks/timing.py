"""Times functions in turns, so that what else a machine does meets them all."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def interleaved(
  ways: Mapping[str, Callable[[], Any]], rounds: int, least: float = 0.0
) -> dict[str, list[float]]:
  """Seconds that a call takes, of each way and round.

  Args:
    ways: name -> function without arguments; JAX's results are waited for.
    rounds: how often each has its turn, after one that warms up.
    least: seconds that a turn lasts at least: quick ones are called more often,
      and their mean counts.
  """

  def turn(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
      result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls

  calls = {}
  for name, function in ways.items():
    turn(function, 1)
    calls[name] = max(1, round(least / turn(function, 1)))
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(rounds):
    for name, function in ways.items():
      seconds[name].append(turn(function, calls[name]))
  return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
  """The median of each way."""
  return {name: statistics.median(found) for name, found in seconds.items()}
