"""Checked samples, and an iterator over batches that reports hanging reads."""

import contextlib
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from resnest_jax.data import transforms
from resnest_jax.errors import UnreadableSample, UserError, say
from resnest_jax.text import plural

Batch = dict[str, Any]
REPLACEMENTS = 10  # Samples tried in place of an unreadable one.
_SKIPPING = (
  'To skip such samples in training, set '
  '--config.data.skip_unreadable=true (evaluation always stops).'
)


class Split(Protocol):
  """Random access to samples; safe to use from threads.

  A sample is a dict of `image` uint8 (H, W, 3) RGB, `label` uint8 (H, W) train
  ids with 255 ignored, and `name`; `label` is an int where each image has one
  class. With an attribute `bands` images have those (`data.rasters`). Worker
  processes need a split that pickles.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...

  def location(self, index: int) -> str: ...  # Must not read the sample.


class Unreadable(NamedTuple):
  """Takes the place of an unreadable sample."""

  index: int


class CheckedSplit:
  """A split with checked samples, whose errors name the sample."""

  def __init__(
    self, split: Split, skip_unreadable: bool = False, in_parts: bool = False
  ):
    """With `in_parts` images may be what is read where it is cropped."""
    if len(split) == 0:
      raise UserError(
        'the split has no samples. Prepare the data again, or choose another '
        'split in the config.'
      )
    self.split = split
    self.skip_unreadable = skip_unreadable
    self._in_parts = in_parts and hasattr(split, 'in_parts')
    self._clock = ReadClock(len(split))

  def __len__(self) -> int:
    return len(self.split)

  def __getitem__(self, index: int) -> dict[str, Any] | Unreadable:
    try:
      with self._clock.reading(index):
        read = self.split.in_parts if self._in_parts else self.split.__getitem__
        sample = read(index)
    except UnreadableSample as error:
      if self.skip_unreadable:
        return Unreadable(index)
      raise UnreadableSample(f'{error}\n{_SKIPPING}') from error
    except UserError:
      raise
    except Exception as error:
      # This one pickles; otherwise the reader would wait for a worker forever.
      raise RuntimeError(
        f'reading sample {index} failed: {type(error).__name__}: {error}'
      ) from error
    checked = [sample[key] for key in ('image', 'label', 'name')]
    if bands := getattr(self.split, 'bands', ()):
      checked.append((checked[0].dtype, len(bands)))
    transforms.check_sizes(*checked)
    return sample

  def longest_read(self) -> str:
    """Describes the read that has taken longest so far; '' if there is none."""
    if (longest := self._clock.longest()) is None:
      return ''
    index, seconds = longest
    return f'{self.split.location(index)}, being read for {seconds:.0f} s'


def replacement(
  split: CheckedSplit, rng: np.random.Generator
) -> dict[str, Any]:
  """Returns another sample; gives up where all storage seems gone."""
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
  """Knows when the read of each sample began, across worker processes."""

  def __init__(self, size: int, shared: str = ''):
    """Makes a clock of `size` samples, or opens one at the path `shared`."""
    # Anonymous memory, which pickled copies share; a killed process leaves no
    # file behind. Without it or /proc a worker keeps its times to itself.
    file = -1
    if shared:
      with contextlib.suppress(OSError):
        file = os.open(shared, os.O_RDWR)
    elif hasattr(os, 'memfd_create'):
      file = os.memfd_create('read-clock')
      os.ftruncate(file, 8 * size)
    # float64 (size,), start of each read; 0 means that it is not being read.
    # Aligned 8-byte stores need no lock.
    self._since = np.zeros(size)
    if file >= 0:
      self._since = np.frombuffer(mmap.mmap(file, 8 * size), np.float64)
      weakref.finalize(self, os.close, file)
    self._file = file

  def __reduce__(self):
    # Spawned workers inherit no descriptor; /proc gives them this one.
    shared = f'/proc/{os.getpid()}/fd/{self._file}'
    return ReadClock, (len(self._since), shared)

  @contextlib.contextmanager
  def reading(self, index: int) -> Iterator[None]:
    self._since[index] = time.monotonic()  # The same clock in all processes.
    try:
      yield
    finally:
      self._since[index] = 0

  def longest(self) -> tuple[int, float] | None:
    """Returns the index of the oldest read in progress, and its seconds."""
    since = np.array(self._since)  # A snapshot: readers write meanwhile.
    if not since.any():
      return None
    index = int(np.where(since > 0, since, np.inf).argmin())
    return index, time.monotonic() - float(since[index])


class BatchIterator(contextlib.AbstractContextManager):
  """Iterates over batches; `close` ends its threads and processes.

  They also end with the object or the interpreter, whichever comes first.
  `num_images` are in all batches of this process; `place`, which may be set,
  puts each batch on the devices.
  """

  def __init__(
    self,
    batches: Iterator[Batch],
    reader: grain.DatasetIterator,
    num_images: int,
    split: CheckedSplit,
  ):
    self.num_images = num_images
    self.place: Callable[[Batch], Batch] = lambda batch: batch
    self._split = split
    # Start of the wait for a batch, or None; another thread reads it (`stuck`).
    self._since: float | None = None
    self._warned = False
    self._skipped: list[int] = []
    self._num_skipped = 0  # Reported already.
    self._held = [batches, reader]
    # With a reference to `self`, the finalizer would keep it alive.
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
        f'a data worker process ended unexpectedly ({error}), most often '
        'killed for lack of memory. Use fewer data.num_workers or a smaller '
        'data.prefetch, and start again to resume.'
      ) from error
    finally:
      since, self._since = self._since, None
    if self._warned:
      self._warned = False
      say(f'the batch came after {time.monotonic() - since:.0f} s')
    if 'skipped' in batch:
      skipped = batch.pop('skipped')  # int32 (b,), -1: the sample was read.
      self._skipped += skipped[skipped >= 0].tolist()
    return self.place(batch)

  def stuck(self, timeout: float) -> str:
    """Returns why no batch came for `timeout` seconds; '' while one may come.

    Polled from another thread; warns once after a tenth of the time.
    """
    # Read once: the other thread may set it to None.
    since = self._since
    if since is None:
      return ''
    seconds = time.monotonic() - since
    if seconds < timeout / 10:
      return ''
    what = self._split.longest_read() or 'no sample is being read'
    if seconds >= timeout:
      return (
        f'no batch for {seconds:.0f} s (config.data.timeout): {what}. Check '
        'that the storage answers, and start again to resume.'
      )
    if not self._warned:
      self._warned = True
      say(
        f'no batch for {seconds:.0f} s: {what}; the run stops after '
        f'{timeout:g} s (config.data.timeout)'
      )
    return ''

  def report_skipped(self) -> str:
    """Describes the replacements since the last call; '' if there were none."""
    if not self._skipped:
      return ''
    count, first = len(self._skipped), self._skipped[0]
    self._num_skipped += count
    self._skipped.clear()
    try:
      # Read again for the reason, which does not travel with a batch.
      why = f'{self._split.split[first]["name"]}, which can be read now.'
    except UserError as error:
      why = str(error).splitlines()[0]
    return (
      f'{plural(count, "unreadable sample")} replaced by others '
      f'({self._num_skipped} in all); the first: {why}'
    )

  def close(self) -> None:
    """Stops reading; may be called at any time, and repeatedly."""
    self._finalizer()

  def __exit__(self, *_: Any) -> None:
    self.close()


def _close_reader(held: list) -> None:
  # Cleared, because a Grain iterator that lives until the interpreter's exit
  # fails noisily.
  if held:
    _, reader = held
    held.clear()
    reader.close()
