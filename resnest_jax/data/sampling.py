"""Which sample a position of a run reads: a choice of samplers.

A sampler is a function of the position (step * batch size + slot) alone, so
that threads, worker processes, hosts and resuming change nothing, and any
position costs the same.

  uniform: every epoch visits each sample once, in another order.
  repeat_factor: samples with rare classes come several times an epoch. The
    factor of a class in a share f of the images is max(1, sqrt(t / f)), that
    of a sample the largest of its classes' (Gupta et al., LVIS, CVPR 2019).
  class_balanced: the classes take turns, whatever their number of samples;
    each turn takes the next sample that has the class. Ignored pixels are no
    class. Samples without a labelled pixel are not visited.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
from grain.experimental import index_shuffle

from resnest_jax.config_keys import SAMPLINGS
from resnest_jax.data.statistics import count_pixels
from resnest_jax.errors import UserError
from resnest_jax.files import whole_file
from resnest_jax.progress import progress_bar

# From a position to a sample.
Sampler = Callable[[int], int]


class Shuffled:
  """Epochs over a list of samples, each in another order.

  Args:
    samples: int (N,), not empty; a sample may stand there several times.
    seed: of 32 bits.
  """

  def __init__(self, samples: np.ndarray, seed: int):
    self._samples = np.asarray(samples)
    self._seed = seed

  def weights(self, num_samples: int) -> np.ndarray:
    """float (num_samples,) of sum 1, how often each sample is read."""
    times = np.bincount(self._samples, minlength=num_samples)
    return times / times.sum()

  def __call__(self, position: int) -> int:
    epoch, place = divmod(position, len(self._samples))
    seed = (self._seed + epoch) % 2**32
    return int(self._samples[_shuffle(place, len(self._samples), seed)])


class ClassBalanced:
  """The classes take turns, each with the samples that have it.

  Args:
    present: bool (N, C), whether a sample has a class.
    seed: of 32 bits.
  """

  def __init__(self, present: np.ndarray, seed: int):
    self._of_class = [
      np.flatnonzero(column) for column in present.T if column.any()
    ]
    self._seed = seed

  def weights(self, num_samples: int) -> np.ndarray:
    """float (num_samples,) of sum 1, how often each sample is read."""
    weights = np.zeros(num_samples)
    for samples in self._of_class:
      weights[samples] += 1 / len(samples) / len(self._of_class)
    return weights

  def __call__(self, position: int) -> int:
    turn, place = divmod(position, len(self._of_class))
    number = len(self._of_class)
    chosen = _permuted(place, number, _mix(self._seed, turn))
    samples = self._of_class[chosen]
    epoch, place = divmod(turn, len(samples))
    seed = _mix(self._seed, epoch, chosen)
    return int(samples[_permuted(place, len(samples), seed)])


def _shuffle(place: int, length: int, seed: int) -> int:
  """Where `place` goes in a permutation of `length` places, at no cost."""
  return index_shuffle(place, max_index=length - 1, seed=seed, rounds=4)


def _permuted(place: int, length: int, seed: int) -> int:
  """As `_shuffle`, which takes milliseconds for a handful of places."""
  if length > 1000:
    return _shuffle(place, length, seed)
  return int(np.random.default_rng(seed).permutation(length)[place])


def _mix(*numbers: int) -> int:
  return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def repeat_factors(present: np.ndarray, threshold: float) -> np.ndarray:
  """How often an epoch should visit each sample.

  Args:
    present: bool (N, C), whether a sample has a class.
    threshold: t; classes in a larger share of the samples are not repeated.

  Returns:
    float (N,), at least 1.
  """
  share = present.mean(0)
  with np.errstate(divide='ignore'):
    of_class = np.maximum(1.0, np.sqrt(threshold / share))
  return np.where(present, of_class, 1.0).max(1, initial=1.0)


def repeated_samples(factors: np.ndarray, seed: int) -> np.ndarray:
  """A list in which each sample stands as often as its factor says.

  Fractions are rounded up as often as they are large: a sample of factor 2.3
  stands there three times with probability 0.3, else twice.

  Args:
    factors: float (N,), at least 0.
    seed: decides the rounding.
  """
  times = np.floor(factors).astype(int)
  drawn = np.random.default_rng(seed).random(len(factors))
  times += drawn < factors - times
  return np.repeat(np.arange(len(factors)), times)


def sampler_seed(seed: int) -> int:
  """The samplers' seed in a run of this seed."""
  # Hashed, because an epoch's order is that of seed + epoch: runs of
  # neighbouring seeds would otherwise share all but one of their orders.
  return _mix(seed, 0)


