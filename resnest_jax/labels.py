"""Classes, colours and label ids of the data sets, read from `labels.json`.

ADE20K: the 150 classes and the order of `objectInfo150.txt` in
ADEChallengeData2016. Cityscapes: the 19 evaluated classes out of 34 label
ids. The palettes are those in which these sets are commonly drawn.
"""

import dataclasses
import importlib.resources
import json

import numpy as np

IGNORE = 255  # The train id of pixels that neither loss nor metric counts.


@dataclasses.dataclass(frozen=True, eq=False)
class LabelSet:
  """What the numbers in a data set's masks mean.

  Attributes:
    name: the data set.
    classes: C class names; the position is the train id.
    palette: uint8 (C, 3), RGB colour of each class.
    to_train_id: uint8 (256,), train id of each mask value, `IGNORE` for
      those that are not a class: `to_train_id[mask]` converts a mask.
  """

  name: str
  classes: tuple[str, ...]
  palette: np.ndarray
  to_train_id: np.ndarray


def _load(name: str) -> LabelSet:
  """Reads one entry of `labels.json`."""
  text = importlib.resources.files(__package__).joinpath('labels.json')
  facts = json.loads(text.read_text(encoding='utf-8'))[name]
  to_train_id = np.full(256, IGNORE, np.uint8)
  to_train_id[facts['label_ids']] = np.arange(len(facts['classes']))
  palette = np.array(facts['palette'], np.uint8)
  # These are shared by everyone who imports them.
  to_train_id.flags.writeable = palette.flags.writeable = False
  return LabelSet(name, tuple(facts['classes']), palette, to_train_id)


ADE20K = _load('ade20k')
CITYSCAPES = _load('cityscapes')
