"""From the archive to samples: the builder, its checks, random access."""

import os
import re
import struct
import tarfile
import zipfile

import cv2
import numpy as np
import pytest
from data import small_archives as small
from data.pictures import claiming
from data.refusals import refused
from data.small_archives import ADE20K, JPEG, PNG, ade20k_sample, write_zip
from numpy.testing import assert_equal

from resnest_jax.data import ade20k, archives
from resnest_jax.data.cityscapes import IMAGES, MASKS
from resnest_jax.data.datasets import PreparedSplit
from resnest_jax.labels import ADE20K as LABELS

VALIDATION = ade20k_sample('ADE_val', 'validation')
BOTH = ade20k_sample() | VALIDATION
HUGE = claiming(60_000, 60_000)['JPEG']
SIZES = [struct.pack('>II', *x) for x in ((6, 4), (60_000, 60_000))]


@pytest.fixture
def opened(tmp_path):
  """Opens an archive a.zip of these entries."""
  return lambda *entries, **options: archives.open_archive(
    write_zip(tmp_path / 'a.zip', *entries, **options)
  )


def open_contents(path):
  return ade20k.Ade20k.open_contents(ade20k.MINI, path)


# ---- Samples ---------------------------------------------------------------


def test_samples_are_those_of_the_archive_in_order(mini_archive, mini_data_dir):
  train = PreparedSplit('ade20k_mini', mini_data_dir, 'train')
  archive = zipfile.ZipFile(mini_archive)
  assert train.labels is LABELS
  for i in (0, 10, 23):  # 10 is a grey JPEG.
    stem = f'training/ADE_train_{i + 1:08d}'
    jpeg = archive.read(f'{ADE20K}/images/{stem}.jpg')
    mask = small.decode(archive.read(f'{ADE20K}/annotations/{stem}.png'))
    # In 8 bits, 0 - 1 is 255: "other" becomes the ignored id.
    label, name = mask - np.uint8(1), stem.removeprefix('training/')
    image = small.decode(jpeg, cv2.IMREAD_COLOR_RGB)
    assert_equal(train[i], {'image': image, 'label': label, 'name': name})
    assert train[i]['image'].dtype == train[i]['label'].dtype == np.uint8
  for index in (24, -1):
    with pytest.raises(IndexError, match=rf'{index} is not in 0 \.\. 23'):
      train[index]


# ---- What cannot be opened -------------------------------------------------


def test_unknown_names_list_the_known(mini_data_dir):
  split, name = ('ade20k_mini', mini_data_dir, 'val'), ('coco', '', 'train')
  refused("'val'.*train, validation", PreparedSplit, *split)
  refused("'coco'.*ade20k, ade20k_mini", PreparedSplit, *name)


def test_unprepared_data_says_the_command(tmp_path):
  missing = tmp_path / 'nowhere'
  command = 'prepare cityscapes --archive_dir FOLDER --data_dir'
  told = f'{command} {missing}\n.*{IMAGES} and {MASKS} from'
  refused(told, PreparedSplit, 'cityscapes', missing, 'train')
  assert not missing.exists()


def test_missing_record_file(data_dir):
  (path,) = data_dir.glob('ade20k/mini/1.0.0/*-validation.*')
  path.unlink()
  told = 'incomplete.*validation.*Delete'
  refused(told, PreparedSplit, 'ade20k_mini', data_dir, 'train')


def test_damaged_records_name_the_sample(damaged_dir):
  split = PreparedSplit('ade20k_mini', damaged_dir, 'train')
  refused('(sample|ADE_train).*split train', list, split)


# ---- What is no archive ----------------------------------------------------


NO_ARCHIVES = [
  (lambda path: None, r'no file .*a\.zip.*Get ADE'),
  (lambda path: path.mkdir(), 'is a folder'),
  (lambda path: path.write_bytes(b'PK'), r'a\.zip.*interrupted.*again'),
  (lambda path: tarfile.open(path, 'w').close(), 'is a tar archive'),
  # A pipe that nobody fills.
  (os.mkfifo, r'there is no file .*a\.zip'),
]


@pytest.mark.parametrize(('write', 'message'), NO_ARCHIVES)
def test_files_that_are_no_archive(tmp_path, write, message):
  write(tmp_path / 'a.zip')
  refused(message, open_contents, tmp_path / 'a.zip')


OTHERS = [
  ('ADE20K_2021_17_01/images/ADE/training/urban/a_seg.png', 'full ADE20K'),
  (f'{ADE20K}/annotations_instance/training/a.png', 'instance annotations'),
  ('release_test/testing/ADE_test_1.jpg', 'test images'),
  ('holiday/1.jpg', r'first file is holiday/1\.jpg'),
  (None, 'has no files'),
]


@pytest.mark.parametrize(('name', 'message'), OTHERS)
def test_other_releases_are_told_apart(opened, name, message):
  archive = opened({name: b''} if name else {})
  refused(f'a.zip .*{message}.*Get ADE', open_contents, archive.filename)


