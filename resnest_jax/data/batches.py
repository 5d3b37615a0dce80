"""Batches as they are read: checked samples, a clock for reads that hang.

A `CheckedSplit` names the sample that fails, a `ReadClock` knows since when
each is being read, also in worker processes, and a `BatchIterator` says what
was skipped and what hangs.
"""

import contextlib
import mmap
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from resnest_jax.data import transforms
from resnest_jax.errors import UnreadableSample, UserError

Batch = dict[str, Any]
# Samples tried in place of one that cannot be read.
REPLACEMENTS = 10
_SKIPPING = (
  'Training goes on without such samples with '
  '--config.data.skip_unreadable=true (evaluation does not).'
)


class Split(Protocol):
  """What is read: random access to samples, safe to use from threads.

  A sample is a dict of `image` uint8 (H, W, 3) RGB, `label` uint8 (H, W) train
  ids with 255 ignored, and `name`. With worker processes it must pickle.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...

  def location(self, index: int) -> str: ...  # Nothing is read.


class Unreadable(NamedTuple):
  """Stands for the sample of this index, which cannot be read."""

  index: int


class CheckedSplit:
  """A split whose samples are checked and whose failures name the sample.

  With `skip_unreadable`, a sample that cannot be read is an `Unreadable`.

  Attributes:
    split: what is read.
  """

  def __init__(self, split: Split, skip_unreadable: bool = False):
    if len(split) == 0:
      raise UserError(
        'the split has no samples. Prepare the data again, or choose another '
        'split in the config.'
      )
    self.split = split
    self._skip_unreadable = skip_unreadable
    self._clock = ReadClock(len(split))

  def __len__(self) -> int:
    return len(self.split)

  def __getitem__(self, index: int) -> dict[str, Any] | Unreadable:
    try:
      with self._clock.reading(index):
        sample = self.split[index]
    except UserError as error:
      if self._skip_unreadable and isinstance(error, UnreadableSample):
        return Unreadable(index)
      if isinstance(error, UnreadableSample):
        raise UnreadableSample(f'{error}\n{_SKIPPING}') from error
      raise
    except Exception as error:
      # Also because not every exception survives the way back from a worker
      # process, and one that does not would leave the reader waiting.
      raise RuntimeError(
        f'reading sample {index} failed: {type(error).__name__}: {error}'
      ) from error
    transforms.check_sizes(sample['image'], sample['label'], sample['name'])
    return sample

  def longest_read(self) -> str:
    """What is being read since longest, '' if nothing is."""
    longest = self._clock.longest()
    if longest is None:
      return ''
    index, seconds = longest
    return f'{self.split.location(index)}, read since {seconds:.0f} s'


def replacement(
  split: CheckedSplit, rng: np.random.Generator
) -> dict[str, Any]:
  """Another sample in place of one that cannot be read.

  Raises:
    UserError: `REPLACEMENTS` others cannot be read either.
  """
  for _ in range(REPLACEMENTS):
    sample = split[int(rng.integers(len(split)))]
    if not isinstance(sample, Unreadable):
      return sample
  raise UserError(
    f'{REPLACEMENTS + 1} samples in a row could not be read. Check that the '
    'data is there and whole; with data.skip_unreadable=false the error says '
    'which one it is.'
  )


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


class BatchIterator(contextlib.AbstractContextManager):
  """Iterates over batches; `close` or its exit ends threads and processes.

  They also end with the object or the interpreter, whichever comes first.

  Attributes:
    num_images: how many images all batches of this process hold together.
    place: puts each batch on the devices. May be set.
  """

  def __init__(
    self,
    batches: Iterator[Batch],
    reader: grain.DatasetIterator,
    num_images: int,
    split: CheckedSplit,
  ):
    """Wraps `batches`, made of what the Grain iterator `reader` reads.

    Args:
      batches: what is iterated over.
      reader: closes what reads.
      num_images: see above.
      split: what is read.
    """
    self.num_images = num_images
    self.place: Callable[[Batch], Batch] = lambda batch: batch
    self._split = split
    self._since: float | None = None  # While a batch is waited for.
    self._warned = False
    self._skipped: list[int] = []
    self._num_skipped = 0  # Reported already.
    self._held = [batches, reader]
    self._finalizer = weakref.finalize(self, _close_reader, self._held)

  def __iter__(self) -> 'BatchIterator':
    return self

  def __next__(self) -> Batch:
    if not self._held:
      raise ValueError('this iterator is closed')
    self._since = time.monotonic()
    try:
      batch = next(self._held[0])
    except RuntimeError as error:
      if 'Worker process was terminated' not in str(error):
        raise
      raise UserError(
        f'a process that reads data has ended unexpectedly ({error}). It was '
        'killed, most often for lack of memory: use fewer data.num_workers or '
        'a smaller data.prefetch, and start again to resume.'
      ) from error
    finally:
      since, self._since = self._since, None
    if self._warned:
      self._warned = False
      seconds = time.monotonic() - since
      print(f'the data came after {seconds:.0f} s', file=sys.stderr, flush=True)
    if 'skipped' in batch:
      skipped = batch.pop('skipped')
      self._skipped += skipped[skipped >= 0].tolist()
    return self.place(batch)

  def stuck(self, timeout: float) -> str:
    """Why no batch came for `timeout` seconds, '' as long as one may come.

    To be called now and then from another thread while batches are taken;
    warns after a tenth of the time, once.
    """
    since = self._since
    if since is None:
      return ''
    seconds = time.monotonic() - since
    if seconds < timeout / 10:
      return ''
    what = self._split.longest_read() or 'no sample is being read'
    if seconds >= timeout:
      return (
        f'no data for {seconds:.0f} s (config.data.timeout): {what}. See '
        'whether the storage answers, and start again to resume.'
      )
    if not self._warned:
      self._warned = True
      print(
        f'waiting for data since {seconds:.0f} s: {what}; the run stops after '
        f'{timeout:g} s (config.data.timeout)',
        file=sys.stderr,
        flush=True,
      )
    return ''

  def report_skipped(self) -> str:
    """What was replaced since the last call, as a sentence; '' for nothing."""
    if not self._skipped:
      return ''
    count, first = len(self._skipped), self._skipped[0]
    self._num_skipped += count
    self._skipped.clear()
    try:
      why = f'{self._split.split[first]["name"]}, which now can be read.'
    except UserError as error:
      why = str(error).splitlines()[0]
    return (
      f'{count} unreadable sample{"" if count == 1 else "s"} replaced by '
      f'others ({self._num_skipped} in all); the first: {why}'
    )

  def close(self) -> None:
    """Stops reading. May be called at any time, and again."""
    self._finalizer()

  def __exit__(self, *_: Any) -> None:
    self.close()


def _close_reader(held: list) -> None:
  # Drops it too: a Grain iterator that lives until the interpreter takes its
  # modules apart fails noisily then.
  if held:
    _, reader = held
    held.clear()
    reader.close()
