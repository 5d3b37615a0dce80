"""Reads samples and keeps the facts that the rules need, not their pixels."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np

from resnest_jax.bands import COLOURS, shown
from resnest_jax.data.doctor.decoder_warnings import jpeg_warnings
from resnest_jax.data.own.masks import Conversion, Stored, colours_of
from resnest_jax.errors import UserError
from resnest_jax.labels import IGNORE, LabelSet, known_values
from resnest_jax.threads import map_in_threads

# Samples to read again, one by one, when libjpeg complains: it names none.
_BLOCK = 64
# Longest step, in pixels, of a border that was smoothed.
_RAMP = 4
# Longest edge for alignment: borders that are a pixel off still meet edges.
_SMALL = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
  """Facts about one sample, of whose mask K values are known, ascending."""

  index: int
  name: str  # The sample's, or the reason in one line if it is unreadable.
  error: str = ''  # Why it cannot be read; nothing else is known then.
  file: str = ''  # The image's, if the data is in files.
  damage: str = ''  # The decoder's complaint.
  image_size: tuple[int, int] = (0, 0)  # Height and width.
  image_type: str = ''  # NumPy's name of the pixels' type.
  image_hash: bytes = b''  # Of size and pixels, as `mask_hash`.
  mask_shape: tuple[int, ...] = ()  # (H, W), or more for several channels.
  mask_type: str = ''
  mask_hash: bytes = b''
  values: np.ndarray | None = None  # (K,), of a mask of one channel.
  counts: np.ndarray | None = None  # (K,), pixels with each value.
  colours: np.ndarray | None = None  # RGB, of a mask of several channels.
  kind: str = ''  # How the mask's file stores it: '8-bit grey'.
  indices: tuple[int, ...] = ()  # Values of the pixels of a palette PNG.
  refused: str = ''  # The error with which training refuses the sample.
  channels: int = 0  # Of the image's file; 0 if unknown.
  white: float = 0  # The largest value of the image.
  # (K,), pixels of each value in a thin strip between a lower and a higher one,
  # and such strips, counted along rows and columns.
  between: np.ndarray | None = None
  ramps: np.ndarray | None = None
  jumps: int = 0  # Borders of values more than 1 apart without such a strip.
  # Mean steepness of the image at the borders of the mask, of its mirror image,
  # and of the mask upside down; None if not measurable.
  edges: tuple[float, float, float] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
  """Facts about a split."""

  data: str  # Name of the data set.
  split: str
  labels: LabelSet  # The intended meaning of its masks.
  size: int  # Samples of the split, examined or not.
  seen: tuple[Observation, ...]  # Those that were examined, in order.
  for_training: bool
  num_outputs: int  # The network's classes; 0 if it adapts to the data.
  known: np.ndarray  # bool, as `known_values`: which values masks may have.
  conversion: Conversion | None = None  # For a user's own data.
  bands: tuple[str, ...] = ()  # Of its images; (): RGB.

  @property
  def classes_file(self) -> str:  # Its path, for a user's own data; else ''.
    return self.conversion.classes_file if self.conversion else ''

  @property
  def ignores_255(self) -> bool:  # As nearly always.
    return self.labels.to_train_id[IGNORE] == IGNORE

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
    # Those of other formats, such as JPEG, have changed numbers.
    return tuple(
      o
      for o in self.readable
      if o.values.size and o.kind.count('-bit ') == bool(o.kind)
    )

  @functools.cached_property
  def histogram(self) -> dict[int, int]:
    """Value -> pixels, over all index masks; ascending."""
    return self.summed('counts')

  @functools.cached_property
  def ignored(self) -> dict[int, int]:
    """Value -> pixels, of the values that stand for no class."""
    classes = set(self.class_values.tolist())
    return {v: n for v, n in self.histogram.items() if v not in classes}

  @functools.cached_property
  def values(self) -> np.ndarray:
    """int64 (K,), all values but 255 if it is no class, ascending."""
    values = np.array(list(self.histogram), np.int64)
    return values[values != IGNORE] if self.ignores_255 else values

  @functools.cached_property
  def class_values(self) -> np.ndarray:
    """int64 (C,), the values that stand for a class, ascending."""
    return np.flatnonzero(self.labels.to_train_id != IGNORE)

  @functools.cached_property
  def unknown_values(self) -> np.ndarray:
    """The values that are not known, ascending; 255 is always known."""
    return self.values[~_look_up(self.known, self.values, False)]

  def summed(self, fact: str) -> dict[int, int]:
    """Value -> the sum of `counts`, `between` or `ramps`; ascending."""
    sums = collections.Counter()
    for o in self.index_masks:
      numbers = getattr(o, fact).tolist()
      sums.update(dict(zip(o.values.tolist(), numbers, strict=True)))
    return dict(sorted(sums.items()))

  def labelled(self, observation: Observation) -> np.ndarray:
    """bool (K,), which of a mask's values stand for a class."""
    return np.isin(observation.values, self.class_values)

  def having(self, wanted: np.ndarray) -> list[Observation]:
    """The index masks with any of the values."""
    return [o for o in self.index_masks if np.isin(o.values, wanted).any()]

  @functools.cached_property
  def class_counts(self) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and images of each class, (C + 1,) each; the last is ignored."""
    ignored = len(self.labels.classes)
    rows = np.zeros((len(self.index_masks), ignored + 1), np.int64)
    for row, o in zip(rows, self.index_masks, strict=True):
      train_ids = _look_up(self.labels.to_train_id, o.values, IGNORE)
      # Several values may share a train id.
      row[:] = np.bincount(np.minimum(train_ids, ignored), o.counts, len(row))
    return rows.sum(0), (rows > 0).sum(0)


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
  """Examines samples of a split, in parallel: all, or those of `indices`.

  `on_progress` is called with (samples done, samples in all).
  """
  indices = range(len(split)) if indices is None else indices
  seen = []
  observed = functools.partial(observe, split)
  for start in range(0, len(indices), _BLOCK):
    block = indices[start : start + _BLOCK]
    # One context per block, entered by this thread alone.
    with jpeg_warnings() as found:
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
    conversion=getattr(split, 'conversion', None),
    bands=getattr(split, 'bands', ()),
  )


def _with_damage(split: Any, observation: Observation) -> Observation:
  with jpeg_warnings() as found:
    again = observe(split, observation.index)
  return dataclasses.replace(again, damage=found[0] if found else '')


def observe(split: Any, index: int) -> Observation:
  """Reads one sample; a failure becomes an observation with `error`."""
  try:
    sample = split.raw(index)
  except Exception as error:  # One bad sample must not end the examination.
    message = str(error) or type(error).__name__
    return Observation(index, message.splitlines()[0], error=message)
  image, mask = np.asarray(sample['image']), np.asarray(sample['mask'])
  values, counts = _values(mask)
  refused = ''
  try:
    getattr(split, 'labelled', lambda *_: None)(index, sample)
  except UserError as error:
    refused = str(error)
  stored = sample.get('stored') or Stored(mask, '')
  pairs = getattr(split, 'pairs', None)  # Only a user's own folders have them.
  return Observation(
    index=index,
    name=sample['name'],
    file=pairs[index].image if pairs else '',
    image_size=image.shape[:2],
    image_type=str(image.dtype),
    image_hash=_hash(image),
    mask_shape=mask.shape,
    mask_type=str(mask.dtype),
    mask_hash=_hash(mask),
    values=values,
    counts=counts,
    colours=colours_of(mask),
    kind=stored.kind,
    indices=stored.indices,
    refused=refused,
    channels=sample.get('channels', 0),
    white=image.max().item(),
    **_ramps(mask, values, split.labels.to_train_id[IGNORE] == IGNORE),
    edges=_edges(shown(image, getattr(split, 'bands', ()) or COLOURS), mask),
  )


def _hash(array: np.ndarray) -> bytes:
  # The shape counts: (2, 8) and (4, 4) zeros have the same bytes.
  digest = hashlib.blake2b(str(array.shape).encode(), digest_size=16)
  digest.update(np.ascontiguousarray(array))
  return digest.digest()


def _values(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  if mask.ndim != 2 or mask.dtype.kind not in 'bui':
    return (np.zeros(0, np.int64),) * 2
  # Faster than `np.unique`, but only for few values, none of them negative.
  if mask.dtype.kind in 'bu' and mask.dtype.itemsize <= 2:
    pixels = np.bincount(mask.ravel())
    values = np.flatnonzero(pixels)
    return values, pixels[values]
  values, counts = np.unique(mask, return_counts=True)
  return values.astype(np.int64), counts


def _ramps(
  mask: np.ndarray, values: np.ndarray, ignored: bool
) -> dict[str, Any]:
  """Strips between a lower and a higher value; see `Observation`."""
  if mask.ndim != 2 or mask.dtype != np.uint8:
    return {'between': 0 * values, 'ramps': 0 * values}
  between, ramps, jumps = np.zeros(mask.shape, bool), np.zeros(256, int), 0
  # Views, so that marks of columns land in `between` as well.
  for lines, marks in ((mask, between), (mask.T, between.T)):
    begins = np.ones(lines.shape, bool)
    begins[:, 1:] = lines[:, 1:] != lines[:, :-1]
    row, column = np.nonzero(begins)
    value = lines[row, column].astype(int)
    before, here, after = value[:-2], value[1:-1], value[2:]
    length = column[2:] - column[1:-1]
    inside = (row[:-2] == row[2:]) & (length <= _RAMP)
    ramp = inside & ((before < here) == (here < after))
    for offset in range(_RAMP):
      wide = ramp & (offset < length)
      marks[row[1:-1][wide], column[1:-1][wide] + offset] = True
    # Rims of 255 between classes are deliberate.
    jump = (row[1:] == row[:-1]) & (abs(np.diff(value)) > 1)
    if ignored:
      ramp &= (before != IGNORE) & (after != IGNORE)
      jump &= (value[1:] != IGNORE) & (value[:-1] != IGNORE)
    jump[1:] &= ~ramp
    jump[:-1] &= ~ramp
    ramps += np.bincount(here[ramp], minlength=256)
    jumps += int(np.count_nonzero(jump))
  pixels = np.bincount(mask[between], minlength=256)
  return {'between': pixels[values], 'ramps': ramps[values], 'jumps': jumps}


def _edges(
  image: np.ndarray, mask: np.ndarray
) -> tuple[float, float, float] | None:
  if image.shape[:2] != mask.shape or mask.dtype not in (np.uint8, np.uint16):
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
