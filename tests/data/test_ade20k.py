"""From the archive to samples: the builder, its checks, random access."""

import pickle
import shutil
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from resnest_jax.data import ade20k, archives
from resnest_jax.data.ade20k import Ade20k
from resnest_jax.data.datasets import open_split
from resnest_jax.errors import UserError

ROOT = 'ADEChallengeData2016'


def encode(extension, image):
  return cv2.imencode(extension, np.asarray(image, np.uint8))[1].tobytes()


JPEG = encode('.jpg', np.full((4, 6, 3), 128))
PNG = encode('.png', np.ones((4, 6)))


def sample_entries(prefix='ADE_train', folder='training', jpeg=JPEG, png=PNG):
  """The zip entries of one sample."""
  return {
    f'{ROOT}/images/{folder}/{prefix}_00000001.jpg': jpeg,
    f'{ROOT}/annotations/{folder}/{prefix}_00000001.png': png,
  }


VALIDATION = sample_entries('ADE_val', 'validation')


def write_zip(path, entries, comment=b''):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.comment = comment
    for name, data in entries.items():
      archive.writestr(name, data)
  return ade20k.open_archive(path)


@pytest.fixture(scope='module')
def archive(mini_archive):
  with zipfile.ZipFile(mini_archive) as archive:
    yield archive


@pytest.fixture(scope='module')
def train(mini_data_dir):
  return open_split('ade20k_mini', mini_data_dir, 'train')


# ---- Samples ---------------------------------------------------------------


def test_samples_are_those_of_the_archive_in_order(archive, train):
  assert len(train) == 24
  for i in (0, 7, 23):
    sample = train[i]
    stem = f'ADE_train_{i + 1:08d}'
    assert sample['name'] == stem
    jpeg = archive.read(f'{ROOT}/images/training/{stem}.jpg')
    bgr = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(sample['image'], bgr[..., ::-1])
    png = archive.read(f'{ROOT}/annotations/training/{stem}.png')
    mask = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    # In 8 bits, 0 - 1 is 255: "other" becomes the ignored id.
    np.testing.assert_array_equal(sample['label'], mask - np.uint8(1))
    assert sample['image'].dtype == sample['label'].dtype == np.uint8


def test_validation_split(mini_data_dir):
  split = open_split('ade20k_mini', mini_data_dir, 'validation')
  names = [split[i]['name'] for i in range(len(split))]
  assert names == [f'ADE_val_{i:08d}' for i in range(1, 9)]
  assert split.labels.classes[149] == 'flag'


def test_bytes_are_stored_unchanged(archive, mini_data_dir):
  builder = Ade20k(config='mini', data_dir=mini_data_dir)
  skip = tfds.decode.SkipDecoding()
  source = builder.as_data_source(
    'validation', decoders={'image': skip, 'label': skip}
  )
  stored = source[2]
  stem = 'ADE_val_00000003'
  image = archive.read(f'{ROOT}/images/validation/{stem}.jpg')
  assert stored['image'] == image
  label = archive.read(f'{ROOT}/annotations/validation/{stem}.png')
  assert stored['label'] == label
  height, width = cv2.imdecode(
    np.frombuffer(label, np.uint8), cv2.IMREAD_UNCHANGED
  ).shape
  assert (stored['height'], stored['width']) == (height, width)


def test_grey_jpeg_becomes_rgb(tmp_path):
  grey = encode('.jpg', np.arange(24).reshape(4, 6) * 10)
  archive = write_zip(tmp_path / 'a.zip', sample_entries(jpeg=grey))
  pair = tuple(archive.namelist())
  assert ade20k.read_example(archive, pair)['image'] == grey
  image = cv2.imdecode(np.frombuffer(grey, np.uint8), cv2.IMREAD_COLOR_RGB)
  assert image.shape == (4, 6, 3)


def test_pickled_split_reads_the_same(train):
  copy = pickle.loads(pickle.dumps(train))
  assert len(copy) == len(train)
  np.testing.assert_array_equal(copy[5]['image'], train[5]['image'])


def test_threads_may_share_a_split(train):
  with ThreadPoolExecutor(8) as pool:
    samples = list(pool.map(train.__getitem__, list(range(24)) * 4))
  for i, sample in enumerate(samples):
    assert sample['name'] == f'ADE_train_{i % 24 + 1:08d}'
    np.testing.assert_array_equal(sample['label'], train[i % 24]['label'])


@pytest.mark.parametrize('index', [24, -1])
def test_index_out_of_range(train, index):
  with pytest.raises(IndexError, match=r'0 \.\. 23'):
    train[index]


# ---- What cannot be opened -------------------------------------------------


def test_unknown_split_lists_splits(mini_data_dir):
  with pytest.raises(UserError, match=r"'val'.*train, validation"):
    open_split('ade20k_mini', mini_data_dir, 'val')


