"""Cityscapes: from the two zip files, or tfds' own records, to samples."""

import json
import os
import pickle
import shutil
import types
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from data import small_archives
from data.refusals import refused
from data.small_archives import full, image_name, mask_name, write_cityscapes
from numpy.testing import assert_equal
from tensorflow_datasets.datasets.cityscapes import cityscapes_dataset_builder

from resnest_jax.data import cityscapes, tfds_layouts
from resnest_jax.data.archives import ArchiveConfig
from resnest_jax.data.cityscapes import IMAGES, MASKS, Cityscapes
from resnest_jax.data.datasets import PreparedSplit
from resnest_jax.data.prepare import prepare_raw
from resnest_jax.errors import UserError
from resnest_jax.labels import CITYSCAPES

COUNTS = small_archives.ONE_OF_EACH
ONE, LONELY = 'lindau_1_9', 'zurich_5_9'


def contents_of(folder, config=cityscapes.MINI):
  return Cityscapes.open_contents(config, folder)


def read_all(contents):
  return [contents.read(x) for pairs in contents.pairs.values() for x in pairs]


def error_of(folder, config=cityscapes.MINI):
  """What is wrong with the archives in `folder`, found before or in reading."""
  with pytest.raises(UserError) as error:
    read_all(contents_of(folder, config))
  message = str(error.value)
  # Every message names the files, where they are, and the command.
  for word in (IMAGES, MASKS, 'cityscapes-dataset.com', '--archive_dir'):
    assert word in message
  return message


# ---- Samples ---------------------------------------------------------------


@pytest.mark.parametrize(('split', 'folder'), cityscapes.FOLDERS.items())
def test_samples_are_those_of_the_archives_in_order(
  mini_cityscapes_archives, mini_cityscapes_data_dir, split, folder
):
  images = zipfile.ZipFile(mini_cityscapes_archives / IMAGES)
  masks = zipfile.ZipFile(mini_cityscapes_archives / MASKS)
  samples = PreparedSplit('cityscapes_mini', mini_cityscapes_data_dir, split)
  names = [name for name in images.namelist() if f'/{folder}/' in name]
  for sample, name in zip(samples, sorted(names), strict=True):
    assert f'/{sample["name"]}_leftImg8bit.png' in name
    image = small_archives.decode(images.read(name), cv2.IMREAD_COLOR_RGB)
    assert_equal(sample['image'], image)
    mask = small_archives.decode(masks.read(mask_name(sample['name'], folder)))
    assert_equal(sample['label'], CITYSCAPES.to_train_id[mask])
    assert sample['label'].dtype == np.uint8
  assert samples.labels is CITYSCAPES
  assert (sample['label'] == 255).all() == (split == 'test')


# ---- What is not the two archives ------------------------------------------


def test_builder_without_the_archives_downloads_nothing(tmp_path):
  builder = Cityscapes(config=cityscapes.MINI, data_dir=tmp_path)
  refused('cityscapes/mini cannot be downloaded', builder.download_and_prepare)


def test_folders_without_the_archives(tmp_path):
  assert 'there is no folder' in error_of(tmp_path / 'none')
  (tmp_path / 'gtFine').mkdir()
  assert 'there is gtFine. Put' in error_of(tmp_path)
  write_cityscapes(tmp_path)
  assert 'is a file' in error_of(tmp_path / IMAGES)
  os.truncate(tmp_path / IMAGES, 200)
  assert f'{IMAGES} is not a readable zip file' in error_of(tmp_path)
  assert cityscapes.SHA1[IMAGES] in error_of(tmp_path)
  (tmp_path / MASKS).rename(tmp_path / 'gtCoarse.zip')
  assert f'has no {MASKS}; there is gtCoarse.zip' in error_of(tmp_path)


OTHERS = [
  (MASKS, 'gtCoarse/train/ulm/a_gtCoarse_labelIds.png', 'coarse annot'),
  (MASKS, mask_name('ulm_1_9', kind='labelTrainIds'), 'masks of train ids'),
  (MASKS, image_name('ulm_1_9'), 'first file is leftImg8bit/train/ulm'),
  (IMAGES, None, 'it has no files'),
]


