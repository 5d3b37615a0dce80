"""The samples of a split, checked as they are read."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from resnest_jax.data import transforms
from resnest_jax.data.reading import ReadClock
from resnest_jax.errors import UnreadableSample, UserError

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