def test_unknown_data_set_lists_data_sets(mini_data_dir):
  with pytest.raises(UserError, match=r"'coco'.*ade20k, ade20k_mini"):
    open_split('coco', mini_data_dir, 'train')


@pytest.mark.parametrize(
  ('name', 'command'),
  [
    (
      'ade20k',
      'python -m resnest_jax.data.prepare ade20k '
      '--archive ADEChallengeData2016.zip --data_dir {}',
    ),
    (
      'ade20k_mini',
      'python -m resnest_jax.data.prepare ade20k_mini --data_dir {}',
    ),
  ],
)
def test_unprepared_data_says_the_command(tmp_path, name, command):
  missing = tmp_path / 'nowhere'
  with pytest.raises(UserError) as error:
    open_split(name, missing, 'train')
  assert command.format(missing) in str(error.value).splitlines()[1]
  assert not missing.exists()


def test_missing_record_file(mini_data_dir, tmp_path):
  shutil.copytree(mini_data_dir / 'ade20k', tmp_path / 'ade20k')
  for path in tmp_path.glob('ade20k/mini/1.0.0/*-validation.*'):
    path.unlink()
  with pytest.raises(UserError, match=r'incomplete.*validation.*Delete'):
    open_split('ade20k_mini', tmp_path, 'train')


def test_damaged_records_name_the_sample(mini_data_dir, tmp_path):
  shutil.copytree(mini_data_dir / 'ade20k', tmp_path / 'ade20k')
  (path,) = tmp_path.glob('ade20k/mini/1.0.0/*-train.*')
  data = bytearray(path.read_bytes())
  middle = len(data) // 4
  data[middle : middle + 20_000] = bytes(20_000)
  path.write_bytes(data)
  split = open_split('ade20k_mini', tmp_path, 'train')
  with pytest.raises(UserError, match=r'(sample|ADE_train).*split train'):
    [split[i] for i in range(len(split))]


# ---- What is no archive ----------------------------------------------------


def test_missing_archive(tmp_path):
  with pytest.raises(UserError, match=r'no file .*a.zip.*Needed is ADE'):
    ade20k.open_archive(tmp_path / 'a.zip')


def test_folder_instead_of_archive(tmp_path):
  with pytest.raises(UserError, match=r'is a folder'):
    ade20k.open_archive(tmp_path)


def test_truncated_archive(mini_archive, tmp_path):
  path = tmp_path / 'half.zip'
  data = mini_archive.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(UserError, match=r'half\.zip.*interrupted.*again'):
    ade20k.open_archive(path)


def test_tar_archive(tmp_path):
  path = tmp_path / 'annotations_instance.tar'
  (tmp_path / 'file').write_text('x')
  with tarfile.open(path, 'w') as archive:
    archive.add(tmp_path / 'file')
  with pytest.raises(UserError, match=r'is a tar archive'):
    ade20k.open_archive(path)


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    (
      (
        'ADE20K_2021_17_01/images/ADE/training/urban/street/ADE_train_1.jpg',
        'ADE20K_2021_17_01/images/ADE/training/urban/street/ADE_train_1_seg.png',
      ),
      'full ADE20K release',
    ),
    (
      (
        'ADE20K_2016_07_26/images/training/a/abbey/ADE_train_1.jpg',
        'ADE20K_2016_07_26/images/training/a/abbey/ADE_train_1_seg.png',
      ),
      'full ADE20K release',
    ),
    (
      (
        f'{ROOT}/images/training/ADE_train_1.jpg',
        f'{ROOT}/annotations_instance/training/ADE_train_1.png',
      ),
      'instance annotations',
    ),
    (('release_test/testing/ADE_test_1.jpg',), 'test images'),
    (('holiday/1.jpg',), r'first file is holiday/1\.jpg'),
    ((), 'has no files'),
  ],
)
def test_other_releases_are_told_apart(tmp_path, names, message):
  archive = write_zip(tmp_path / 'a.zip', dict.fromkeys(names, b''))
  with pytest.raises(UserError, match=f'a.zip .*{message}.*Needed is ADE'):
    ade20k.find_pairs(archive)


@pytest.mark.parametrize(
  ('kind', 'message'),
  [('annotations', 'no mask'), ('images', 'a mask but no image')],
)
def test_sample_without_partner(tmp_path, kind, message):
  entries = sample_entries() | VALIDATION
  lonely = sample_entries('ADE_train_lonely')
  entries |= {k: v for k, v in lonely.items() if f'/{kind}/' not in k}
  archive = write_zip(tmp_path / 'a.zip', entries)
  with pytest.raises(UserError, match=f'1 training.*{message}.*lonely'):
    ade20k.find_pairs(archive)


