"""Cityscapes: from the two zip files to samples."""

import json
import zipfile

import cv2
import numpy as np
import pytest
from data import small_archives
from data.small_archives import full, image_name, mask_name, write_cityscapes
from numpy.testing import assert_equal

from resnest_jax.data import cityscapes
from resnest_jax.data.archives import ArchiveConfig
from resnest_jax.data.cityscapes import IMAGES, MASKS, Cityscapes
from resnest_jax.data.datasets import open_split
from resnest_jax.errors import UserError
from resnest_jax.labels import CITYSCAPES

COUNTS = small_archives.ONE_OF_EACH


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
  samples = open_split('cityscapes_mini', mini_cityscapes_data_dir, split)
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


def test_folders_without_the_archives(tmp_path):
  assert 'there is no folder' in error_of(tmp_path / 'none')
  (tmp_path / 'gtFine').mkdir()
  assert 'the unpacked gtFine' in error_of(tmp_path)
  write_cityscapes(tmp_path)
  assert 'is a file' in error_of(tmp_path / IMAGES)
  (tmp_path / MASKS).rename(tmp_path / 'gtCoarse.zip')
  assert f'has no {MASKS}; its zip files are gtCoarse.' in error_of(tmp_path)


def test_builder_without_the_archives_downloads_nothing(tmp_path):
  builder = Cityscapes(config=cityscapes.MINI, data_dir=tmp_path)
  with pytest.raises(UserError, match='cityscapes/mini cannot be downloaded'):
    builder.download_and_prepare()


def test_truncated_archive(tmp_path):
  path = write_cityscapes(tmp_path) / IMAGES
  path.write_bytes(path.read_bytes()[:200])
  message = error_of(tmp_path)
  assert f'{IMAGES} is not a readable zip file' in message
  assert cityscapes.SHA1[IMAGES] in message


@pytest.mark.parametrize(
  ('file', 'name', 'message'),
  [
    (MASKS, 'gtCoarse/train/ulm/a_gtCoarse_labelIds.png', 'coarse annot'),
    (MASKS, mask_name('ulm_1_9', kind='labelTrainIds'), 'masks of train ids'),
    (MASKS, image_name('ulm_1_9'), 'first file is leftImg8bit/train/ulm'),
    (IMAGES, None, 'it has no files'),
  ],
)
def test_other_packages_are_told_apart(tmp_path, file, name, message):
  write_cityscapes(tmp_path)
  small_archives.write_zip(tmp_path / file, {name: b''} if name else {})
  assert message in error_of(tmp_path)


ONE, LONELY = 'lindau_1_9', 'zurich_5_9'


@pytest.mark.parametrize(
  ('kind', 'sample', 'content', 'message'),
  [
    ('images', LONELY, full((4, 8, 3), 0), '1 val samples have no mask, the f'),
    ('masks', LONELY, full((4, 8), 7), 'a mask but no image, the first is zur'),
    ('masks', ONE, full((4, 8), 34), 'has the value 34; the masks of this'),
    ('masks', ONE, full((4, 8, 3), 7), 'is a 8-bit RGB picture'),
    ('images', ONE, full((4, 8), 0), 'is a 8-bit grey picture; the images'),
    ('images', ONE, full((4, 8, 3), 0, np.uint16), 'is a 16-bit RGB picture'),
    ('images', ONE, full((2, 4, 3), 0), 'its mask 8 x 4'),
  ],
)
def test_file_that_does_not_fit(tmp_path, kind, sample, content, message):
  name = {'images': image_name, 'masks': mask_name}[kind](sample, 'val')
  error = error_of(write_cityscapes(tmp_path, **{kind: {name: content}}))
  assert message in error
  assert sample in error


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


def test_masks_may_have_licence_plates(tmp_path):
  """Their label id -1 is 255 in 8 bits."""
  read_all(contents_of(write_cityscapes(tmp_path, mask=full((4, 8), 255))))


def test_other_counts_or_sizes_than_the_release(tmp_path):
  write_cityscapes(tmp_path, comment='')
  message = '1 train, 1 val and 1 test images, expected 2975, 500 and 1525'
  assert message in error_of(tmp_path, cityscapes.RELEASE)
  with pytest.raises(UserError, match=r'not a mini City.*mini_citys.* --out'):
    contents_of(tmp_path)
  for size in ([1e999, 4], ['8', 4], [8], {'8': 4}, [10**12, 4], '['):
    comment = json.dumps({'images': COUNTS, 'size': size})
    write_cityscapes(tmp_path, comment=comment.replace('"["', '[' * 60_000))
    with pytest.raises(UserError, match='not a mini Cityscapes'):
      contents_of(tmp_path)
  write_cityscapes(tmp_path)  # A generated one says so.
  remedy = 'Prepare it as cityscapes_mini'
  assert remedy in error_of(tmp_path, cityscapes.RELEASE)
  config = ArchiveConfig(name='large', counts=COUNTS, size=(2048, 1024))
  message = error_of(tmp_path, config)
  assert 'has 8 x 4 pixels, the release 2048 x 1024' in message
