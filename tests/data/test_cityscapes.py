"""Cityscapes: from the two zip files to samples."""

import zipfile

import numpy as np
import pytest
from data.small_archives import (
  ONE_OF_EACH,
  STREETS,
  decode,
  encode,
  full,
  image_name,
  mask_name,
  write_cityscapes,
  write_zip,
)
from numpy.testing import assert_equal

from resnest_jax.data import cityscapes
from resnest_jax.data.archives import ArchiveConfig
from resnest_jax.data.cityscapes import IMAGES, MASKS, Cityscapes
from resnest_jax.data.datasets import DATASETS, open_split
from resnest_jax.data.prepare import prepare
from resnest_jax.errors import UserError
from resnest_jax.labels import CITYSCAPES

MINI = DATASETS['cityscapes_mini']
# The class of each of the 34 label ids, copied by hand from labels.py of
# cityscapesScripts; 255: not evaluated.
TRAIN_IDS = [
  *[255] * 7,
  *(0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7),
  *(8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18),
]


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


@pytest.fixture(scope='module')
def archives(mini_cityscapes_archives):
  with (
    zipfile.ZipFile(mini_cityscapes_archives / IMAGES) as images,
    zipfile.ZipFile(mini_cityscapes_archives / MASKS) as masks,
  ):
    yield images, masks


@pytest.mark.parametrize(
  ('split', 'folder', 'count'),
  [('train', 'train', 12), ('validation', 'val', 4), ('test', 'test', 1)],
)
def test_samples_are_those_of_the_archives_in_order(
  archives, mini_cityscapes_data_dir, split, folder, count
):
  samples = open_split('cityscapes_mini', mini_cityscapes_data_dir, split)
  names = [name for name in archives[0].namelist() if f'/{folder}/' in name]
  assert len(samples) == len(names) == count
  for sample, name in zip(samples, sorted(names), strict=True):
    assert f'/{sample["name"]}_leftImg8bit.png' in name
    bgr = decode(archives[0].read(name))
    mask = decode(archives[1].read(mask_name(sample['name'], folder)))
    assert_equal(sample['image'], bgr[..., ::-1])
    assert_equal(sample['label'], np.array([*TRAIN_IDS, *[255] * 222])[mask])
    assert sample['label'].dtype == np.uint8
  assert samples.labels is CITYSCAPES
  assert (sample['label'] == 255).all() == (split == 'test')


def test_label_ids_become_train_ids(tmp_path):
  ids = np.array([[*range(34), 255, *[0] * 13]], np.uint8).reshape(3, 16)
  write_cityscapes(tmp_path, size=(16, 3), mask=encode(ids))
  prepare(MINI, tmp_path / 'data', tmp_path)
  sample = open_split('cityscapes_mini', tmp_path / 'data', 'train')[0]
  assert sample['label'].ravel().tolist() == TRAIN_IDS + [255] * 14
  assert sample['name'] == 'ulm_1_9'


def test_unprepared_data_names_the_files(tmp_path):
  with pytest.raises(UserError) as error:
    open_split('cityscapes', tmp_path, 'train')
  *_, hint = str(error.value).splitlines()
  for word in (IMAGES, MASKS, 'cityscapes-dataset.com'):
    assert word in hint


def test_prepared_once(mini_cityscapes_archives, tmp_path, capsys):
  prepare(MINI, tmp_path, mini_cityscapes_archives)
  prepare(MINI, tmp_path, mini_cityscapes_archives)
  assert 'Already prepared' in capsys.readouterr().out
  with pytest.raises(UserError, match=r'another archive.*Nothing was'):
    prepare(MINI, tmp_path, write_cityscapes(tmp_path))


# ---- What is not the two archives ------------------------------------------


def test_missing_folder_and_file(tmp_path):
  assert 'there is no folder' in error_of(tmp_path / 'none')
  (tmp_path / 'a.zip').write_bytes(b'')
  assert 'is a file' in error_of(tmp_path / 'a.zip')


@pytest.mark.parametrize('missing', [IMAGES, MASKS])
def test_one_archive_is_missing(tmp_path, missing):
  write_cityscapes(tmp_path)
  (tmp_path / missing).rename(tmp_path / 'gtCoarse.zip')
  message = error_of(tmp_path)
  assert f'has no {missing}; its zip files are g' in message
  assert 'gtCoarse.zip' in message


def test_unpacked_archives(tmp_path):
  (tmp_path / 'leftImg8bit').mkdir()
  (tmp_path / 'gtFine').mkdir()
  assert 'unpacked leftImg8bit and gtFine' in error_of(tmp_path)


