"""The number of threads, and an ordered map over them."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def thread_count(configured: int = 0, num_processes: int = 1) -> int:
  """Returns `configured`, or if 0 the cores of each process, at most 16."""
  if configured > 0:
    return configured
  if hasattr(os, 'sched_getaffinity'):  # Linux; respects sets of CPUs.
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
  """Yields `function(item)` of each item, in order.

  `function` should release the interpreter lock, as decoding does. `ahead`
  items per thread are submitted before the first result is used.
  """
  # Executor.map would consume all items at once, and fill the memory.
  num_threads = thread_count(num_threads)
  pool = ThreadPoolExecutor(num_threads)
  waiting: collections.deque[Future] = collections.deque()

  def first() -> Any:
    # It stays until it is done: an interrupt waits for what runs.
    result = waiting[0].result()
    waiting.popleft()
    return result

  try:
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) > ahead * num_threads:
        yield first()
    while waiting:
      yield first()
  except KeyboardInterrupt:
    # What runs gets a moment to end; a read may hang for ever.
    pool.shutdown(wait=False, cancel_futures=True)
    futures.wait([x for x in waiting if not x.cancelled()], timeout=5)
    raise
  except BaseException:
    pool.shutdown(cancel_futures=True)
    raise
  pool.shutdown()
