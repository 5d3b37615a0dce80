"""Cityscapes that tfds' own builder has written is read as it is."""

import json
import os
import pickle
import shutil
import types
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


@pytest.fixture(scope='module')
def tfds_data_dir(mini_cityscapes_archives, tmp_path_factory):
  """Written by tfds' builder itself, with Python's ways to files and zips."""
  folder = tmp_path_factory.mktemp('tfds')

  def extract(manager, path):
    target = folder / 'extracted' / Path(path).stem
    shutil.unpack_archive(path, target)
    return target

  gfile = types.SimpleNamespace(exists=os.path.exists, listdir=os.listdir)
  tensorflow = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
  with pytest.MonkeyPatch.context() as patch:
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
  return shutil.copytree(tfds_data_dir, tmp_path / 'data')


@pytest.fixture
def theirs(data_dir):
  """The folder of that copy's records."""
  return tfds_cityscapes.directory(data_dir)


def to_tfrecord(path):
  return path.with_name(path.name.replace('array_record', 'tfrecord'))


def train(data_dir):
  return open_split('cityscapes', data_dir, 'train')


def change_info(folder, **changes):
  path = folder / 'dataset_info.json'
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


def test_our_own_data_comes_first(mini_cityscapes_data_dir, data_dir, theirs):
  assert train(data_dir).directory == theirs
  ours = data_dir / 'cityscapes' / 'release' / '1.0.0'
  shutil.copytree(mini_cityscapes_data_dir / 'cityscapes/mini/1.0.0', ours)
  split = train(data_dir)
  assert split.directory == ours
  names = [sample['name'] for sample in split]
  assert names == sorted(names)  # Theirs are shuffled.


def test_tfrecord_is_refused_with_the_way_out(data_dir, theirs):
  for path in theirs.glob('*.array_record*'):
    path.rename(to_tfrecord(path))
  change_info(theirs, fileFormat='tfrecord')
  message = '(?s)tfds as tfrecord; .*tfds convert_format --dataset_version_dir='
  message += f'{theirs} .*prepare cityscapes'
  with pytest.raises(UserError, match=message):
    train(data_dir)


def test_converted_in_place_is_read(data_dir, theirs, tfds_data_dir):
  """As `tfds convert_format` leaves it: two formats side by side."""
  for path in theirs.glob('*.array_record*'):
    to_tfrecord(path).touch()
  others = {'alternativeFileFormats': ['array_record']}
  change_info(theirs, fileFormat='tfrecord', **others)
  assert_equal(*(train(x)[0] for x in (data_dir, tfds_data_dir)))


def test_missing_file_and_other_features(data_dir, theirs):
  (theirs / 'cityscapes-test.array_record-00000-of-00001').unlink()
  with pytest.raises(UserError, match=r'(?s)incomplete: .*-test.*tfds build'):
    train(data_dir)
  features = (theirs / 'features.json').read_text()
  features = features.replace('segmentation_label', 'disparity_map')
  (theirs / 'features.json').write_text(features)
  with pytest.raises(UserError, match=r'has no segmentation_label'):
    train(data_dir)


def test_damaged_record_is_named(data_dir, theirs):
  path = theirs / 'cityscapes-validation.array_record-00000-of-00001'
  data = path.read_bytes()
  third, half = len(data) // 3, len(data) // 2
  path.write_bytes(data[:third] + bytes(half - third) + data[half:])
  split = open_split('cityscapes', data_dir, 'validation')
  with pytest.raises(UserError, match=r'semantic_seg.*prepare it again'):
    list(split)


def test_values_of_no_class_are_refused(tfds_data_dir):
  """The builder of tfds has not looked at them."""
  split = train(tfds_data_dir)
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
  folder = prepare_raw('cityscapes', data_dir).parent.name
  assert folder == 'semantic_segmentation_raw'
  assert train(data_dir).decoded
  assert_equal(list(train(data_dir)), list(train(tfds_data_dir)))
