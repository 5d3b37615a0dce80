"""A user's own folders: six samples, in two splits, some in sub folders."""

from pathlib import Path

import numpy as np
from data.refusals import refused
from PIL import Image

from resnest_jax.config import load_config
from resnest_jax.data.datasets import open_data

ROW = Path(__file__).parents[2] / 'configs' / 'folder.py'
OF_FOLDER = {key: f'folder.{key}' for key in load_config(ROW).data.folder}
CLASSES = '1: road 128 64 128\n2 5: tree 34 139 34\nignore: 0\n'
TRAIN = ['a', 'b', 'x/a', 'x/c']
VAL = ['E.e', 'd']


def both(root, path):
  """Two paths: below the images, and below the masks."""
  return root / 'images' / path, root / 'masks' / path


def write_pair(root, name):
  """An image and a mask of some of the values 0, 1, 2, 5 and 255."""
  rng = np.random.default_rng(list(name.encode()))
  pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
  values = rng.choice(np.uint8([0, 1, 2, 5, 255]), (12, 16))
  paths = both(root, f'{name}.png')
  for path, array in zip(paths, (pixels, values), strict=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
  return pixels, values


def write_samples(root):
  (root / 'classes.txt').write_text(CLASSES)
  for name in (*(f'train/{name}' for name in TRAIN), 'val/d', 'val/E.e'):
    write_pair(root, name)
  for path, new in zip(
    both(root, 'val/E.e.png'), ('.PNG', '.Png'), strict=True
  ):
    path.rename(path.with_suffix(new))
  return root


def data_config(root, **changes):
  """config.data with other values, those of its section `folder` as well."""
  changes = {f'data.{OF_FOLDER.get(x, x)}': y for x, y in changes.items()}
  return load_config(ROW, {'data.data_dir': str(root)} | changes).data


def split_of(root, split='train', **changes):
  return open_data(data_config(root, **changes), split)


def names(root, split='train', **changes):
  return [pair.name for pair in split_of(root, split, **changes).pairs]


def pairs_of_both(root, **changes):
  """The pairs of both splits, sorted."""
  splits = [split_of(root, split, **changes) for split in ('train', 'val')]
  return sorted([*splits[0].pairs, *splits[1].pairs])


def not_opened(root, message, split='train', **changes):
  """The split cannot be opened, for a reason that matches and is returned."""
  return refused(message, split_of, root, split, **changes)
