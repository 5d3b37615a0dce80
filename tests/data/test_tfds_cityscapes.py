"""Cityscapes that tfds' own builder has written is read as it is."""

import json
import os
import pickle
import shutil
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from numpy.testing import assert_equal
from tensorflow_datasets.datasets.cityscapes import cityscapes_dataset_builder

from resnest_jax.data import tfds_cityscapes
from resnest_jax.data.datasets import open_split
from resnest_jax.data.prepare import prepare_raw
from resnest_jax.errors import UserError
from resnest_jax.labels import CITYSCAPES

# What the builder asks TensorFlow for.
GFILE = types.SimpleNamespace(exists=os.path.exists, listdir=os.listdir)


@pytest.fixture(scope='module')
def tfds_data_dir(mini_cityscapes_archives, tmp_path_factory):
  """Written by tfds' builder itself, with Python's ways to files and zips."""
  folder = tmp_path_factory.mktemp('tfds')

  def extract(manager, path):
    target = folder / 'extracted' / Path(path).stem
    with zipfile.ZipFile(path) as archive:
      archive.extractall(target)
    return target

  with pytest.MonkeyPatch.context() as patch:
    tensorflow = types.SimpleNamespace(io=types.SimpleNamespace(gfile=GFILE))
    patch.setattr(cityscapes_dataset_builder, 'tf', tensorflow)
    patch.setattr(tfds.download.DownloadManager, 'extract', extract)
    builder = cityscapes_dataset_builder.Builder(
      data_dir=folder / 'data', config='semantic_segmentation'
    )
    builder.download_and_prepare(
      download_dir=folder / 'downloads',
      download_config=tfds.download.DownloadConfig(
        manual_dir=mini_cityscapes_archives, try_download_gcs=False
      ),
      file_format='array_record',
    )
  return folder / 'data'


@pytest.fixture
def data_dir(tfds_data_dir, tmp_path):
  """A copy, to be written to."""
  shutil.copytree(tfds_data_dir, tmp_path / 'data')
  return tmp_path / 'data'


def change_info(data_dir, **changes):
  path = tfds_cityscapes.directory(data_dir) / 'dataset_info.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_samples_are_those_of_our_own_builder(
  tfds_data_dir, mini_cityscapes_data_dir, split
):
  theirs = open_split('cityscapes', tfds_data_dir, split)
  ours = open_split('cityscapes_mini', mini_cityscapes_data_dir, split)
  assert theirs.labels is CITYSCAPES
  order = {sample['name']: i for i, sample in enumerate(theirs)}
  for i, sample in enumerate(ours):
    index = order.pop(sample['name'])
    assert_equal(theirs[index], sample)
    assert_equal(theirs.raw(index)['mask'], ours.raw(i)['mask'])
  assert not order
  assert pickle.loads(pickle.dumps(theirs))[0]['name'] == theirs[0]['name']


def test_our_own_data_comes_first(mini_cityscapes_data_dir, data_dir):
  theirs = tfds_cityscapes.directory(data_dir)
  assert open_split('cityscapes', data_dir, 'train').directory == theirs
  ours = data_dir / 'cityscapes' / 'release' / '1.0.0'
  shutil.copytree(mini_cityscapes_data_dir / 'cityscapes/mini/1.0.0', ours)
  split = open_split('cityscapes', data_dir, 'train')
  assert split.directory == ours
  names = [sample['name'] for sample in split]
  assert names == sorted(names)  # Theirs are shuffled.


def test_tfrecord_is_refused_with_the_way_out(data_dir):
  for path in tfds_cityscapes.directory(data_dir).glob('*.array_record*'):
    path.rename(str(path).replace('array_record', 'tfrecord'))
  change_info(data_dir, fileFormat='tfrecord')
  message = (
    '(?s)tfds as tfrecord; .*tfds convert_format --dataset_version_dir='
    f'{tfds_cityscapes.directory(data_dir)} .*prepare cityscapes'
  )
  with pytest.raises(UserError, match=message):
    open_split('cityscapes', data_dir, 'train')


def test_converted_in_place_is_read(data_dir, tfds_data_dir):
  """As `tfds convert_format` leaves it: two formats side by side."""
  for path in tfds_cityscapes.directory(data_dir).glob('*.array_record*'):
    path.with_name(path.name.replace('array_record', 'tfrecord')).touch()
  change_info(
    data_dir, fileFormat='tfrecord', alternativeFileFormats=['array_record']
  )
  split = open_split('cityscapes', data_dir, 'train')
  expected = open_split('cityscapes', tfds_data_dir, 'train')
  assert_equal(split[0], expected[0])


def test_missing_file_and_other_features(data_dir):
  folder = tfds_cityscapes.directory(data_dir)
  (folder / 'cityscapes-test.array_record-00000-of-00001').unlink()
  with pytest.raises(UserError, match=r'(?s)incomplete: .*-test.*tfds build'):
    open_split('cityscapes', data_dir, 'train')
  features = folder / 'features.json'
  text = features.read_text().replace('segmentation_label', 'disparity_map')
  features.write_text(text)
  with pytest.raises(UserError, match=r'has no segmentation_label'):
    open_split('cityscapes', data_dir, 'train')


def test_damaged_record_is_named(data_dir):
  folder = tfds_cityscapes.directory(data_dir)
  path = folder / 'cityscapes-validation.array_record-00000-of-00001'
  data = path.read_bytes()
  third, half = len(data) // 3, len(data) // 2
  path.write_bytes(data[:third] + bytes(half - third) + data[half:])
  split = open_split('cityscapes', data_dir, 'validation')
  with pytest.raises(UserError, match=r'semantic_seg.*prepare it again'):
    list(split)


def test_values_of_no_class_are_refused(tfds_data_dir):
  """The builder of tfds has not looked at them."""
  split = open_split('cityscapes', tfds_data_dir, 'train')
  raw = split.raw(1)
  raw['mask'] = np.where(raw['mask'] == 7, 40, raw['mask'])
  message = r'sample 1 of train in .* no class has: 40\.(?s:.*)tfds build'
  with pytest.raises(UserError, match=message):
    split.labelled(1, raw)
  # Values between the classes are deliberate; 255 is known.
  raw['mask'] = np.where(raw['mask'] == 40, 29, raw['mask'])
  raw['mask'][0] = 255
  assert (split.labelled(1, raw)['label'][0] == 255).all()


def test_the_mini_data_set_is_never_theirs(tfds_data_dir):
  with pytest.raises(UserError, match=r'cityscapes_mini is not prepared'):
    open_split('cityscapes_mini', tfds_data_dir, 'train')


def test_pixels_are_decoded_from_it(tfds_data_dir, data_dir):
  folder = prepare_raw('cityscapes', data_dir)
  assert folder.parent.name == 'semantic_segmentation_raw'
  split = open_split('cityscapes', data_dir, 'train')
  assert split.decoded
  assert_equal(
    list(split), list(open_split('cityscapes', tfds_data_dir, 'train'))
  )
