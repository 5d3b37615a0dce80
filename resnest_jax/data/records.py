"""The records of a split, checked as they are read."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from resnest_jax.data import transforms
from resnest_jax.data.reading import ReadClock
from resnest_jax.errors import UnreadableSample, UserError

# Records tried in place of one that cannot be read.
REPLACEMENTS = 10
_SKIPPING = (
  'Training goes on without such samples with '
  '--config.data.skip_unreadable=true (evaluation does not).'
)


class Split(Protocol):
  """What is read: random access to records, safe to use from threads.

  A record is a dict of `image` uint8 (H, W, 3) RGB, `label` uint8 (H, W) train
  ids with 255 ignored, and `name`. With worker processes it must pickle.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...

  def describe(self, index: int) -> str: ...  # Where it lies; nothing is read.


class Unreadable(NamedTuple):
  """Stands for the record of this index, which cannot be read."""

  index: int


class Records:
  """A split whose records are checked and whose failures name the record.

  With `skip_unreadable`, a record that cannot be read is an `Unreadable`.

  Attributes:
    split: what is read.
  """

  def __init__(self, split: Split, skip_unreadable: bool = False):
    if len(split) == 0:
      raise UserError(
        'the split has no records. Prepare the data again, or choose another '
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
        record = self.split[index]
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
        f'reading record {index} failed: {type(error).__name__}: {error}'
      ) from error
    transforms.check_sizes(record['image'], record['label'], record['name'])
    return record

  def longest_read(self) -> str:
    """What is being read since longest, '' if nothing is."""
    longest = self._clock.longest()
    if longest is None:
      return ''
    index, seconds = longest
    return f'{self.split.describe(index)}, read since {seconds:.0f} s'


def replacement(records: Records, rng: np.random.Generator) -> dict[str, Any]:
  """Another record in place of one that cannot be read.

  Raises:
    UserError: `REPLACEMENTS` others cannot be read either.
  """
  for _ in range(REPLACEMENTS):
    record = records[int(rng.integers(len(records)))]
    if not isinstance(record, Unreadable):
      return record
  raise UserError(
    f'{REPLACEMENTS + 1} samples in a row could not be read. Check that the '
    'data is there and whole; with data.skip_unreadable=false the error says '
    'which one it is.'
  )
