"""A small data set of a user's own, and masks as programs write them."""

import re
import shlex

import numpy as np
from data.small_archives import encode
from numpy.testing import assert_equal

from resnest_jax.config import load_config
from resnest_jax.data.annotations.command import main as own
from resnest_jax.data.datasets import open_data
from resnest_jax.data.doctor.examine import examine
from resnest_jax.data.doctor.rules import ERROR, diagnose

CONFIG = 'configs/folder.py:mini'
COLOURS = np.array([[60, 60, 60], [34, 139, 34], [220, 20, 60]], np.uint8)
CLASSES = 'background 60 60 60\nleaf 34 139 34\nflower 220 20 60'
BLACK_AND_WHITE = '0: background\n255: leaf'
SAMPLES = 'train/0', 'train/1', 'train/2', 'train/3', 'val/4', 'val/5'


class Garden:
  """Photographs with masks of three classes, four for training, two not.

  `ids` are the classes by the sample's name, `overrides` of the configuration.
  """

  def __init__(self, root, samples=SAMPLES):
    self.root, self.overrides = root, {}
    self.ids = {name: np.zeros((40, 60), np.uint8) for name in samples}
    rng = np.random.default_rng(0)
    for name, ids in self.ids.items():
      for k in (1, 2):
        x, y = rng.integers(4, 28, 2)
        ids[y : y + 9, x : x + 24] = k
      image = COLOURS[ids] + rng.integers(-25, 25, (40, 60, 3))
      self.image(name).parent.mkdir(parents=True, exist_ok=True)
      encoded = encode(np.uint8(image.clip(0, 255))[..., ::-1], '.jpg')
      self.image(name).write_bytes(encoded)
    self.classes(CLASSES)
    self.write(encode)

  def image(self, name):
    return self.root / 'images' / f'{name}.jpg'

  def mask(self, name):
    return self.root / 'masks' / f'{name}.png'

  def classes(self, text):
    (self.root / 'classes.txt').write_text(text)

  def write(self, encoded, *names):
    """Writes `encoded(ids)`, bytes, as these masks or as all."""
    for name in names or self.ids:
      self.mask(name).parent.mkdir(parents=True, exist_ok=True)
      self.mask(name).write_bytes(encoded(self.ids[name]))

  def use(self, **folder):
    """Sets values of config.data.folder."""
    self.overrides |= {f'data.folder.{k}': v for k, v in folder.items()}

  def use_lists(self, line):
    """Writes and uses a list for each split, of `line(name)`."""
    self.use(lists='{split}.txt')
    for split in ('train', 'val'):
      lines = [line(name) for name in self.ids if name.startswith(split)]
      (self.root / f'{split}.txt').write_text('\n'.join(lines))

  def splits(self):
    """The configuration, and the two splits."""
    overrides = {'data.data_dir': str(self.root)} | self.overrides
    config = load_config(CONFIG, overrides)
    return config, [open_data(config.data, x) for x in ('train', 'val')]

  def diagnoses(self):
    return diagnose(examine(*self.splits()))

  def found(self):
    """Rule -> finding, of the doctor."""
    return {d.rule.name: d.finding for d in self.diagnoses()}

  def errors(self):
    return {d.rule.name for d in self.diagnoses() if d.rule.severity == ERROR}

  def labels(self):
    """What training gets."""
    return [sample['label'] for split in self.splits()[1] for sample in split]

  def check(self, expected=lambda ids: ids):
    """The doctor finds no error, and training gets the expected classes."""
    assert self.errors() == set()
    assert_equal(self.labels(), [expected(x) for x in self.ids.values()])

  def to_ids(self):
    """Keeps the numbers of the masks, in the folder ids."""
    flags = '{0}/masks --data_dir {0}/ids --classes {0}/classes.txt'
    own([*flags.format(self.root).split(), '--format', 'mask_values'])

  def convert(self, remedy):
    (words,) = re.findall(r'resnest_jax\.data\.prepare own (.*)', remedy)
    own(shlex.split(words))

  def obey(self, remedy):
    """Runs the command of a remedy, and sets what it says."""
    self.convert(remedy)
    (flag,) = shlex.split(re.findall(r'add (\S*--config\S+)\.$', remedy)[0])
    key, _, value = flag.removeprefix('--config.').partition('=')
    self.overrides[key] = value

  def rewrite(self, rule, said):
    """Writes the classes file with the first lines that its remedy shows."""
    found = self.found()[rule]
    assert said in f'{found.what} {found.remedy}'
    shown = re.search(r'(\n  .*)+', found.remedy)[0]
    self.classes(shown.replace('\n  ', '\n').strip())
    return (self.root / 'classes.txt').read_text()


def rgb(ids):
  return encode(COLOURS[ids][..., ::-1])