def test_foreign_files_are_left_alone(opened):
  files = ('', '._ADE_train_00000001.jpg', 'Thumbs.db')
  foreign = [f'{ADE20K}/images/training/{file}' for file in files]
  foreign += [f'__MACOSX/{ADE20K}/images/training/ADE_train_00000002.jpg']
  comment = '{"images": {"train": 1, "validation": 1}}'
  one = open_contents(opened(BOTH, comment).filename)
  archive = opened(dict.fromkeys(foreign, b'') | BOTH, comment)
  found = open_contents(archive.filename)
  assert found.fingerprint == one.fingerprint
  expected = {'train': ade20k_sample(), 'validation': VALIDATION}
  assert found.pairs == {split: [tuple(x)] for split, x in expected.items()}


COMMENTS = [
  ('', 'not a mini archive'),
  ('{"images": 3}', 'not a mini archive'),
  ('{"images": {"train": 1e999, "validation": 1}}', 'not a mini archive'),
  ('{"images": {"train": "9", "validation": 1}}', 'not a mini archive'),
  ('{"images": {"train": -9, "validation": 1}}', 'not a mini archive'),
  ('[' * 60_000, 'not a mini archive'),
  ('{"images": {"train": 9, "validation": 1}}', '1 .* and 1 .* 9 and 1'),
]


@pytest.mark.parametrize(('comment', 'message'), COMMENTS)
def test_counts_of_a_mini_archive(opened, comment, message):
  refused(message, open_contents, opened(BOTH, comment).filename)


def test_fingerprint_is_of_the_contents(opened):
  pairs = {'train': [tuple(BOTH)[:2], tuple(BOTH)[2:]]}
  one = archives.fingerprint(pairs, opened(BOTH))
  reordered = opened(dict(reversed(BOTH.items())), 'a comment')
  assert archives.fingerprint(pairs, reordered) == one
  other = opened(BOTH | ade20k_sample(png=PNG[:-1] + b'\0'))
  assert archives.fingerprint(pairs, other) != one


# ---- What is no sample -----------------------------------------------------


def read(archive):
  """The only example of an archive."""
  return ade20k.read_example(archive, tuple(archive.namelist()))


NO_SAMPLES = [
  # Colour type 3 in the header.
  ({'png': PNG[:25] + b'\3' + PNG[26:]}, 'png is a 8-bit palette picture'),
  ({'png': small.full((4, 6), 1, np.uint16)}, 'png is a 16-bit grey picture'),
  ({'png': small.full((4, 6), 151)}, 'png has the value 151'),
  ({'png': JPEG}, 'png is not a PNG'),
  ({'png': PNG[:-8]}, 'png cannot be decoded'),
  ({'png': PNG.replace(*SIZES)}, 'png is 60000 x 60000 pixels'),
  ({'jpeg': b'no picture'}, 'jpg cannot be decoded'),
  ({'jpeg': HUGE}, r'jpg is 60000 x 60000 pixels, .*\n.*from its origin'),
]


@pytest.mark.parametrize(('sample', 'message'), NO_SAMPLES)
def test_pictures_that_are_no_sample(opened, sample, message):
  archive = opened(ade20k_sample(**sample))
  refused(rf'a\.zip: .*_00000001\.{message}', read, archive)


def test_entries_that_would_fill_the_memory(opened, tmp_path):
  large = ade20k_sample(jpeg=bytes(2**24 + 1))
  bomb = opened(large, method=zipfile.ZIP_DEFLATED)
  assert (tmp_path / 'a.zip').stat().st_size < 20_000
  refused(r'unpack from \d+ to 16777217 bytes', read, bomb)
  # Of these methods zipfile unpacks all, whatever the header says.
  for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    other = opened(ade20k_sample(), method=method)
    refused('p: .*jpg is compressed in another', read, other)
  # As the message says, zipped again.
  largest = small.full((4, 6), 150)  # Also of what masks hold.
  usual = opened(ade20k_sample(png=largest), method=zipfile.ZIP_DEFLATED)
  example = {'image': JPEG, 'label': largest, 'name': 'ADE_train_00000001'}
  assert read(usual) == example | {'height': 4, 'width': 6}


# Format, flags, method and checksum.
HEADERS = [
  (6, 999, 'is not a readable zip file'),
  (8, 1, r': .*jpg is protected by a password\.'),
  (10, 77, ': .*jpg is compressed in another way'),
  (16, 0, r'is damaged at .*_00000001\.jpg'),
]


@pytest.mark.parametrize(('offset', 'value', 'message'), HEADERS)
def test_headers_of_entries(tmp_path, offset, value, message):
  """16 bits of all headers, at this place of the central ones."""
  path = write_zip(tmp_path / 'a.zip', ade20k_sample())
  content = bytearray(path.read_bytes())
  for signature, shift in ((b'PK\1\2', 0), (b'PK\3\4', -2)):
    for found in re.finditer(signature, bytes(content)):
      struct.pack_into('<H', content, found.start() + offset + shift, value)
  path.write_bytes(content)
  refused(rf'a\.zip ?{message}', lambda: read(archives.open_archive(path)))
