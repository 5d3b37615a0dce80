"""An iterator over batches that knows what was skipped and what hangs."""

import contextlib
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain

from resnest_jax.data.records import CheckedSplit
from resnest_jax.errors import UserError

Batch = dict[str, Any]


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
