"""The generated archive: layout, formats, and pictures worth learning from."""

import json
import zipfile

import cv2
import numpy as np
import pytest

from resnest_jax.data import mini
from resnest_jax.data.scenes.canvas import ID, OTHER
from resnest_jax.data.scenes.scene import draw_scene
from resnest_jax.errors import UserError

ROOT = 'ADEChallengeData2016'


def decode(data, flags):
  return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def draw(split, count):
  """JPEG, PNG, mask and kind of a split's first samples, default seed."""
  return [mini._make_sample((0, split, i)) for i in range(count)]


@pytest.fixture(scope='module')
def train():
  return draw(0, 60)


@pytest.fixture(scope='module')
def validation():
  """The whole validation split of the default size."""
  return draw(1, mini.DEFAULT_COUNTS['validation'])


def test_layout_is_the_releases(mini_archive):
  with zipfile.ZipFile(mini_archive) as archive:
    files = {n for n in archive.namelist() if not n.endswith('/')}
  expected = {f'{ROOT}/objectInfo150.txt', f'{ROOT}/sceneCategories.txt'}
  for folder, prefix, count in (
    ('training', 'ADE_train', 24),
    ('validation', 'ADE_val', 8),
  ):
    for i in range(1, count + 1):
      stem = f'{folder}/{prefix}_{i:08d}'
      expected |= {
        f'{ROOT}/images/{stem}.jpg',
        f'{ROOT}/annotations/{stem}.png',
      }
  assert files == expected


def test_lists(mini_archive):
  with zipfile.ZipFile(mini_archive) as archive:
    info = archive.read(f'{ROOT}/objectInfo150.txt').decode().splitlines()
    scenes = archive.read(f'{ROOT}/sceneCategories.txt').decode().splitlines()
    masks = [
      decode(archive.read(name), cv2.IMREAD_UNCHANGED)
      for name in archive.namelist()
      if name.endswith('.png')
    ]
  assert len(info) == 151
  index, ratio, train, validation, name = info[3].split('\t')
  assert (index, name) == ('3', 'sky')
  assert int(train) + int(validation) == sum((m == 3).any() for m in masks)
  pixels = np.concatenate([m.ravel() for m in masks])
  assert float(ratio) == pytest.approx(
    (pixels == 3).sum() / (pixels > 0).sum(), abs=1e-4
  )
  assert [line.split()[0] for line in scenes[23:25]] == [
    'ADE_train_00000024',
    'ADE_val_00000001',
  ]
  kinds = {'street', 'highway', 'lake', 'park', 'bedroom'}
  assert {line.split()[1] for line in scenes} <= kinds


def test_formats(train):
  for jpeg, png, mask, _ in train:
    assert jpeg[:3] == b'\xff\xd8\xff'
    assert tuple(png[24:26]) == (8, 0)  # 8 bits, one channel.
    image = decode(jpeg, cv2.IMREAD_COLOR)
    assert image.shape[:2] == mask.shape
    np.testing.assert_array_equal(decode(png, cv2.IMREAD_UNCHANGED), mask)
    assert set(np.unique(mask)) <= {OTHER, *ID.values()}


def test_sizes_are_many(train):
  sizes = np.array([mask.shape for *_, mask, _ in train])
  assert sizes.min() >= 96
  assert sizes.max() <= 224
  aspects = sizes[:, 1] / sizes[:, 0]
  assert aspects.min() < 0.7
  assert aspects.max() > 1.6
  assert len({tuple(size) for size in sizes}) > 30


def test_some_pictures_are_grey(train, validation):
  channels = [
    decode(jpeg, cv2.IMREAD_UNCHANGED).ndim for jpeg, *_ in train + validation
  ]
  assert 1 <= channels.count(2) <= 12


def test_every_class_is_frequent_in_both_splits(train, validation):
  for samples in (train, validation):
    masks = [mask for *_, mask, _ in samples]
    values = np.concatenate([mask.ravel() for mask in masks])
    for name, value in ID.items():
      assert (values == value).mean() > 0.005, name
      assert sum((mask == value).any() for mask in masks) >= 8, name


def test_colour_alone_does_not_tell_the_class(train, validation):
  """A class's mean colour must not be enough to segment by."""

  def pixels(samples):
    images = [decode(jpeg, cv2.IMREAD_COLOR) for jpeg, *_ in samples]
    x = np.concatenate([image.reshape(-1, 3) for image in images])[::17]
    return x, np.concatenate([mask.ravel() for *_, mask, _ in samples])[::17]

  x, y = pixels(train)
  classes = np.array(list(ID.values()))
  centres = np.stack([x[y == c].mean(0) for c in classes])
  x, y = pixels(validation)
  distances = ((x[:, None] - centres) ** 2).sum(-1)
  guess = classes[distances.argmin(1)]
  valid = y != OTHER
  ious = [
    (valid & (guess == c) & (y == c)).sum()
    / (valid & ((guess == c) | (y == c))).sum()
    for c in classes
  ]
  assert np.mean(ious) < 0.2


def test_scene_is_a_function_of_its_seed():
  one, mask, kind = draw_scene((3, 4), 96, 128)
  again, same_mask, same_kind = draw_scene((3, 4), 96, 128)
  other, *_ = draw_scene((3, 5), 96, 128)
  assert one.shape == (96, 128, 3)
  np.testing.assert_array_equal(one, again)
  np.testing.assert_array_equal(mask, same_mask)
  assert kind == same_kind
  assert (one != other).mean() > 0.5


def test_archive_is_a_function_of_its_arguments(tmp_path):
  counts = {'train': 3, 'validation': 2}
  for name, seed in (('a', 7), ('b', 7), ('c', 8)):
    mini.write_archive(tmp_path / name, counts, seed)
  a, b, c = ((tmp_path / name).read_bytes() for name in 'abc')
  assert a == b
  assert a != c


def test_comment_says_what_is_inside(mini_archive):
  with zipfile.ZipFile(mini_archive) as archive:
    comment = json.loads(archive.comment)
  assert comment['images'] == {'train': 24, 'validation': 8}
  assert comment['seed'] == 0


def test_existing_files_are_kept(tmp_path):
  path = tmp_path / 'a.zip'
  path.write_bytes(b'mine')
  with pytest.raises(UserError, match='exists and was not written for these'):
    mini.write_archive(path, {'train': 1, 'validation': 1}, 0)
  assert path.read_bytes() == b'mine'


def test_command_line_rejects_empty_splits(run_script, tmp_path):
  process = run_script(
    *('-m', 'resnest_jax.data.mini', '--out', tmp_path / 'a.zip'),
    *('--images', '0', '5'),
    status=1,
  )
  assert process.stderr.startswith('error: --images 0 5')
  assert not (tmp_path / 'a.zip').exists()
