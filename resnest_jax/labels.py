"""Classes, colours and label ids of data sets (`labels.json`).

Those of ImageNet (`imagenet_classes.json`) have the numbers of WordNet.
"""

import dataclasses
import importlib.resources
import json
from collections.abc import Iterable

import numpy as np

IGNORE = 255  # The train id of pixels that neither loss nor metric counts.


@dataclasses.dataclass(frozen=True, eq=False)
class LabelSet:
  """The classes of a data set and how its masks encode them.

  Attributes:
    classes: C names; the position is the train id.
    palette: uint8 (C, 3), RGB.
    to_train_id: uint8 (256,), or (65536,) of your own; `to_train_id[mask]`
      converts a mask. Values of no class become `IGNORE`.
  """

  name: str
  classes: tuple[str, ...]
  palette: np.ndarray
  to_train_id: np.ndarray


def class_names(name: str, classes: Iterable[str]) -> LabelSet:
  """Classes of whole images, which have neither masks nor colours."""
  none = np.zeros(0, np.uint8)
  return LabelSet(name, tuple(classes), none.reshape(0, 3), none)


def _read(file: str) -> dict:
  text = importlib.resources.files(__package__).joinpath(file)
  return json.loads(text.read_text(encoding='utf-8'))


def _load(name: str) -> LabelSet:
  facts = _read('labels.json')[name]
  to_train_id = np.full(256, IGNORE, np.uint8)
  to_train_id[facts['label_ids']] = np.arange(len(facts['classes']))
  palette = np.array(facts['palette'], np.uint8)
  # Read-only: every importer shares these arrays.
  to_train_id.flags.writeable = palette.flags.writeable = False
  return LabelSet(name, tuple(facts['classes']), palette, to_train_id)


# In the order of objectInfo150.txt; mask value 0, "other", is ignored.
ADE20K = _load('ade20k')
CITYSCAPES = _load('cityscapes')
# 59 classes in alphabetical order; mask value 0, "background", is ignored.
PASCAL_CONTEXT = _load('pascal_context')
# In the order of WordNet's numbers, as everybody has them.
SYNSETS = _read('imagenet_classes.json')
IMAGENET = class_names('imagenet', SYNSETS.values())
# What masks are recognised by.
LABEL_SETS = (ADE20K, CITYSCAPES, PASCAL_CONTEXT)


def known_values(labels: LabelSet) -> np.ndarray:
  """Bool (256,): the values that masks of a prepared data set may have."""
  # Values between the classes are deliberate: Cityscapes' unused label ids.
  values = np.arange(256)
  last = np.flatnonzero(labels.to_train_id != IGNORE).max(initial=-1)
  return (values <= last) | (values == IGNORE)
