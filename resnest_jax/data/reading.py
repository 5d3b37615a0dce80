"""Since when each sample is being read, to tell what hangs."""

import contextlib
import mmap
import os
import time
from collections.abc import Iterator

import numpy as np


class ReadClock:
  """When the reading of each sample began, also in worker processes.

  Copies that were pickled write into the same memory where the system has
  memfd (Linux); elsewhere a worker keeps its times to itself.
  """

  def __init__(self, size: int):
    """Makes a clock for samples 0 to `size` - 1."""
    self._size = size
    self._file = -1
    if hasattr(os, 'memfd_create'):
      self._file = os.memfd_create('read-clock')
      os.ftruncate(self._file, 8 * size)
    self._since = _map(self._file, size)

  def __reduce__(self):
    return _open, (f'/proc/{os.getpid()}/fd/{self._file}', self._size)

  def __del__(self):
    if self._file >= 0:
      os.close(self._file)

  @contextlib.contextmanager
  def reading(self, index: int) -> Iterator[None]:
    """While this lasts sample `index` is being read."""
    self._since[index] = time.monotonic()  # The same clock in all processes.
    try:
      yield
    finally:
      self._since[index] = 0

  def longest(self) -> tuple[int, float] | None:
    """The sample that is read since longest, and since how many seconds."""
    since = np.array(self._since)
    if not since.any():
      return None
    index = int(np.where(since > 0, since, np.inf).argmin())
    return index, time.monotonic() - float(since[index])


def _map(file: int, size: int) -> np.ndarray:
  if file < 0:
    return np.zeros(size)
  return np.frombuffer(mmap.mmap(file, 8 * size), np.float64)


def _open(path: str, size: int) -> ReadClock:
  """The clock of another process."""
  clock = ReadClock.__new__(ReadClock)
  clock._size, clock._file = size, -1
  with contextlib.suppress(OSError):
    clock._file = os.open(path, os.O_RDWR)
  clock._since = _map(clock._file, size)
  return clock