@pytest.mark.parametrize('name', [IMAGES, MASKS])
def test_truncated_archive(tmp_path, name):
  path = write_cityscapes(tmp_path) / name
  path.write_bytes(path.read_bytes()[:200])
  message = error_of(tmp_path)
  assert f'{name} is not a readable zip file' in message
  assert cityscapes.SHA1[name] in message


@pytest.mark.parametrize(
  ('file', 'name', 'message'),
  [
    (MASKS, 'gtCoarse/train/ulm/a_gtCoarse_labelIds.png', 'coarse annot'),
    (MASKS, mask_name('ulm_1_9', kind='labelTrainIds'), 'masks of train ids'),
    (MASKS, image_name('ulm_1_9'), 'first file is leftImg8bit/train/ulm'),
    (IMAGES, 'leftImg8bit/train_extra/a/a_leftImg8bit.png', 'extra images'),
    (IMAGES, 'leftImg16bit/train/ulm/a_leftImg16bit.png', '16-bit images'),
    (IMAGES, 'rightImg8bit/train/ulm/a_rightImg8bit.png', 'right camera'),
    (IMAGES, None, 'it has no files'),
  ],
)
def test_other_packages_are_told_apart(tmp_path, file, name, message):
  write_cityscapes(tmp_path)
  write_zip(tmp_path / file, {name: b''} if name else {})
  assert message in error_of(tmp_path)


ONE, LONELY = 'lindau_1_9', 'zurich_5_9'


@pytest.mark.parametrize(
  ('kind', 'sample', 'content', 'message'),
  [
    ('images', LONELY, full((4, 8, 3), 0), '1 val samples have no mask, the f'),
    ('masks', LONELY, full((4, 8), 7), 'a mask but no image, the first is zur'),
    ('masks', ONE, full((4, 8), 34), 'has the value 34; the masks of this'),
    ('masks', ONE, full((4, 8, 3), 7), 'is a 8-bit RGB picture'),
    ('masks', ONE, full((4, 8), 7, np.uint16), 'is a 16-bit grey picture'),
    ('masks', ONE, full((2, 4), 7), 'its mask 4 x 2'),
    ('images', ONE, full((4, 8), 0), 'is a 8-bit grey picture; the images'),
    (
      *('images', ONE, full((4, 8, 3), 0, np.uint16)),
      'is a 16-bit RGB picture; the images',
    ),
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


def test_counts_of_the_release(tmp_path):
  counts = {'train': 2975, 'val': 500, 'test': 1525}
  names = [
    (name(f'ulm_{i:06d}_000019', split), name(STREETS[split], split))
    for name in (image_name, mask_name)
    for split, count in counts.items()
    for i in range(count)
  ]
  half = len(names) // 2
  write_cityscapes(
    tmp_path,
    *(
      dict.fromkeys((x for x, _ in part), b'') | {x: None for _, x in part}
      for part in (names[:half], names[half:])
    ),
  )
  pairs = contents_of(tmp_path, cityscapes.RELEASE).pairs
  assert [*map(len, pairs.values())] == [2975, 500, 1525]
  assert pairs['test'][1524] == (names[half - 1][0], names[-1][0])


def test_other_counts_than_the_release(tmp_path):
  write_cityscapes(tmp_path, comment='')
  assert (
    'has 1 train, 1 val and 1 test images, expected 2975, 500 and 1525'
  ) in error_of(tmp_path, cityscapes.RELEASE)
  with pytest.raises(UserError, match=r'not a mini City.*mini_citys.* --out'):
    contents_of(tmp_path)
  write_cityscapes(tmp_path)
  # A generated one says so.
  message = error_of(tmp_path, cityscapes.RELEASE)
  assert 'Prepare it as cityscapes_mini' in message
  config = ArchiveConfig(name='large', counts=ONE_OF_EACH, size=(2048, 1024))
  message = error_of(tmp_path, config)
  assert 'has 8 x 4 pixels, the release 2048 x 1024' in message


def test_damage_found_late_leaves_nothing_behind(tmp_path):
  name = mask_name('bonn_1_9', 'test')
  write_cityscapes(tmp_path, masks={name: b'bad'})
  with pytest.raises(UserError, match=r'bonn_1_9_gtFine.* is not a PNG'):
    prepare(MINI, tmp_path / 'data', tmp_path)
  assert list((tmp_path / 'data').glob('cityscapes/mini/*')) == []
