"""From the archive to samples: the builder, its checks, random access."""

import pickle
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from data.small_archives import (
  ADE20K,
  JPEG,
  PNG,
  ade20k_sample,
  decode,
  full,
  write_zip,
)
from numpy.testing import assert_equal

from resnest_jax.data import ade20k, archives
from resnest_jax.data.cityscapes import IMAGES, MASKS
from resnest_jax.data.datasets import open_split
from resnest_jax.errors import UserError
from resnest_jax.labels import ADE20K as LABELS

VALIDATION = ade20k_sample('ADE_val', 'validation')
BOTH = ade20k_sample() | VALIDATION


@pytest.fixture
def opened(tmp_path):
  """Opens an archive a.zip of these entries."""

  def opened(entries, comment=''):
    return ade20k.open_archive(write_zip(tmp_path / 'a.zip', entries, comment))

  return opened


@pytest.fixture(scope='module')
def archive(mini_archive):
  with zipfile.ZipFile(mini_archive) as archive:
    yield archive


@pytest.fixture(scope='module')
def train(mini_data_dir):
  return open_split('ade20k_mini', mini_data_dir, 'train')


# ---- Samples ---------------------------------------------------------------


def test_samples_are_those_of_the_archive_in_order(archive, train):
  assert train.labels is LABELS
  for i in (0, 10, 23):  # 10 is a grey JPEG.
    stem = f'training/ADE_train_{i + 1:08d}'
    bgr = decode(archive.read(f'{ADE20K}/images/{stem}.jpg'), cv2.IMREAD_COLOR)
    mask = decode(archive.read(f'{ADE20K}/annotations/{stem}.png'))
    # In 8 bits, 0 - 1 is 255: "other" becomes the ignored id.
    label = mask - np.uint8(1)
    name = stem.removeprefix('training/')
    expected = {'image': bgr[..., ::-1], 'label': label, 'name': name}
    assert_equal(train[i], expected)
    assert train[i]['image'].dtype == train[i]['label'].dtype == np.uint8


def test_bytes_are_stored_unchanged(archive, mini_data_dir):
  builder = ade20k.Ade20k(config='mini', data_dir=mini_data_dir)
  skip = tfds.decode.SkipDecoding()
  stored = builder.as_data_source(
    'validation', decoders={'image': skip, 'label': skip}
  )[2]
  stem = 'validation/ADE_val_00000003'
  assert stored['image'] == archive.read(f'{ADE20K}/images/{stem}.jpg')
  assert stored['label'] == archive.read(f'{ADE20K}/annotations/{stem}.png')
  assert (stored['height'], stored['width']) == decode(stored['label']).shape


def test_threads_share_a_split_and_it_pickles(train):
  copy = pickle.loads(pickle.dumps(train))
  with ThreadPoolExecutor(8) as pool:
    samples = list(pool.map(copy.__getitem__, list(range(24)) * 4))
  assert_equal(samples, [train[i] for i in range(24)] * 4)
  for index in (24, -1):
    with pytest.raises(IndexError, match=r'0 \.\. 23'):
      copy[index]


# ---- What cannot be opened -------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'split', 'message'),
  [
    ('ade20k_mini', 'val', r"'val'.*train, validation"),
    ('coco', 'train', r"'coco'.*ade20k, ade20k_mini"),
  ],
)
def test_unknown_names_list_the_known(mini_data_dir, name, split, message):
  with pytest.raises(UserError, match=message):
    open_split(name, mini_data_dir, split)


def test_unprepared_data_says_the_command(tmp_path):
  missing = tmp_path / 'nowhere'
  with pytest.raises(
    UserError,
    match=(
      '(?s)prepare cityscapes --archive_dir FOLDER --data_dir '
      f'{missing}\n.*{IMAGES} and {MASKS} from'
    ),
  ):
    open_split('cityscapes', missing, 'train')
  assert not missing.exists()


def test_missing_record_file(data_dir):
  for path in data_dir.glob('ade20k/mini/1.0.0/*-validation.*'):
    path.unlink()
  with pytest.raises(UserError, match=r'incomplete.*validation.*Delete'):
    open_split('ade20k_mini', data_dir, 'train')


def test_damaged_records_name_the_sample(damaged_dir):
  split = open_split('ade20k_mini', damaged_dir, 'train')
  with pytest.raises(UserError, match=r'(sample|ADE_train).*split train'):
    list(split)


# ---- What is no archive ----------------------------------------------------


def write_tar(path):
  with tarfile.open(path, 'w') as archive:
    archive.add(__file__)