@pytest.mark.parametrize(('file', 'name', 'message'), OTHERS)
def test_other_packages_are_told_apart(tmp_path, file, name, message):
  write_cityscapes(tmp_path)
  small_archives.write_zip(tmp_path / file, {name: b''} if name else {})
  assert message in error_of(tmp_path)


UNFIT = [
  ('images', LONELY, full((4, 8, 3), 0), '1 val samples have no mask, the f'),
  ('masks', LONELY, full((4, 8), 7), 'a mask but no image, the first is zur'),
  ('masks', ONE, full((4, 8), 34), 'has the value 34; the masks of this'),
  ('masks', ONE, full((4, 8, 3), 7), 'is a 8-bit RGB picture'),
  ('images', ONE, full((4, 8), 0), 'is a 8-bit grey picture; the images'),
  ('images', ONE, full((4, 8, 3), 0, np.uint16), 'is a 16-bit RGB picture'),
  ('images', ONE, full((2, 4, 3), 0), 'its mask 8 x 4'),
]


@pytest.mark.parametrize(('kind', 'sample', 'content', 'message'), UNFIT)
def test_file_that_does_not_fit(tmp_path, kind, sample, content, message):
  name = {'images': image_name, 'masks': mask_name}[kind](sample, 'val')
  error = error_of(write_cityscapes(tmp_path, **{kind: {name: content}}))
  assert message in error
  assert sample in error


def test_masks_may_have_licence_plates(tmp_path):
  """Their label id -1 is 255 in 8 bits."""
  read_all(contents_of(write_cityscapes(tmp_path, mask=full((4, 8), 255))))


def test_other_files_of_the_release_are_left_alone(tmp_path):
  one = contents_of(write_cityscapes(tmp_path))
  kinds = ('color', 'instanceIds', 'labelTrainIds')
  extra = {mask_name('ulm_1_9', kind=kind): b'?' for kind in kinds}
  extra |= {'gtFine/train/ulm/ulm_1_9_gtFine_polygons.json': b'{}'}
  extra |= {'README': b'', '__MACOSX/' + mask_name('ulm_2_9'): b''}
  two = contents_of(write_cityscapes(tmp_path, {'license.txt': b''}, extra))
  pair = image_name('ulm_1_9'), mask_name('ulm_1_9')
  assert two.pairs['train'] == one.pairs['train'] == [pair]
  assert two.fingerprint == one.fingerprint
  other = {mask_name('ulm_1_9'): full((4, 8), 8)}
  changed = contents_of(write_cityscapes(tmp_path, masks=other))
  assert changed.fingerprint != one.fingerprint


def test_other_counts_or_sizes_than_the_release(tmp_path):
  write_cityscapes(tmp_path, comment='')
  message = '1 train, 1 val and 1 test images, expected 2975, 500 and 1525'
  assert message in error_of(tmp_path, cityscapes.RELEASE)
  refused(
    'not a mini arch.*Leave it out .* as cityscapes', contents_of, tmp_path
  )
  for size in ([1e999, 4], ['8', 4], [8], {'8': 4}, [10**12, 4], '['):
    comment = json.dumps({'images': COUNTS, 'size': size})
    write_cityscapes(tmp_path, comment=comment.replace('"["', '[' * 60_000))
    refused('comment .* to have others drawn|not a mini', contents_of, tmp_path)
  write_cityscapes(tmp_path)  # A generated one says so.
  remedy = 'Prepare it as cityscapes_mini'
  assert remedy in error_of(tmp_path, cityscapes.RELEASE)
  config = ArchiveConfig(name='large', counts=COUNTS, size=(2048, 1024))
  message = error_of(tmp_path, config)
  assert 'has 8 x 4 pixels, the release 2048 x 1024' in message


# ---- Records that tfds' own builder has written are read as they are ---------


