"""What the rules need to know of a sample, and of a split.

A sample is read once, with its mask as it is stored; its pixels are not kept.
"""

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
_BLOCK = 64  # Samples that are read before complaints are looked at.
_MOST_COLOURS = 100_000  # Pixels of a coloured mask that are looked at.
_SMALL = 256  # Longest edge, in pixels, at which alignment is measured.


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
  """What was seen of one sample.

  Attributes:
    index: its place in the split.
    name: of the sample; where it cannot be read, the reason in one line.
    error: why it cannot be read, '' if it can. Then nothing else is known.
    files: paths of image and mask; empty if the data is not in files.
    damage: what the decoder complained about, '' if nothing.
    image_size: height and width.
    image_type: of the pixels, as NumPy calls it.
    image_hash: of size and pixels.
    mask_shape: (height, width), or more for several channels.
    mask_type: as NumPy calls it.
    mask_hash: of size and pixels.
    values: int64 (K,), what a mask of one channel holds, ascending.
    counts: int64 (K,), how many pixels hold it.
    colours: int64 (K, 3), RGB, what a mask of several channels holds.
    edges: how steep the image is, on average, at the borders of the mask, of
      its mirror image, and of the mask upside down; None if that cannot be
      said.
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

  def has(self, wanted: np.ndarray) -> bool:
    """Whether the mask has one of these values."""
    return bool(np.isin(self.values, wanted).any())


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
  """What was seen of a split.

  Attributes:
    data: name of the data set.
    split: name of the split.
    labels: what its masks should mean.
    size: how many samples the split has.
    seen: those that were looked at, in the split's order.
    for_training: whether it is what a network is trained on.
    num_outputs: classes of the network that it is for; 0: as many as there
      are.
    known: bool (256,), the mask values that are a class or meant to be
      ignored.
    classes_file: of a user's own data, '' if there is none.
    masks: the folder of their masks.
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
    """Whether every sample was looked at and could be read."""
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
    if not self.index_masks:
      return {}
    values = np.concatenate([o.values for o in self.index_masks])
    counts = np.concatenate([o.counts for o in self.index_masks])
    found, inverse = np.unique(values, return_inverse=True)
    pixels = np.zeros(len(found), np.int64)
    np.add.at(pixels, inverse, counts)
    return dict(zip(found.tolist(), pixels.tolist(), strict=True))

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
    """The values that are not known, ascending; 255 always is."""
    in_table = (self.values >= 0) & (self.values < len(self.known))
    known = in_table & self.known[np.where(in_table, self.values, 0)]
    return self.values[~known]

  def labelled(self, observation: Observation) -> np.ndarray:
    """bool (K,), which of a mask's values stand for a class."""
    return np.isin(observation.values, self.class_values)

  @functools.cached_property
  def class_counts(self) -> tuple[np.ndarray, np.ndarray]:
    """As `statistics.count_classes`: pixels and images, ignored ones last."""
    num_classes = len(self.labels.classes)
    pixels = np.zeros(num_classes + 1, np.int64)
    images = np.zeros(num_classes + 1, np.int64)
    for o in self.index_masks:
      row = np.zeros(num_classes + 1, np.int64)
      in_table = (o.values >= 0) & (o.values <= IGNORE)
      train_ids = np.full(len(o.values), num_classes)
      train_ids[in_table] = self.labels.to_train_id[o.values[in_table]]
      np.add.at(row, np.minimum(train_ids, num_classes), o.counts)
      pixels += row
      images += row > 0
    return pixels, images


def survey(
  split: Any,
  indices: Sequence[int] | None = None,
  *,
  for_training: bool,
  num_outputs: int,
  num_threads: int = 0,
  on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
  """Looks at the samples of a split.

  Args:
    split: of `datasets.open_data`. It may have `known_values`, see `Survey`.
    indices: ascending; None: all samples.
    for_training: see `Survey`.
    num_outputs: see `Survey`.
    num_threads: that read, see `thread_count`.
    on_progress: called with (samples done, samples in all).
  """
  indices = range(len(split)) if indices is None else indices
  seen = []
  for start in range(0, len(indices), _BLOCK):
    block = indices[start : start + _BLOCK]
    with jpeg_warnings() as found:
      read = map_in_threads(lambda i: observe(split, i), block, num_threads)
      for observation in read:
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
  """Reads a sample once more, to see whether the decoder complains."""
  with jpeg_warnings() as found:
    again = observe(split, observation.index)
  return dataclasses.replace(again, damage=found[0] if found else '')


def known_values(labels: LabelSet) -> np.ndarray:
  """`Survey.known` of a split without `known_values` of its own.

  Values between those of the classes are taken for meant, as the label ids of
  Cityscapes that are not evaluated; so is 255.
  """
  values = np.arange(256)
  last = np.flatnonzero(labels.to_train_id != IGNORE).max()
  return (values <= last) | (values == IGNORE)


def observe(split: Any, index: int) -> Observation:
  """Reads one sample; what cannot be read is an observation as well."""
  try:
    sample = split.raw(index)
  except Exception as error:  # Whatever it is, the user should be told.
    message = str(error) or type(error).__name__
    return Observation(index, message.splitlines()[0], error=message)
  image, mask = np.asarray(sample['image']), np.asarray(sample['mask'])
  values, counts = _values(mask)
  return Observation(
    index=index,
    name=sample['name'],
    files=_files(split, index),
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


def _files(split: Any, index: int) -> tuple[str, ...]:
  """Paths of a sample's image and mask; empty if it is not in files."""
  pairs = getattr(split, 'pairs', None)
  return (pairs[index].image, pairs[index].mask) if pairs else ()


def _hash(array: np.ndarray) -> bytes:
  digest = hashlib.blake2b(str(array.shape).encode(), digest_size=16)
  digest.update(np.ascontiguousarray(array))
  return digest.digest()


def _values(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The values of a mask of one channel, and how many pixels have them."""
  if mask.ndim != 2 or mask.dtype.kind not in 'bui':
    return _NOTHING, _NOTHING
  if mask.dtype.kind in 'bu' and mask.dtype.itemsize <= 2:  # The usual, fast.
    pixels = np.bincount(mask.ravel())
    values = np.flatnonzero(pixels)
    return values, pixels[values]
  values, counts = np.unique(mask, return_counts=True)
  return values.astype(np.int64), counts


def _colours(mask: np.ndarray) -> np.ndarray:
  """The RGB colours of a mask of several channels, as OpenCV decodes it."""
  if mask.ndim != 3 or mask.shape[2] < 3:
    return _NOTHING.reshape(0, 3)
  pixels = mask[..., 2::-1].reshape(-1, 3)
  pixels = pixels[:: max(len(pixels) // _MOST_COLOURS, 1)]
  return np.unique(pixels, axis=0).astype(np.int64)


def _edges(
  image: np.ndarray, mask: np.ndarray
) -> tuple[float, float, float] | None:
  """See `Observation.edges`."""
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
  if np.count_nonzero(border) < max(size):
    return None
  places = border, border[:, ::-1], border[::-1]
  return tuple(float(steepness[place].mean()) for place in places)


def names(observations: Iterable[Observation]) -> tuple[str, ...]:
  return tuple(o.name for o in observations)