def make_sampler(
  sampling: str,
  num_samples: int,
  seed: int,
  *,
  present: np.ndarray | None = None,
  threshold: float = 0.0,
) -> Shuffled | ClassBalanced:
  """Makes the function from a position to a sample.

  Args:
    sampling: one of `SAMPLINGS`.
    num_samples: N, at least 1.
    seed: of 32 bits.
    present: bool (N, C), whether a sample has a class; not needed for
      'uniform'.
    threshold: of `repeat_factors`.

  Raises:
    UserError: an unknown name, or no sample has a class.
  """
  if sampling == 'uniform':
    return Shuffled(np.arange(num_samples), seed)
  if sampling not in SAMPLINGS:
    raise UserError(
      f'config.data.sampling is {sampling!r}; it must be one of '
      f'{", ".join(SAMPLINGS)}.'
    )
  if not present.any():
    raise UserError(
      'no sample has a labelled pixel, so that classes cannot be sampled. '
      'Look at the labels, or set data.sampling to uniform.'
    )
  if sampling == 'class_balanced':
    return ClassBalanced(present, seed)
  factors = repeat_factors(present, threshold)
  return Shuffled(repeated_samples(factors, seed), seed)


def open_sampler(
  data_config: Any, split: Any, seed: int, cache: Path | None
) -> tuple[Sampler, rich.table.Table | None]:
  """The sampler of a run; counts the pixels of all classes if it needs them.

  Args:
    data_config: `config.data`.
    split: of `datasets.open_data`.
    seed: of the run.
    cache: the file, ending in .npy, that keeps the counts, so that a run that
      resumes reads the same samples and does not count again; None: none.

  Returns:
    The sampler, and a table of the classes' shares; None for 'uniform'.

  Raises:
    UserError: labels that cannot be read, or none at all.
  """
  sampling, seed = data_config.sampling, sampler_seed(seed)
  if sampling == 'uniform':
    return make_sampler(sampling, len(split), seed), None
  counts = _cached_counts(data_config, split, cache)
  present = counts[:, :-1] > 0
  sampler = make_sampler(
    sampling,
    len(split),
    seed,
    present=present,
    threshold=data_config.repeat_threshold,
  )
  weights = sampler.weights(len(split))
  return sampler, share_table(counts, weights, split.labels.classes)


def _cached_counts(
  data_config: Any, split: Any, cache: Path | None
) -> np.ndarray:
  """The result of `count_pixels`, from the file or new."""
  shape = len(split), len(split.labels.classes) + 1
  # Not there, or damaged: counted again.
  with contextlib.suppress(OSError, ValueError):
    if cache and (counts := np.load(cache, allow_pickle=False)).shape == shape:
      return counts
  with progress_bar('counting classes') as on_progress:
    counts = count_pixels(
      split,
      num_threads=data_config.num_threads,
      skip_unreadable=data_config.skip_unreadable,
      on_progress=on_progress,
    )
  if cache:
    with whole_file(cache) as temporary:
      np.save(temporary, counts)
  return counts


def share_table(
  counts: np.ndarray, weights: np.ndarray, classes: tuple[str, ...]
) -> rich.table.Table:
  """Of each class that occurs: its share before and after sampling.

  Args:
    counts: int (N, C + 1), see `count_pixels`.
    weights: float (N,), how often each sample is read.
    classes: C names.
  """
  table = rich.table.Table('class', title='shares in %')
  for column in ('pixels', 'images', 'images drawn'):
    table.add_column(column, justify='right')
  present = counts[:, :-1] > 0
  pixels = counts[:, :-1].sum(0) / max(counts[:, :-1].sum(), 1)
  for i in np.flatnonzero(present.any(0)):
    shares = pixels[i], present[:, i].mean(), weights @ present[:, i]
    table.add_row(classes[i], *(f'{100 * share:.2f}' for share in shares))
  return table
