"""A small split without files, and batches of it."""

import os
import signal
import threading
from types import SimpleNamespace

import numpy as np

from resnest_jax.data import pipeline
from resnest_jax.errors import UnreadableSample, UserError

SEED = 7


class Scenes:
  """A deterministic split of small pictures; the red channel tells which."""

  def __init__(self, count, broken=None, fault='error', unreadable=()):
    self.count = count
    self.broken = broken
    self.fault = fault
    self.unreadable = unreadable

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    if index in self.unreadable:
      raise UnreadableSample(f'scene_{index} is cut off.\nRepair it.')
    if index == self.broken and self.fault == 'error':
      raise UserError(f'sample scene_{index} cannot be decoded')
    if index == self.broken and self.fault == 'bug':
      raise UnpicklableError(threading.Lock())
    if index == self.broken and self.fault == 'kill':
      os.kill(os.getpid(), signal.SIGKILL)
    rng = np.random.default_rng(index)
    height, width = 40 + 7 * (index % 3), 56 - 5 * (index % 4)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[..., 0] = index
    label = rng.integers(0, 4, (height, width), dtype=np.uint8)
    if index == self.broken and self.fault == 'size':
      label = label[:-1]
    return {'image': image, 'label': label, 'name': f'scene_{index}'}

  def location(self, index):
    return f'scene_{index}'


class UnpicklableError(Exception):
  """Holds what cannot go to another process."""


def data_config(**changes):
  values = {
    'image_scale': (96, 48),
    'scale_range': (0.5, 2.0),
    'crop_size': (32, 40),
    'cat_max_ratio': 0.75,
    'flip_probability': 0.5,
    'photometric': True,
    'num_workers': 0,
    'num_threads': 2,
    'prefetch': 2,
    'skip_unreadable': False,
  }
  return SimpleNamespace(**(values | changes))


def train_batches(split=None, config=None, **options):
  options = {'seed': SEED, 'batch_size': 4, 'total_steps': 12} | options
  iterator = pipeline.make_train_iterator(
    config or data_config(), split or Scenes(10), **options
  )
  try:
    return [
      {key: np.array(value) for key, value in batch.items()}
      for batch in iterator
    ]
  finally:
    iterator.close()


def assert_same(batches, expected):
  assert len(batches) == len(expected)
  for batch, other in zip(batches, expected, strict=True):
    assert batch.keys() == other.keys()
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def which(batch):
  """The sample each row shows."""
  return batch['image'][:, 0, 0, 0].tolist()
