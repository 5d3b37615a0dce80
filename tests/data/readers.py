"""A small split without files, and batches of it."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from resnest_jax.data import pipeline, transforms
from resnest_jax.errors import UnreadableSample, UserError

SEED = 7
SIZES = {'scale_range': (0.5, 2.0), 'crop_size': (32, 40)}
CROPS = SIZES | {'image_scale': (96, 48), 'cat_max_ratio': 0.75}
ENCODING = {'augmentation': 'encoding', 'image_scale': (48, 48)}


class Scenes:
  """A deterministic split of small pictures; the red channel tells which."""

  def __init__(self, count, broken=None, fault='error', unreadable=(), pipe=''):
    self.count, self.unreadable = count, unreadable
    self.broken, self.fault, self.pipe = broken, fault, pipe

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    if index in self.unreadable:
      raise UnreadableSample(f'scene_{index} is cut off.\nRepair it.')
    fault = self.fault if index == self.broken else ''
    if fault == 'error':
      raise UserError(f'sample scene_{index} cannot be decoded')
    if fault == 'bug':
      raise UnpicklableError(threading.Lock())
    if fault == 'kill':
      os.kill(os.getpid(), 9)
    if fault == 'hang':  # As storage does, until somebody writes.
      Path(self.pipe).read_bytes()
    rng = np.random.default_rng(index)
    height, width = 40 + 7 * (index % 3), 56 - 5 * (index % 4)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[..., 0] = index
    label = rng.integers(0, 4, (height - (fault == 'size'), width), np.uint8)
    return {'image': image, 'label': label, 'name': f'scene_{index}'}

  def location(self, index):
    return f'scene_{index}'


class UnpicklableError(Exception):
  """Holds what cannot go to another process."""


def data_config(**changes):
  values = CROPS | {'augmentation': 'mmseg', 'flip_probability': 0.5}
  values |= {'photometric': True, 'skip_unreadable': False, 'prefetch': 2}
  values |= {'rotation': 0, 'quarter_turns': False, 'transform': ''}
  values |= {f'{x}_probability': 0 for x in ('vertical_flip', 'blur', 'erase')}
  values |= {'num_workers': 0, 'num_threads': 2}
  return SimpleNamespace(**(values | changes))


def open_train(split=None, config=None, **options):
  """An iterator over 12 batches of 4; closes itself at the end of a `with`."""
  options = {'seed': SEED, 'batch_size': 4, 'total_steps': 12} | options
  split = Scenes(10) if split is None else split
  return pipeline.make_train_iterator(config or data_config(), split, **options)


def copied(batch):
  return {key: np.array(value) for key, value in batch.items()}


def train_batches(split=None, config=None, **options):
  with open_train(split, config, **options) as batches:
    return list(map(copied, batches))


def of_host(batches, host):
  """The rows of the first or the second of two hosts."""
  rows = slice(2 * host, 2 * host + 2)
  return [{k: value[rows] for k, value in batch.items()} for batch in batches]


def which(batch):
  """The sample each row shows."""
  return batch['image'][:, 0, 0, 0].tolist()


def augmented(record, position, augment=transforms.augment, **options):
  """What a position of the run makes of a record."""
  rng = pipeline.sample_rng(pipeline.sample_key(SEED), position)
  draw = transforms.draw_augmentation(rng)
  return augment(record['image'], record['label'], draw, **(options or CROPS))
