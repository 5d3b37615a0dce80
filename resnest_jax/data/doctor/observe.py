"""Reads samples and keeps the facts that the rules need, not their pixels."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np

from resnest_jax.data.doctor.decoder_warnings import jpeg_warnings
from resnest_jax.labels import IGNORE, LabelSet
from resnest_jax.threads import map_in_threads

_NOTHING = np.zeros(0, np.int64)
# Samples to read again, one by one, when libjpeg complains: it names none.
_BLOCK = 64
# Pixels of a coloured mask: sorting all takes longer than decoding it.
_MOST_COLOURS = 100_000
# Longest edge for alignment: borders that are a pixel off still meet edges.
_SMALL = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
  """Facts about one sample.

  Attributes:
    name: the sample's name, or the reason in one line if it is unreadable.
    error: why it cannot be read, '' if it can; nothing else is known then.
    files: paths of image and mask; empty if the data is not in files.
    damage: the decoder's complaint, '' if there is none.
    image_size: height and width.
    image_type: NumPy's name of the pixels' type.
    image_hash: of size and pixels, as `mask_hash`.
    mask_shape: (height, width), or more for several channels.
    values: int64 (K,), values of a mask of one channel, ascending.
    counts: int64 (K,), pixels with each value.
    colours: int64 (K, 3), RGB colours of a mask of several channels.
    edges: mean steepness of the image at the borders of the mask, of its
      mirror image, and of the mask upside down; None if not measurable.
  """

  index: int
  name: str
  error: str = ''
  files: tuple[str, ...] = ()
  damage: str = ''
  image_size: tuple[int, int] = (0, 0)
  image_type: str = ''
  image_hash: bytes = b''
  mask_shape: tuple[int, ...] = ()
  mask_type: str = ''
  mask_hash: bytes = b''
  values: np.ndarray = dataclasses.field(default_factory=_NOTHING.copy)
  counts: np.ndarray = dataclasses.field(default_factory=_NOTHING.copy)
  colours: np.ndarray = dataclasses.field(
    default_factory=lambda: _NOTHING.reshape(0, 3)
  )
  edges: tuple[float, float, float] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
  """Facts about a split.

  Attributes:
    data: name of the data set.
    labels: the intended meaning of its masks.
    size: samples of the split, examined or not.
    seen: the samples that were examined, in the split's order.
    num_outputs: the network's classes; 0 if it adapts to the data.
    known: bool (256,), the mask values that are a class or are deliberately
      ignored.
    classes_file: path, for a user's own data; else ''.
    masks: folder of a user's own masks; else ''.
  """

  data: str
  split: str
  labels: LabelSet
  size: int
  seen: tuple[Observation, ...]
  for_training: bool
  num_outputs: int
  known: np.ndarray
  classes_file: str = ''
  masks: str = ''

  @property
  def complete(self) -> bool:
    """Whether every sample of the split was examined and is readable."""
    return len(self.readable) == self.size

  @functools.cached_property
  def readable(self) -> tuple[Observation, ...]:
    return tuple(o for o in self.seen if not o.error)

  @functools.cached_property
  def index_masks(self) -> tuple[Observation, ...]:
    """The samples whose masks have one channel of whole numbers."""
    return tuple(o for o in self.readable if o.values.size)

  @functools.cached_property
  def histogram(self) -> dict[int, int]:
    """Value -> pixels, over all index masks; ascending."""
    pixels = collections.Counter()
    for o in self.index_masks:
      pixels.update(
        dict(zip(o.values.tolist(), o.counts.tolist(), strict=True))
      )
    return dict(sorted(pixels.items()))

  @functools.cached_property
  def ignored(self) -> dict[int, int]:
    """Value -> pixels, of the values that stand for no class."""
    classes = set(self.class_values.tolist())
    return {v: n for v, n in self.histogram.items() if v not in classes}

  @functools.cached_property
  def values(self) -> np.ndarray:
    """int64 (K,), all values but 255, ascending."""
    values = np.array(list(self.histogram), np.int64)
    return values[values != IGNORE]

  @functools.cached_property
  def class_values(self) -> np.ndarray:
    """int64 (C,), the values that stand for a class, ascending."""
    return np.flatnonzero(self.labels.to_train_id != IGNORE)

  @functools.cached_property
  def unknown_values(self) -> np.ndarray:
    """The values that are not known, ascending; 255 is always known."""
    return self.values[~_look_up(self.known, self.values, False)]

  def labelled(self, observation: Observation) -> np.ndarray:
    """bool (K,), which of a mask's values stand for a class."""
    return np.isin(observation.values, self.class_values)

  def having(self, wanted: np.ndarray) -> list[Observation]:
    """The index masks with any of the values."""
    return [o for o in self.index_masks if np.isin(o.values, wanted).any()]

  @functools.cached_property
  def class_counts(self) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and images of each class, (C + 1,) each; the last is ignored."""
    num_classes = len(self.labels.classes)
    pixels, images = np.zeros((2, num_classes + 1), np.int64)
    for o in self.index_masks:
      row = np.zeros_like(pixels)
      train_ids = _look_up(self.labels.to_train_id, o.values, IGNORE)
      # Several values may share a train id, hence `np.add.at`.
      np.add.at(row, np.minimum(train_ids, num_classes), o.counts)
      pixels += row
      images += row > 0
    return pixels, images


def _look_up(table: np.ndarray, values: np.ndarray, other: int) -> np.ndarray:
  # Masks of 16 bits or signed numbers hold others. -1 is the last place, too.
  return np.append(table, table.dtype.type(other))[values.clip(-1, len(table))]


def survey(
  split: Any,
  indices: Sequence[int] | None = None,
  *,
  for_training: bool,
  num_outputs: int,
  num_threads: int = 0,
  on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
  """Examines samples of a split, in parallel.

  Args:
    split: from `datasets.open_data`.
    indices: ascending; None examines all samples.
    for_training: whether a network trains on the split.
    num_outputs: the network's classes; 0 if it adapts to the data.
    num_threads: readers, see `thread_count`.
    on_progress: called with (samples done, samples in all).
  """
  indices = range(len(split)) if indices is None else indices
  seen = []
  for start in range(0, len(indices), _BLOCK):
    block = indices[start : start + _BLOCK]
    # One context per block, entered by this thread alone.
    with jpeg_warnings() as found:
      observed = functools.partial(observe, split)
      for observation in map_in_threads(observed, block, num_threads):
        seen.append(observation)
        on_progress(len(seen), len(indices))
    if found:
      seen[start:] = [_with_damage(split, o) for o in seen[start:]]
  return Survey(
    data=split.name,
    split=split.split,
    labels=split.labels,
    size=len(split),
    seen=tuple(seen),
    for_training=for_training,
    num_outputs=num_outputs,
    known=getattr(split, 'known_values', known_values(split.labels)),
    classes_file=getattr(split, 'classes_file', ''),
    masks=getattr(split, 'masks', ''),
  )


def _with_damage(split: Any, observation: Observation) -> Observation:
  with jpeg_warnings() as found:
    again = observe(split, observation.index)
  return dataclasses.replace(again, damage=found[0] if found else '')


def known_values(labels: LabelSet) -> np.ndarray:
  """`Survey.known` for a split that does not define `known_values`."""
  # Values between the classes are deliberate: Cityscapes' unused label ids.
  values = np.arange(256)
  last = np.flatnonzero(labels.to_train_id != IGNORE).max()
  return (values <= last) | (values == IGNORE)


def observe(split: Any, index: int) -> Observation:
  """Reads one sample; a failure becomes an observation with `error`."""
  try:
    sample = split.raw(index)
  except Exception as error:  # One bad sample must not end the examination.
    message = str(error) or type(error).__name__
    return Observation(index, message.splitlines()[0], error=message)
  image, mask = np.asarray(sample['image']), np.asarray(sample['mask'])
  values, counts = _values(mask)
  pairs = getattr(split, 'pairs', None)  # Only a user's own folders have them.
  return Observation(
    index=index,
    name=sample['name'],
    files=(pairs[index].image, pairs[index].mask) if pairs else (),
    image_size=image.shape[:2],
    image_type=str(image.dtype),
    image_hash=_hash(image),
    mask_shape=mask.shape,
    mask_type=str(mask.dtype),
    mask_hash=_hash(mask),
    values=values,
    counts=counts,
    colours=_colours(mask),
    edges=_edges(image, mask),
  )


def _hash(array: np.ndarray) -> bytes:
  # The shape counts: (2, 8) and (4, 4) zeros have the same bytes.
  digest = hashlib.blake2b(str(array.shape).encode(), digest_size=16)
  digest.update(np.ascontiguousarray(array))
  return digest.digest()


def _values(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  if mask.ndim != 2 or mask.dtype.kind not in 'bui':
    return _NOTHING, _NOTHING
  # Faster than `np.unique`, but only for few values, none of them negative.
  if mask.dtype.kind in 'bu' and mask.dtype.itemsize <= 2:
    pixels = np.bincount(mask.ravel())
    values = np.flatnonzero(pixels)
    return values, pixels[values]
  values, counts = np.unique(mask, return_counts=True)
  return values.astype(np.int64), counts


def _colours(mask: np.ndarray) -> np.ndarray:
  if mask.ndim != 3 or mask.shape[2] < 3:
    return _NOTHING.reshape(0, 3)
  pixels = mask[..., 2::-1].reshape(-1, 3)  # RGB, from BGR or BGRA.
  pixels = pixels[:: max(len(pixels) // _MOST_COLOURS, 1)]
  return np.unique(pixels, axis=0).astype(np.int64)


def _edges(
  image: np.ndarray, mask: np.ndarray
) -> tuple[float, float, float] | None:
  if mask.ndim != 2 or image.shape[:2] != mask.shape:
    return None
  if image.dtype != np.uint8 or mask.dtype != np.uint8:
    return None
  scale = min(_SMALL / max(mask.shape), 1)
  size = [max(round(length * scale), 1) for length in mask.shape[::-1]]
  image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
  grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
  steepness = cv2.magnitude(
    cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
  )
  border = np.zeros(mask.shape, bool)
  border[:, 1:] = mask[:, 1:] != mask[:, :-1]
  border[1:] |= mask[1:] != mask[:-1]
  # A border shorter than an edge of the image is too little to average over.
  if np.count_nonzero(border) < max(size):
    return None
  # The mirror images have equally long borders, in places that mean nothing.
  places = border, border[:, ::-1], border[::-1]
  return tuple(float(steepness[place].mean()) for place in places)


def names(observations: Iterable[Observation]) -> tuple[str, ...]:
  return tuple(o.name for o in observations)
