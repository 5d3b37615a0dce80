"""Cityscapes as tfds' own builder stores it, read without TensorFlow.

`cityscapes/semantic_segmentation` of tensorflow_datasets needs TensorFlow to
be prepared, but not to be read, if its files are ArrayRecord. It holds the
same pictures and label ids as `resnest_jax.data.cityscapes`, under other
names and in an order of its own.
"""

import os
from pathlib import Path

import tensorflow_datasets as tfds

from resnest_jax.errors import UserError

# The features that hold image, mask and name.
KEYS = 'image_left', 'segmentation_label', 'image_id'
_INSTEAD = (
  'Or prepare the two zip files anew, which needs no TensorFlow:\n'
  '  python -m resnest_jax.data.prepare cityscapes --archive_dir FOLDER '
  '--data_dir {data_dir}'
)


def directory(data_dir: str | os.PathLike) -> Path:
  """Where tfds' builder puts it."""
  return Path(data_dir, 'cityscapes', 'semantic_segmentation', '1.0.0')


def is_there(data_dir: str | os.PathLike) -> bool:
  """Whether tfds has finished preparing it, in whatever format."""
  return (directory(data_dir) / 'dataset_info.json').is_file()


def command(data_dir: str | os.PathLike) -> str:
  """Prepares it, where TensorFlow is installed."""
  return (
    'tfds build cityscapes/semantic_segmentation --file_format=array_record '
    f'--manual_dir=FOLDER --data_dir={data_dir}'
  )


def open_builder(data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
  """Returns a builder that reads it.

  Raises:
    UserError: its files are not ArrayRecord, or not those of tfds' builder.
  """
  folder = directory(data_dir)
  instead = _INSTEAD.format(data_dir=data_dir)
  builder = tfds.builder_from_directory(folder)
  wanted = tfds.core.FileFormat.ARRAY_RECORD
  if wanted not in builder.info.available_file_formats():
    raise UserError(
      f'{folder} was written by tfds as {builder.info.file_format.value}; '
      'random access needs array_record. Convert it, where TensorFlow is '
      f'installed:\n  tfds convert_format --dataset_version_dir={folder} '
      f'--out_file_format=array_record\n{instead}'
    )
  # Both may be there; the files that are looked for are then these.
  builder.info.set_file_format(
    wanted, override=True, override_if_initialized=True
  )
  if missing := [key for key in KEYS if key not in builder.info.features]:
    raise UserError(
      f"{folder} has no {' and no '.join(missing)}; it is not what tfds' "
      f'cityscapes/semantic_segmentation has. {instead}'
    )
  return builder
