"""Reads Cityscapes as tfds' own builder stores it, without TensorFlow.

`cityscapes/semantic_segmentation` has the same pictures and label ids as
`resnest_jax.data.cityscapes`, under other names and in another order. Only
preparing it needs TensorFlow.
"""

import os
from pathlib import Path

import tensorflow_datasets as tfds

from resnest_jax.errors import UserError

KEYS = 'image_left', 'segmentation_label', 'image_id'  # Image, mask, name.
_INSTEAD = (
  'Or prepare the two zip files anew, which needs no TensorFlow:\n'
  '  python -m resnest_jax.data.prepare cityscapes --archive_dir FOLDER '
  '--data_dir {data_dir}'
)


def directory(data_dir: str | os.PathLike) -> Path:
  return Path(data_dir, 'cityscapes', 'semantic_segmentation', '1.0.0')


def is_there(data_dir: str | os.PathLike) -> bool:
  """Whether tfds has finished preparing it, in any file format."""
  return (directory(data_dir) / 'dataset_info.json').is_file()


def command(data_dir: str | os.PathLike) -> str:
  return (
    'tfds build cityscapes/semantic_segmentation --file_format=array_record '
    f'--manual_dir=FOLDER --data_dir={data_dir}'
  )


def open_builder(data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
  """Opens the prepared files, which must be ArrayRecord."""
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
  # In a converted folder tfds would look for the files of the original format.
  builder.info.set_file_format(
    wanted, override=True, override_if_initialized=True
  )
  if missing := [key for key in KEYS if key not in builder.info.features]:
    raise UserError(
      f"{folder} has no {' and no '.join(missing)}; it is not what tfds' "
      f'cityscapes/semantic_segmentation has. {instead}'
    )
  return builder
