"""Random access to prepared data: index -> image and mask."""

import dataclasses
import hashlib
import json
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from resnest_jax.config import fit_num_classes, fit_total_steps
from resnest_jax.config_keys import classifies
from resnest_jax.data import ade20k, cityscapes, imagenet, pixels, tfds_layouts
from resnest_jax.data.archives import ArchiveBuilder, ArchiveConfig
from resnest_jax.data.images import decode_image
from resnest_jax.data.own.class_folder import (
  ClassFolderSplit,
  make_class_folder_split,
)
from resnest_jax.data.own.folder import make_folder_split
from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.labels import (
  ADE20K,
  CITYSCAPES,
  IMAGENET,
  LabelSet,
  class_names,
  known_values,
)
from resnest_jax.text import listed, readable


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set that `resnest_jax.data.prepare` can prepare."""

  builder: type[ArchiveBuilder]
  config: ArchiveConfig
  labels: LabelSet
  archive_flag: str = ''  # Where the archive is, if `prepare` needs one.
  hint: str = ''  # Ends the message that the data is not prepared.
  theirs: tfds_layouts.Layout | None = None  # Read where ours is not there.


def _two_archives(first: str, second: str, url: str) -> tuple[str, str]:
  holds = f'FOLDER holds {first} and {second} from {url} (registration needed).'
  return '--archive_dir FOLDER', holds


DATASETS = {
  'ade20k': Dataset(
    ade20k.Ade20k,
    ade20k.RELEASE,
    ADE20K,
    f'--archive {ade20k.ROOT}.zip',
    'Without --archive it downloads the archive (about 970 MB).',
  ),
  'ade20k_mini': Dataset(ade20k.Ade20k, ade20k.MINI, ADE20K),
  'cityscapes': Dataset(
    cityscapes.Cityscapes,
    cityscapes.RELEASE,
    CITYSCAPES,
    *_two_archives(cityscapes.IMAGES, cityscapes.MASKS, cityscapes.URL),
    tfds_layouts.CITYSCAPES,
  ),
  'cityscapes_mini': Dataset(
    cityscapes.Cityscapes, cityscapes.MINI, CITYSCAPES
  ),
  'imagenet': Dataset(
    imagenet.Imagenet2012,
    imagenet.RELEASE,
    IMAGENET,
    *_two_archives(imagenet.TRAIN, imagenet.VALIDATION, imagenet.URL),
    tfds_layouts.IMAGENET,
  ),
  'imagenet_mini': Dataset(
    imagenet.Imagenet2012,
    imagenet.MINI,
    class_names('imagenet_mini', imagenet.MINI.classes.values()),
  ),
}
# Their images have one class each; those of the others have masks.
CLASSIFIED = ('imagenet', 'imagenet_mini', ClassFolderSplit.name)

_PREPARE = 'python -m resnest_jax.data.prepare'


def prepare_command(name: str, data_dir: str | os.PathLike) -> str:
  archive = DATASETS[name].archive_flag
  words = (_PREPARE, name, archive)
  return f'{" ".join(filter(None, words))} --data_dir {data_dir}'


def open_data(data_config: Any, split: str) -> 'Split':
  """Opens a split of prepared data or of your own; raises as they do."""
  own = {'folder': make_folder_split, 'class_folder': make_class_folder_split}
  if data_config.name in own:
    return own[data_config.name](data_config, split)
  return PreparedSplit(data_config.name, data_config.data_dir, split)


Split = 'PreparedSplit | FolderSplit | ClassFolderSplit'
CLASSES = 'classes and their mask values'
FILES = 'names and sizes of the files of '


class Splits(NamedTuple):
  train: Split
  eval: Split

  def facts(self) -> dict[str, Any]:
    """What `describe` says of both."""
    return describe(
      {'the training split': self.train, 'the evaluation split': self.eval}
    )


def describe(splits: Mapping[str, Split]) -> dict[str, Any]:
  """Facts that are equal where the same samples are read; JSON-able."""
  facts = {}
  for name, split in splits.items():
    ids = split.labels.to_train_id
    facts[CLASSES] = [
      [class_name, np.flatnonzero(ids == k).tolist()]
      for k, class_name in enumerate(split.labels.classes)
    ]
    facts[f'images in {name}'] = len(split)
    facts[f'{FILES}{name}'] = split.fingerprint
  return facts


def check_task(config: ConfigDict) -> None:
  """Raises `UserError` for masks for a classifier, or the other way round."""
  name = config.data.name
  if classifies(config) != (name in CLASSIFIED):
    has, row = 'masks', 'ade20k_pspnet'
    if name in CLASSIFIED:
      has, row = 'one class for each image', 'classify_folder'
    raise UserError(
      f'the data set {name} has {has}, and config.model.head is '
      f'{config.model.head!r}. Data for a classifier is '
      f'{", ".join(CLASSIFIED)}; begin with a row that fits, such as {row}.'
    )


def open_splits(config: ConfigDict) -> Splits:
  """Opens the splits that a whole configuration trains and evaluates on.

  Sets a `model.num_classes` of 0 to the number of classes of the data, and
  `train.total_steps` if epochs are given. Raises `UserError` for missing data
  or such that does not fit the network.
  """
  check_task(config)
  names = config.data.train_split, config.data.eval_split
  splits = Splits(*(open_data(config.data, name) for name in names))
  fit_num_classes(config, len(splits.train.labels.classes))
  fit_total_steps(config, len(splits.train))
  return splits


class PreparedSplit:
  """A split of a data set that is prepared in `data_dir`.

  A sequence of samples, which threads can share and which can be pickled.
  `split[i]` is a dict of `image` uint8 (H, W, 3) RGB, `label` uint8 (H, W),
  positions in `labels.classes` and 255 for pixels to ignore, and `name`, the
  file's stem in the archive. H and W may differ from sample to sample. Of
  ImageNet `label` is an int, the position of the image's class.

  Splits are 'train' and 'validation'; Cityscapes also has 'test', whose labels
  are all to be ignored. `UserError` of missing data has the command that
  prepares it.
  """

  def __init__(self, name: str, data_dir: str | os.PathLike, split: str):
    self.name = name
    self.data_dir = os.fspath(data_dir)
    self.split = split
    self._stored = find_stored(name, self.data_dir)
    self.directory = self._stored.directory
    self._samples = StoredSamples(self._stored, split)
    self.labels = DATASETS[name].labels
    self.known_values = known_values(self.labels)
    # By `prepare --raw`; preferred where complete: they are the same samples.
    self.decoded = pixels.is_written(self._stored.pixel_folder, split)
    if self.decoded:
      self._samples = self._open_pixels()

  def __len__(self) -> int:
    return len(self._samples)

  @property
  def fingerprint(self) -> str:
    """Differs if other samples are stored, or in another order."""
    return self._stored.fingerprint[:16]

  def __getitem__(self, index: int) -> dict:
    return self.labelled(index, self.raw(index))

  def labelled(self, index: int, sample: dict) -> dict:
    """What `split[index]` makes of `raw(index)`, or an error."""
    image, mask = sample['image'], sample['mask']
    same = isinstance(mask, int) or (
      mask.dtype == np.uint8 and image.shape[:2] == mask.shape
    )
    if image.dtype != np.uint8 or not same:
      raise self._unreadable(
        sample['name'], 'image and mask differ in size or are not 8-bit'
      )
    label = self._to_label(index, mask)
    return {'image': image, 'label': label, 'name': sample['name']}

  def location(self, index: int) -> str:
    """Says where `split[index]` is stored, without reading it."""
    folder = self._stored.pixel_folder if self.decoded else self.directory
    return f'sample {index} of {self.split} in {folder}'

  def label(self, index: int) -> np.ndarray | int:
    """Returns the label of `split[index]`; the image is not decoded."""
    return self._to_label(index, self._read(index, self._samples.mask))

  def _to_label(self, index: int, mask: np.ndarray | int) -> np.ndarray | int:
    if isinstance(mask, int):
      return mask
    values = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel() > 0
    if (unknown := values & ~self.known_values).any():
      raise UserError(
        f'{self.location(index)}: the mask has values that no class has: '
        f'{listed(np.flatnonzero(unknown))}. Prepare the data again from the '
        f'official archive:\n  {self._stored.command}'
      )
    # As to_train_id[mask], but four times as fast and without the GIL.
    return cv2.LUT(mask, self.labels.to_train_id)

  def raw(self, index: int) -> dict:
    """A sample as it is stored: `mask` has no train ids, or is the class."""
    return self._read(index, self._samples.__getitem__)

  def _read(self, index: int, read: Callable[[int], Any]) -> Any:
    index = operator.index(index)
    if not 0 <= index < len(self):
      # Also ends a `for` loop over the split.
      raise IndexError(f'{index} is not in 0 .. {len(self) - 1}')
    try:
      return read(index)
    except Exception as error:  # ArrayRecord's errors have no common type.
      raise self._unreadable(f'sample {index}', error) from error

  def __reduce__(self):
    # A copy in a worker process opens its own files.
    return PreparedSplit, (self.name, self.data_dir, self.split)

  def _open_pixels(self) -> pixels.PixelFile:
    try:
      file = pixels.PixelFile(self._stored.pixel_folder, self.split)
      # The data may have been prepared again since it was decoded.
      if file.source != self._stored.fingerprint:
        raise ValueError('they were made from other data')
    except Exception as error:
      raise self._unreadable('the decoded pixels', error) from error
    return file

  def _unreadable(self, sample: str, why: object) -> UnreadableSample:
    folder, command = self.directory, self._stored.command
    if self.decoded:
      folder = self._stored.pixel_folder
      command = f'{_PREPARE} {self.name} --raw --data_dir {self.data_dir}'
    return UnreadableSample(
      f'{sample} of {self.name}, split {self.split}, cannot be read from '
      f'{self.data_dir}: {why}\nThe prepared data is damaged; delete '
      f'{folder} and prepare it again:\n  {command}'
    )


class StoredSamples:
  def __init__(self, stored: 'Stored', split: str):
    splits = stored.builder.info.splits
    if split not in splits:
      raise UserError(
        f'{stored.name} has no split {split!r}; it has '
        f'{", ".join(sorted(splits))}'
      )
    self._keys, features = stored.keys, stored.builder.info.features
    of_label = features[self._keys[1]]
    self._classes = isinstance(of_label, tfds.features.ClassLabel)
    # tfds would decode both, by rules of its own.
    skip = tfds.decode.SkipDecoding()
    encoded = self._keys[: 1 if self._classes else 2]
    self._source = stored.builder.as_data_source(
      split, decoders=dict.fromkeys(encoded, skip)
    )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict:
    example = self._source[index]
    image, mask, name = (example[key] for key in self._keys)
    name = name.decode()
    # Without IMREAD_ANYDEPTH a 16-bit image would become 8-bit unnoticed.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH
    if self._classes:  # Everybody reads ImageNet without turning pictures.
      flags |= cv2.IMREAD_IGNORE_ORIENTATION
    image = _decode(image, flags, f'the image of {name}')
    return {'image': image, 'mask': self._label(mask, name), 'name': name}

  def mask(self, index: int) -> np.ndarray | int:
    mask, name = (self._source[index][key] for key in self._keys[1:])
    return self._label(mask, name.decode())

  def _label(self, stored: Any, name: str) -> np.ndarray | int:
    if self._classes:
      return int(stored)
    return _decode(stored, cv2.IMREAD_UNCHANGED, f'the mask of {name}')


def _decode(encoded: bytes, flags: int, what: str) -> np.ndarray:
  pixels = decode_image(encoded, flags, what)
  if pixels is None:
    raise ValueError(f'{what} cannot be decoded')
  return pixels


@dataclasses.dataclass(frozen=True)
class Stored:
  name: str
  builder: tfds.core.DatasetBuilder
  directory: Path
  keys: tuple[str, str, str]  # Features of image, mask or class, and name.
  command: str  # That prepares it.

  @property
  def fingerprint(self) -> str:
    """Differs if other samples are stored, or in another order."""
    splits = {
      name: [info.num_bytes, list(info.shard_lengths)]
      for name, info in sorted(self.builder.info.splits.items())
    }
    metadata = self.builder.info.metadata or {}
    # Data that tfds has prepared has no fingerprint of the archive.
    facts = [self.directory.parent.name, metadata.get('fingerprint'), splits]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

  @property
  def pixel_folder(self) -> Path:
    # Next to the records: deleting one leaves the other.
    config = self.directory.parent
    return config.with_name(f'{config.name}_raw') / self.directory.name


def is_prepared(name: str, data_dir: str | os.PathLike) -> bool:
  theirs, ours = DATASETS[name].theirs, _directory(name, data_dir)
  ready = (ours / 'dataset_info.json').is_file()
  return ready or bool(theirs and theirs.is_there(data_dir))


def find_stored(name: str, data_dir: str | os.PathLike) -> Stored:
  """Finds prepared data; raises as `PreparedSplit`."""
  if name not in DATASETS:
    raise UserError(
      f'unknown data set {name!r}; there are {", ".join(DATASETS)}, and '
      'folder (configs/folder.py) and class_folder (configs/classify_folder.py)'
      ' for data of your own'
    )
  dataset, directory = DATASETS[name], _directory(name, data_dir)
  command, keys = prepare_command(name, data_dir), dataset.builder.KEYS
  # Without a builder, for which tfds would write into its own folders.
  if (directory / 'dataset_info.json').is_file():
    builder = dataset.builder(config=dataset.config, data_dir=data_dir)
  elif (theirs := dataset.theirs) and theirs.is_there(data_dir):
    directory = theirs.directory(data_dir)
    builder = theirs.open_builder(data_dir)
    command, keys = theirs.command(data_dir), theirs.keys
  else:
    raise UserError(
      f'{name} is not prepared in {data_dir} (there is no {directory}). '
      f'Prepare it with:\n  {command}\n{dataset.hint}'.rstrip()
    )
  if missing := missing_files(builder):
    raise UserError(
      f'{directory} is incomplete: {missing[0]} is missing. Delete the '
      f'folder and prepare it again:\n  {command}'
    )
  return Stored(name, builder, directory, keys, command)


def check_utf8(data_dir: str | os.PathLike) -> None:
  """Raises `UserError` if ArrayRecord could not open files in a folder."""
  path = os.path.abspath(data_dir)
  if readable(path) != path:
    raise UserError(
      f'prepared data cannot lie in {data_dir}, as its path is not UTF-8. '
      'Rename the folder, or give another data_dir.'
    )


def _directory(name: str, data_dir: str | os.PathLike) -> Path:
  check_utf8(data_dir)
  builder, config = DATASETS[name].builder, DATASETS[name].config
  return Path(data_dir, builder.name, config.name, str(builder.VERSION))


def missing_files(builder: tfds.core.DatasetBuilder) -> list[str]:
  infos = builder.info.splits.values()
  paths = [str(path) for info in infos for path in info.filepaths]
  return [path for path in paths if not os.path.isfile(path)]
