"""The records of a split, checked as they are read."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from resnest_jax.data import transforms
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


class Unreadable(NamedTuple):
  """Stands for the record of this index, which cannot be read."""

  index: int


class Records:
  """A split whose records are checked and whose failures name the record.

  With `skip_unreadable`, a record that cannot be read is an `Unreadable`.
  """

  def __init__(self, split: Split, skip_unreadable: bool = False):
    if len(split) == 0:
      raise UserError(
        'the split has no records. Prepare the data again, or choose another '
        'split in the config.'
      )
    self._split = split
    self._skip_unreadable = skip_unreadable

  def __len__(self) -> int:
    return len(self._split)

  def __getitem__(self, index: int) -> dict[str, Any] | Unreadable:
    try:
      record = self._split[index]
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
