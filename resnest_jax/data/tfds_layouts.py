"""Reads Cityscapes and ImageNet as tfds' own builders store them.

They have the same pictures and labels as `resnest_jax.data.cityscapes` and
`imagenet`, under other names and in another order. Only preparing them needs
TensorFlow.
"""

import dataclasses
import os
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core import DatasetBuilder

from resnest_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where tfds writes a data set, and how its features are called."""

  name: str  # Of tfds.
  version: str
  keys: tuple[str, str, str]  # Image, mask or class, and name.
  prepare: str  # The data set that `prepare` makes of the same archives.

  def directory(self, data_dir: str | os.PathLike) -> Path:
    return Path(data_dir, self.name, self.version)

  def is_there(self, data_dir: str | os.PathLike) -> bool:
    """Whether tfds has finished preparing it, in any file format."""
    return (self.directory(data_dir) / 'dataset_info.json').is_file()

  def command(self, data_dir: str | os.PathLike) -> str:
    return (
      f'tfds build {self.name} --file_format=array_record '
      f'--manual_dir=FOLDER --data_dir={data_dir}'
    )

  def open_builder(self, data_dir: str | os.PathLike) -> DatasetBuilder:
    """Opens the prepared files, which must be ArrayRecord."""
    folder = self.directory(data_dir)
    instead = (
      'Or prepare the two archives anew, which needs no TensorFlow:\n'
      f'  python -m resnest_jax.data.prepare {self.prepare} '
      f'--archive_dir FOLDER --data_dir {data_dir}'
    )
    builder = tfds.builder_from_directory(folder)
    wanted = tfds.core.FileFormat.ARRAY_RECORD
    if wanted not in builder.info.available_file_formats():
      raise UserError(
        f'{folder} was written by tfds as {builder.info.file_format.value}; '
        'random access needs array_record. Convert it, where TensorFlow is '
        f'installed:\n  tfds convert_format --dataset_version_dir={folder} '
        f'--out_file_format=array_record\n{instead}'
      )
    # tfds would look for the files from which a folder was converted.
    builder.info.set_file_format(wanted, True, True)
    if missing := [x for x in self.keys if x not in builder.info.features]:
      raise UserError(
        f"{folder} has no {' and no '.join(missing)}; it is not what tfds' "
        f'{self.name} has. {instead}'
      )
    return builder


_NAMES = 'image_left', 'segmentation_label', 'image_id'
CITYSCAPES = Layout(
  'cityscapes/semantic_segmentation', '1.0.0', _NAMES, 'cityscapes'
)
IMAGENET = Layout(
  'imagenet2012', '5.1.0', ('image', 'label', 'file_name'), 'imagenet'
)
