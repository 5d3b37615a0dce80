"""From the archive to samples: the builder, its checks, random access."""

import os
import struct
import tarfile
import zipfile

import cv2
import numpy as np
import pytest
from data.pictures import claiming
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
def train(mini_data_dir):
  return open_split('ade20k_mini', mini_data_dir, 'train')


# ---- Samples ---------------------------------------------------------------


def test_samples_are_those_of_the_archive_in_order(mini_archive, train):
  archive = zipfile.ZipFile(mini_archive)
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


@pytest.mark.parametrize('index', [24, -1])
def test_index_out_of_range(train, index):
  with pytest.raises(IndexError, match=r'0 \.\. 23'):
    train[index]


# ---- What cannot be opened -------------------------------------------------


def test_unknown_names_list_the_known(mini_data_dir):
  with pytest.raises(UserError, match=r"'val'.*train, validation"):
    open_split('ade20k_mini', mini_data_dir, 'val')
  with pytest.raises(UserError, match=r"'coco'.*ade20k, ade20k_mini"):
    open_split('coco', mini_data_dir, 'train')


def test_unprepared_data_says_the_command(tmp_path):
  missing = tmp_path / 'nowhere'
  command = f'--archive_dir FOLDER --data_dir {missing}\n.*{IMAGES} and {MASKS}'
  with pytest.raises(UserError, match=f'prepare cityscapes {command} from'):
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
    ('{"images": {"train": 9, "validation": 1}}', '1 .* and 1 .* 9 and 1'),
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


def test_image_that_is_no_picture(opened):
  archive = opened(ade20k_sample(jpeg=b'no picture'))
  with pytest.raises(UserError, match=r'_00000001.jpg cannot be decoded'):
    ade20k.read_example(archive, tuple(archive.namelist()))


def test_damaged_entry(tmp_path):
  path = write_zip(tmp_path / 'a.zip', ade20k_sample())
  data = bytearray(path.read_bytes())
  data[data.find(JPEG) + 30] ^= 0xFF
  path.write_bytes(data)
  archive = ade20k.open_archive(path)
  with pytest.raises(UserError, match=r'a.zip is damaged at .*_00000001.jpg'):
    ade20k.read_example(archive, tuple(archive.namelist()))


def entry_of(path, **options):
  """The archive with the first image stored as the options say."""
  jpeg, png = ade20k_sample()
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr(jpeg, options.pop('content', JPEG), **options)
    archive.writestr(png, PNG)
  return ade20k.open_archive(path)


def test_entries_that_would_fill_the_memory(tmp_path):
  deflated = {'compress_type': zipfile.ZIP_DEFLATED}
  bomb = entry_of(tmp_path / 'a.zip', content=bytes(2**24 + 1), **deflated)
  assert (tmp_path / 'a.zip').stat().st_size < 20_000
  with pytest.raises(UserError, match=r'unpack from \d+ to 16777217 bytes'):
    ade20k.read_example(bomb, tuple(bomb.namelist()))
  # Of these methods zipfile unpacks all, whatever the header says.
  for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    other = entry_of(tmp_path / 'b.zip', compress_type=method)
    with pytest.raises(
      UserError, match=r'b\.zip: .*jpg is compressed in anoth'
    ):
      ade20k.read_example(other, tuple(other.namelist()))
  # As the message says, zipped again.
  usual = entry_of(tmp_path / 'c.zip', **deflated)
  assert ade20k.read_example(usual, tuple(usual.namelist()))['image'] == JPEG


def changed_headers(path, offset, value):
  """Writes 16 bits into all entries' headers, at places of the central one."""
  content = bytearray(path.read_bytes())
  for signature, shift in ((b'PK\1\2', 0), (b'PK\3\4', -2)):
    place = -1
    while (place := content.find(signature, place + 1)) >= 0:
      struct.pack_into('<H', content, place + offset + shift, value)
  path.write_bytes(content)


def test_entries_with_passwords_and_unknown_methods(tmp_path):
  for offset, value, message in (
    (8, 1, r'damaged at .*encrypted, password required'),
    (10, 77, r'is compressed in another way'),
  ):
    path = write_zip(tmp_path / 'a.zip', ade20k_sample())
    changed_headers(path, offset, value)
    archive = ade20k.open_archive(path)
    with pytest.raises(UserError, match=message):
      ade20k.read_example(archive, tuple(archive.namelist()))
  # A format of the far future, and a pipe that nobody fills.
  changed_headers(write_zip(path, ade20k_sample()), 6, 999)
  with pytest.raises(UserError, match=r'a\.zip is not a readable zip file'):
    ade20k.open_archive(path)
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(UserError, match=r'there is no file .*a\.zip'):
    ade20k.open_archive(path)


def test_pictures_that_claim_to_be_large(opened):
  huge = claiming(60_000, 60_000)
  sizes = [struct.pack('>II', *x) for x in ((6, 4), (60_000, 60_000))]
  for what, told in (
    (
      {'jpeg': huge['JPEG']},
      r'jpg is 60000 x 60000 pixels, .*\n.*from its origin',
    ),
    ({'png': PNG.replace(*sizes)}, 'png is 60000 x 60000 pixels'),
  ):
    archive = opened(ade20k_sample(**what))
    with pytest.raises(UserError, match=told):
      ade20k.read_example(archive, tuple(archive.namelist()))
