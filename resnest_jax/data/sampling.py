"""Samplers: functions from a position of a run to a sample.

The position is step * batch size + slot.

  uniform: every epoch visits each sample once, in another order.
  repeat_factor: samples with rare classes come several times an epoch. The
    factor of a class in a share f of the images is max(1, sqrt(t / f)), and
    a sample has the largest one of its classes (LVIS, Gupta et al., CVPR 2019).
  class_balanced: the classes take turns; each turn takes the next sample
    with the class. Samples without a labelled pixel are never visited.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
from grain.experimental import index_shuffle

from resnest_jax.data.statistics import class_weights, count_pixels
from resnest_jax.distributed import messages
from resnest_jax.errors import UserError
from resnest_jax.files import whole_file
from resnest_jax.progress import console

Sampler = Callable[[int], int]  # Position -> index of a sample, and pure.
_MOST_CELLS = 2**28  # Samples times classes that are counted: 8 bytes each.


class Shuffled:
  """Epochs over a list of samples, which may repeat; each in another order."""

  def __init__(self, samples: np.ndarray, seed: int):
    self._samples, self._seed = np.asarray(samples), seed

  def weights(self, num_samples: int) -> np.ndarray:
    """Returns float (num_samples,) of sum 1, how often each sample is read."""
    times = np.bincount(self._samples, minlength=num_samples)
    return times / times.sum()

  def __call__(self, position: int) -> int:
    epoch, place = divmod(position, len(self._samples))
    seed = (self._seed + epoch) % 2**32  # index_shuffle takes 32 bits.
    return int(self._samples[_shuffle(place, len(self._samples), seed)])


class ClassBalanced:
  """The classes take turns; `present`, bool (N, C), has the samples of each."""

  def __init__(self, present: np.ndarray, seed: int):
    self._of_class = [np.flatnonzero(x) for x in present.T if x.any()]
    self._seed = seed

  def weights(self, num_samples: int) -> np.ndarray:
    weights = np.zeros(num_samples)
    for samples in self._of_class:
      weights[samples] += 1 / len(samples) / len(self._of_class)
    return weights

  def __call__(self, position: int) -> int:
    # A turn visits every class once, in another order each time: a fixed one
    # would keep meeting the same classes in a batch.
    number = len(self._of_class)
    turn, place = divmod(position, number)
    chosen = _permuted(place, number, _mix(self._seed, turn))
    samples = self._of_class[chosen]
    # The class has had one sample in each earlier turn.
    epoch, place = divmod(turn, len(samples))
    seed = _mix(self._seed, epoch, chosen)
    return int(samples[_permuted(place, len(samples), seed)])


def _shuffle(place: int, length: int, seed: int) -> int:
  # A permutation of `length` places, of which only one is computed.
  return index_shuffle(place, max_index=length - 1, seed=seed, rounds=4)


def _permuted(place: int, length: int, seed: int) -> int:
  # For few places index_shuffle takes milliseconds, permutations microseconds.
  if length > 1000:
    return _shuffle(place, length, seed)
  return int(np.random.default_rng(seed).permutation(length)[place])


def _mix(*numbers: int) -> int:
  return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def repeat_factors(present: np.ndarray, threshold: float) -> np.ndarray:
  """Returns how often an epoch should visit each sample, float (N,) >= 1."""
  share = present.mean(0)
  # The infinite factor of a class that no sample has is never used.
  with np.errstate(divide='ignore'):
    of_class = np.maximum(1.0, np.sqrt(threshold / share))
  return np.where(present, of_class, 1.0).max(1, initial=1.0)


def repeated_samples(factors: np.ndarray, seed: int) -> np.ndarray:
  """Lists each sample as often as its factor in `factors`, float (N,), says."""
  times = np.floor(factors).astype(int)
  drawn = np.random.default_rng(seed).random(len(factors))
  # 2.3 gives three times with probability 0.3, else two, for the whole run.
  times += drawn < factors - times
  return np.repeat(np.arange(len(factors)), times)


def make_sampler(
  sampling: str,
  num_samples: int,
  seed: int,
  *,
  present: np.ndarray | None = None,
  threshold: float = 0.0,
) -> Shuffled | ClassBalanced:
  """Makes one of `SAMPLINGS`; `present`, bool (N, C): the classes of each."""
  # Epoch e is ordered by seed + e: neighbouring seeds would share most orders.
  seed = _mix(seed, 0)
  if sampling == 'class_balanced':
    return ClassBalanced(present, seed)
  samples = np.arange(num_samples)
  if sampling == 'repeat_factor':
    samples = repeated_samples(repeat_factors(present, threshold), seed)
  return Shuffled(samples, seed)


def open_sampler(
  data_config: Any, split: Any, seed: int, cache: Path | None
) -> tuple[Sampler, rich.table.Table | None]:
  """Makes a run's sampler and, unless 'uniform', a table of classes' shares.

  The .npy file `cache` keeps the counts of pixels for the next start.
  """
  sampling = data_config.sampling
  if sampling == 'uniform':
    return make_sampler(sampling, len(split), seed), None
  # From the file where possible: a run that resumes must read the same samples.
  counts = _class_counts(data_config, split, cache)
  options = {'present': counts > 0, 'threshold': data_config.repeat_threshold}
  sampler = make_sampler(sampling, len(split), seed, **options)
  weights = sampler.weights(len(split))
  return sampler, share_table(counts, weights, split.labels.classes)


def weigh_classes(config: Any, split: Any, cache: Path | None) -> list[float]:
  """The class weights that `config.loss` names, which it prints as a table.

  `cache` is as of `open_sampler`. Raises `UserError` if no pixel has a label.
  """
  with messages.first_goes_ahead('class weights'):
    counts = _class_counts(config.data, split, cache)
  weights = class_weights(counts, config.loss.class_weights)
  pixels = counts.sum(0)
  columns = {'pixels in %': 100 * pixels / pixels.sum(), 'weight': weights}
  title = f'class weights: {config.loss.class_weights}'
  console().print(_class_table(title, split.labels.classes, columns, '.4g'))
  return weights.tolist()


def _class_counts(
  data_config: Any, split: Any, cache: Path | None
) -> np.ndarray:
  """The pixels of each class in each sample, int64 (N, C), some above 0."""
  shape = len(split), len(split.labels.classes) + 1
  if (cells := math.prod(shape)) > _MOST_CELLS:
    raise UserError(
      f'{cells} numbers would be counted of {data_config.name}: leave '
      'data.sampling and loss.class_weights at their defaults.'
    )
  counts = None
  # Damaged files raise errors of many kinds.
  with contextlib.suppress(Exception):
    kept = np.load(cache, allow_pickle=False)
    if kept.shape == shape and kept.dtype == np.int64 and kept.min() >= 0:
      counts = kept
  if counts is None:
    options = {x: data_config[x] for x in ('num_threads', 'skip_unreadable')}
    counts = count_pixels(split, **options)
    if cache:
      with whole_file(cache) as temporary:
        np.save(temporary, counts)
  counts = counts[:, :-1]  # Ignored pixels, which come last, are no class.
  if not counts.any():
    raise UserError(
      'no sample has a labelled pixel. Look at the labels, or leave '
      'data.sampling and loss.class_weights at their defaults.'
    )
  return counts


def share_table(
  counts: np.ndarray, weights: np.ndarray, classes: Sequence[str]
) -> rich.table.Table:
  """Of the classes' pixels (N, C), by how often each sample is drawn (N,)."""
  present = counts > 0
  columns = {
    'pixels': 100 * counts.sum(0) / counts.sum(),
    'images': 100 * present.mean(0),
    'images drawn': 100 * weights @ present,
  }
  found = present.any(0)
  columns = {name: x[found] for name, x in columns.items()}
  return _class_table('shares in %', np.array(classes)[found], columns)


def _class_table(
  title: str,
  classes: Iterable[str],
  columns: Mapping[str, np.ndarray],
  form: str = '.2f',
) -> rich.table.Table:
  table = rich.table.Table('class', title=title)
  for column in columns:
    table.add_column(column, justify='right')
  for name, *numbers in zip(classes, *columns.values(), strict=True):
    table.add_row(name, *(f'{x:{form}}' for x in numbers))
  return table
