"""Work shared by threads: how many there are, and results in order."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def thread_count(configured: int = 0, num_processes: int = 1) -> int:
  """How many threads work in each process.

  Args:
    configured: 0: the cores that this process may use, shared out among the
      processes, at most 16 threads each.
    num_processes: that work at the same time.
  """
  if configured > 0:
    return configured
  if hasattr(os, 'sched_getaffinity'):  # Respects containers; Linux only.
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count() or 1
  return max(1, min(16, cores // num_processes))


def map_in_threads(
  function: Callable[[Any], Any],
  items: Iterable[Any],
  num_threads: int = 0,
  ahead: int = 4,
) -> Iterator[Any]:
  """Yields the function of each item, in order.

  Unlike `Executor.map`, it takes items as results are asked for, so that
  memory stays small however many there are.

  Args:
    function: releases the interpreter lock most of the time, as decoding
      does.
    items: taken one by one, in the caller's thread.
    num_threads: see `thread_count`.
    ahead: how many items a thread are taken before their results are asked
      for.
  """
  num_threads = thread_count(num_threads)
  pool = ThreadPoolExecutor(num_threads)
  waiting: collections.deque[Future] = collections.deque()
  try:
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) > ahead * num_threads:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)  # Nobody will ask for the others.