@pytest.fixture(scope='module')
def tfds_data_dir(mini_cityscapes_archives, tmp_path_factory):
  """Written by tfds' builder itself, with Python's ways to files and zips."""
  folder = tmp_path_factory.mktemp('tfds')

  def extract(manager, path):
    shutil.unpack_archive(path, folder / Path(path).stem)
    return folder / Path(path).stem

  gfile = types.SimpleNamespace(exists=os.path.exists, listdir=os.listdir)
  tensorflow = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cityscapes_dataset_builder, 'tf', tensorflow)
    patch.setattr(tfds.download.DownloadManager, 'extract', extract)
    where = {'data_dir': folder / 'data', 'config': 'semantic_segmentation'}
    cityscapes_dataset_builder.Builder(**where).download_and_prepare(
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
  return tfds_layouts.CITYSCAPES.directory(data_dir)


def train(data_dir):
  return PreparedSplit('cityscapes', data_dir, 'train')


def change_info(folder, **changes):
  path = folder / 'dataset_info.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_samples_are_those_of_our_own_builder(
  tfds_data_dir, mini_cityscapes_data_dir, split
):
  theirs = PreparedSplit('cityscapes', tfds_data_dir, split)
  ours = PreparedSplit('cityscapes_mini', mini_cityscapes_data_dir, split)
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


def test_tfrecord_is_refused_until_it_is_converted(
  data_dir, theirs, tfds_data_dir
):
  for path in theirs.glob('*.array_record*'):
    path.with_name(path.name.replace('array_record', 'tfrecord')).touch()
    path.unlink()
  change_info(theirs, fileFormat='tfrecord')
  command = f'tfds convert_format --dataset_version_dir={theirs} '
  told = f'(?s)tfds as tfrecord; .*{command}.*prepare cityscapes'
  refused(told, train, data_dir)
  # As that leaves it: two formats side by side.
  shutil.copytree(tfds_data_dir, data_dir, dirs_exist_ok=True)
  others = {'alternativeFileFormats': ['array_record']}
  change_info(theirs, fileFormat='tfrecord', **others)
  assert_equal(train(data_dir)[0], train(tfds_data_dir)[0])


def test_missing_file_and_other_features(data_dir, theirs):
  (theirs / 'cityscapes-test.array_record-00000-of-00001').unlink()
  refused('(?s)incomplete: .*-test.*tfds build', train, data_dir)
  path = theirs / 'features.json'
  path.write_text(path.read_text().replace('segmentation_label', 'depth'))
  refused('has no segmentation_label', train, data_dir)


def test_damaged_record_is_named(data_dir, theirs):
  path = theirs / 'cityscapes-train.array_record-00000-of-00001'
  data = path.read_bytes()
  third, half = len(data) // 3, len(data) // 2
  path.write_bytes(data[:third] + bytes(half - third) + data[half:])
  refused('semantic_seg.*prepare it again', list, train(data_dir))


def test_values_of_no_class_are_refused(tfds_data_dir):
  """The builder of tfds has not looked at them."""
  split = train(tfds_data_dir)
  raw = split.raw(1)
  raw['mask'][5] = 40
  told = r'sample 1 of train in .* no class has: 40\.(?s:.*)tfds build'
  refused(told, split.labelled, 1, raw)
  # Values between the classes are deliberate; 255 is known.
  raw['mask'][:5], raw['mask'][5:] = 29, 255
  assert (split.labelled(1, raw)['label'] == 255).all()


def test_the_mini_data_set_is_never_theirs(tfds_data_dir):
  mini = 'cityscapes_mini', tfds_data_dir, 'train'
  refused('cityscapes_mini is not prepared', PreparedSplit, *mini)


def test_pixels_are_decoded_from_it(tfds_data_dir, data_dir):
  folder = prepare_raw('cityscapes', data_dir).parent.name
  assert folder == 'semantic_segmentation_raw'
  assert train(data_dir).decoded
  assert_equal(list(train(data_dir)), list(train(tfds_data_dir)))