def test_foreign_files_are_left_alone(tmp_path):
  entries = {
    f'{ROOT}/images/training/': b'',
    f'{ROOT}/images/training/._ADE_train_00000001.jpg': b'',
    f'{ROOT}/images/training/Thumbs.db': b'',
    f'__MACOSX/{ROOT}/images/training/ADE_train_00000002.jpg': b'',
  }
  archive = write_zip(
    tmp_path / 'a.zip', entries | sample_entries() | VALIDATION
  )
  pairs = ade20k.find_pairs(archive)
  assert pairs['train'] == [tuple(sample_entries())]
  assert pairs['validation'] == [tuple(VALIDATION)]


def test_counts_of_the_release(tmp_path):
  names = [
    f'{ROOT}/{kind}/{folder}/{prefix}_{i:08d}.{extension}'
    for folder, prefix, count in (
      ('training', 'ADE_train', 20210),
      ('validation', 'ADE_val', 2000),
    )
    for kind, extension in (('images', 'jpg'), ('annotations', 'png'))
    for i in range(1, count + 1)
  ]
  archive = write_zip(tmp_path / 'a.zip', dict.fromkeys(names, b''))
  pairs = ade20k.find_pairs(archive)
  ade20k.check_counts(archive, pairs, ade20k.RELEASE.counts)
  pairs['train'].pop()
  with pytest.raises(UserError, match=r'20209 training and 2000 .* 20210 and'):
    ade20k.check_counts(archive, pairs, ade20k.RELEASE.counts)


@pytest.mark.parametrize(
  ('comment', 'message'),
  [
    (b'', 'not a mini archive'),
    (b'{"images": 3}', 'not a mini archive'),
    (
      b'{"images": {"train": 9, "validation": 1}}',
      '1 training and 1 validation images, expected are 9 and 1',
    ),
  ],
)
def test_counts_of_a_mini_archive(tmp_path, comment, message):
  entries = sample_entries() | VALIDATION
  archive = write_zip(tmp_path / 'a.zip', entries, comment)
  with pytest.raises(UserError, match=message):
    ade20k.check_counts(archive, ade20k.find_pairs(archive), None)


def test_fingerprint_is_of_the_contents(tmp_path):
  entries = sample_entries() | VALIDATION
  one = write_zip(tmp_path / 'a.zip', entries)
  reordered = dict(reversed(entries.items()))
  two = write_zip(tmp_path / 'b.zip', reordered, b'a comment')
  other = write_zip(
    tmp_path / 'c.zip', entries | sample_entries(png=PNG[:-1] + b'\0')
  )
  assert archives.fingerprint(one) == archives.fingerprint(two)
  assert archives.fingerprint(one) != archives.fingerprint(other)


# ---- What is no sample -----------------------------------------------------


def palette_png():
  """A palette-coloured PNG: colour type 3 in the header."""
  data = bytearray(PNG)
  data[25] = 3
  return bytes(data)


@pytest.mark.parametrize(
  ('png', 'message'),
  [
    (encode('.png', np.ones((4, 6, 3))), '8-bit RGB picture'),
    (encode('.png', np.ones((4, 6, 4))), '8-bit RGBA picture'),
    (palette_png(), '8-bit palette picture'),
    (
      cv2.imencode('.png', np.ones((4, 6), np.uint16))[1].tobytes(),
      '16-bit grey picture',
    ),
    (encode('.png', np.full((4, 6), 151)), 'has the value 151'),
    (JPEG, 'is not a PNG'),
    (b'', 'is not a PNG'),
  ],
)
def test_mask_that_is_no_index_mask(png, message):
  with pytest.raises(UserError, match=f'my.zip: m.png.*{message}'):
    ade20k.read_mask(png, 'my.zip: m.png')


def test_mask_with_all_values():
  values = np.arange(151).reshape(1, 151)
  mask = ade20k.read_mask(encode('.png', values), '')
  assert mask.dtype == np.uint8
  assert mask.tolist() == values.tolist()


@pytest.mark.parametrize(
  ('sample', 'message'),
  [
    ({'png': encode('.png', np.ones((6, 4)))}, '6 x 4 pixels, its mask 4 x 6'),
    ({'jpeg': b'no picture'}, 'cannot be decoded'),
  ],
)
def test_sample_that_does_not_fit(tmp_path, sample, message):
  archive = write_zip(tmp_path / 'a.zip', sample_entries(**sample))
  with pytest.raises(UserError, match=f'ADE_train_00000001.jpg.*{message}'):
    ade20k.read_example(archive, tuple(archive.namelist()))


def test_damaged_entry(tmp_path):
  path = tmp_path / 'a.zip'
  write_zip(path, sample_entries()).close()
  data = bytearray(path.read_bytes())
  data[data.find(JPEG) + 30] ^= 0xFF
  path.write_bytes(data)
  archive = ade20k.open_archive(path)
  with pytest.raises(UserError, match=r'a.zip is damaged at .*_00000001.jpg'):
    ade20k.read_example(archive, tuple(archive.namelist()))