@pytest.mark.parametrize(
  ('write', 'message'),
  [
    (lambda path: None, r'no file .*a\.zip.*Get ADE'),
    (lambda path: path.mkdir(), 'is a folder'),
    (lambda path: path.write_bytes(b'PK'), r'a\.zip.*interrupted.*again'),
    (write_tar, 'is a tar archive'),
  ],
)
def test_files_that_are_no_archive(tmp_path, write, message):
  write(tmp_path / 'a.zip')
  with pytest.raises(UserError, match=message):
    ade20k.open_archive(tmp_path / 'a.zip')


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('ADE20K_2021_17_01/images/ADE/training/urban/a_seg.png', 'full ADE20K'),
    (f'{ADE20K}/annotations_instance/training/a.png', 'instance annotations'),
    ('release_test/testing/ADE_test_1.jpg', 'test images'),
    ('holiday/1.jpg', r'first file is holiday/1\.jpg'),
    (None, 'has no files'),
  ],
)
def test_other_releases_are_told_apart(opened, name, message):
  archive = opened({name: b''} if name else {})
  with pytest.raises(UserError, match=f'a.zip .*{message}.*Get ADE'):
    ade20k.find_pairs(archive)


def test_foreign_files_are_left_alone(opened):
  files = ('', '._ADE_train_00000001.jpg', 'Thumbs.db')
  foreign = [f'{ADE20K}/images/training/{file}' for file in files]
  foreign += [f'__MACOSX/{ADE20K}/images/training/ADE_train_00000002.jpg']
  pairs = ade20k.find_pairs(opened(dict.fromkeys(foreign, b'') | BOTH))
  expected = {'train': ade20k_sample(), 'validation': VALIDATION}
  assert pairs == {split: [tuple(x)] for split, x in expected.items()}


@pytest.mark.parametrize(
  ('comment', 'message'),
  [
    ('', 'not a mini archive'),
    ('{"images": 3}', 'not a mini archive'),
    (
      '{"images": {"train": 9, "validation": 1}}',
      '1 training and 1 validation images, expected 9 and 1',
    ),
  ],
)
def test_counts_of_a_mini_archive(opened, comment, message):
  archive = opened(BOTH, comment)
  with pytest.raises(UserError, match=message):
    ade20k.check_counts(archive, ade20k.find_pairs(archive), None)


def test_fingerprint_is_of_the_contents(opened):
  one = archives.fingerprint(opened(BOTH))
  reordered = opened(dict(reversed(BOTH.items())), 'a comment')
  assert archives.fingerprint(reordered) == one
  other = opened(BOTH | ade20k_sample(png=PNG[:-1] + b'\0'))
  assert archives.fingerprint(other) != one


# ---- What is no sample -----------------------------------------------------


@pytest.mark.parametrize(
  ('png', 'message'),
  [
    # Colour type 3 in the header.
    (PNG[:25] + b'\3' + PNG[26:], '8-bit palette picture'),
    (full((4, 6), 1, np.uint16), '16-bit grey picture'),
    (full((4, 6), 151), 'has the value 151'),
    (JPEG, 'is not a PNG'),
    (PNG[:-8], 'cannot be decoded'),
  ],
)
def test_mask_that_is_no_index_mask(png, message):
  assert ade20k.read_mask(full((4, 6), 150), '').max() == 150
  with pytest.raises(UserError, match=f'my.zip: m.png.*{message}'):
    ade20k.read_mask(png, 'my.zip: m.png')


@pytest.mark.parametrize(
  ('sample', 'message'),
  [
    ({'png': full((6, 4), 1)}, '6 x 4 pixels, its mask 4 x 6'),
    ({'jpeg': b'no picture'}, 'cannot be decoded'),
  ],
)
def test_sample_that_does_not_fit(opened, sample, message):
  archive = opened(ade20k_sample(**sample))
  with pytest.raises(UserError, match=f'ADE_train_00000001.jpg.*{message}'):
    ade20k.read_example(archive, tuple(archive.namelist()))


def test_damaged_entry(tmp_path):
  path = write_zip(tmp_path / 'a.zip', ade20k_sample())
  data = bytearray(path.read_bytes())
  data[data.find(JPEG) + 30] ^= 0xFF
  path.write_bytes(data)
  archive = ade20k.open_archive(path)
  with pytest.raises(UserError, match=r'a.zip is damaged at .*_00000001.jpg'):
    ade20k.read_example(archive, tuple(archive.namelist()))
