"""Random access to prepared data: index -> image and mask."""

import dataclasses
import operator
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from resnest_jax.data import ade20k, cityscapes
from resnest_jax.data.archives import ArchiveBuilder, ArchiveConfig
from resnest_jax.data.folder import FolderSplit, make_folder_split
from resnest_jax.data.labels import ADE20K, CITYSCAPES, LabelSet
from resnest_jax.errors import UnreadableSample, UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set that `resnest_jax.data.prepare` knows.

  Attributes:
    builder: class that writes and reads it.
    config: of the builder.
    labels: what its masks mean.
    archive_flag: how `prepare` is told where the archive is, '' if it needs
      none.
    hint: to end the message that it is not prepared.
  """

  builder: type[ArchiveBuilder]
  config: ArchiveConfig
  labels: LabelSet
  archive_flag: str = ''
  hint: str = ''


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
    '--archive_dir FOLDER',
    f'FOLDER holds {cityscapes.IMAGES} and {cityscapes.MASKS} from '
    f'{cityscapes.URL} (registration needed).',
  ),
  'cityscapes_mini': Dataset(
    cityscapes.Cityscapes, cityscapes.MINI, CITYSCAPES
  ),
}


def prepare_command(name: str, data_dir: str | os.PathLike) -> str:
  """The command that prepares the data set `name` in `data_dir`."""
  archive = DATASETS[name].archive_flag
  words = ('python -m resnest_jax.data.prepare', name, archive)
  return f'{" ".join(filter(None, words))} --data_dir {data_dir}'


def open_split(name: str, data_dir: str | os.PathLike, split: str) -> 'Split':
  """Opens a split of a prepared data set.

  Args:
    name: a key of `DATASETS`: 'ade20k', 'cityscapes' or the mini ones.
    data_dir: the folder that was given to `resnest_jax.data.prepare`.
    split: 'train' or 'validation'; Cityscapes also has 'test', whose labels
      are all to be ignored.

  Raises:
    UserError: unknown name or split, or data that is not there; the message
      has the command that prepares it.
  """
  return Split(name, data_dir, split)


def open_data(data_config: Any, split: str) -> 'Split | FolderSplit':
  """Opens a split of the data that a configuration names.

  Args:
    data_config: `config.data`.
    split: as for `open_split`, or for `make_folder_split` where the name is
      'folder'.
  """
  if data_config.name == 'folder':
    return make_folder_split(data_config, split)
  return open_split(data_config.name, data_config.data_dir, split)


class Split:
  """A sequence of samples; threads may share it and it can be pickled.

  `split[i]` is a dict of
    image: uint8 (H, W, 3), RGB.
    label: uint8 (H, W), train ids (positions in
      `labels.classes`) and 255 for pixels to ignore.
    name: str, the file's stem in the archive.
  H and W may differ from sample to sample.

  Attributes:
    labels: the `LabelSet` of the train ids.
  """

  def __init__(self, name: str, data_dir: str | os.PathLike, split: str):
    self.name = name
    self.data_dir = os.fspath(data_dir)
    self.split = split
    builder = _open_builder(name, self.data_dir)
    self.labels = DATASETS[name].labels
    if split not in builder.info.splits:
      raise UserError(
        f'{name} has no split {split!r}; it has '
        f'{", ".join(sorted(builder.info.splits))}'
      )
    # tfds would decode with its own rules; we want the original bytes.
    skip = tfds.decode.SkipDecoding()
    self._source = builder.as_data_source(
      split, decoders={'image': skip, 'label': skip}
    )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict:
    sample = self.raw(index)
    image, mask = sample['image'], sample['mask']
    if image.dtype != np.uint8 or image.shape[:2] != mask.shape:
      raise self._unreadable(sample['name'], 'image and mask do not fit')
    label = self.labels.to_train_id[mask]
    return {'image': image, 'label': label, 'name': sample['name']}

  def raw(self, index: int) -> dict:
    """A sample as it is stored, for checks.

    Returns:
      `image` (H, W, 3), RGB, of any depth; `mask`, of any shape and type, its
      values not yet train ids; `name`.
    """
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f'{index} is not in 0 .. {len(self) - 1}')
    try:
      example = self._source[index]
    except Exception as error:  # ArrayRecord's errors have no common type.
      raise self._unreadable(f'record {index}', error) from error
    name = example['name'].decode()
    image = _decode(
      example['image'], cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH
    )
    mask = _decode(example['label'], cv2.IMREAD_UNCHANGED)
    if image is None or mask is None:
      raise self._unreadable(name, 'image or mask cannot be decoded')
    return {'image': image, 'mask': mask, 'name': name}

  def __reduce__(self):
    # Readers hold open files, so a copy opens its own.
    return open_split, (self.name, self.data_dir, self.split)

  def _unreadable(self, sample: str, why: object) -> UnreadableSample:
    return UnreadableSample(
      f'{sample} of {self.name}, split {self.split}, cannot be read from '
      f'{self.data_dir}: {why}\nThe prepared data is damaged; delete '
      f'{_directory(self.name, self.data_dir)} and prepare it again:\n  '
      f'{prepare_command(self.name, self.data_dir)}'
    )


def _decode(encoded: bytes, flags: int) -> np.ndarray | None:
  if not encoded:  # OpenCV raises for these, and gives None for other errors.
    return None
  return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)


def _directory(name: str, data_dir: str) -> Path:
  builder, config = DATASETS[name].builder, DATASETS[name].config
  return Path(data_dir, builder.name, config.name, str(builder.VERSION))


def _open_builder(name: str, data_dir: str) -> ArchiveBuilder:
  """Returns the builder of finished, complete data."""
  if name not in DATASETS:
    raise UserError(
      f'unknown data set {name!r}; there are {", ".join(DATASETS)}, and '
      'folder (configs/folder.py) for data of your own'
    )
  dataset, directory = DATASETS[name], _directory(name, data_dir)
  # Looked for before tfds is asked, which would write into its own folders.
  if not (directory / 'dataset_info.json').is_file():
    raise UserError(
      f'{name} is not prepared in {data_dir} (there is no {directory}). '
      f'Prepare it with:\n  {prepare_command(name, data_dir)}'
      f'\n{dataset.hint}'.rstrip()
    )
  builder = dataset.builder(config=dataset.config, data_dir=data_dir)
  if missing := missing_files(builder):
    raise UserError(
      f'{directory} is incomplete: {missing[0]} is missing. Delete the '
      f'folder and prepare it again:\n  {prepare_command(name, data_dir)}'
    )
  return builder


def missing_files(builder: ArchiveBuilder) -> list[str]:
  """The record files that prepared data should have and does not."""
  paths = [
    str(path)
    for info in builder.info.splits.values()
    for path in info.filepaths
  ]
  return [path for path in paths if not os.path.isfile(path)]
