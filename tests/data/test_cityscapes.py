"""Cityscapes: from the two zip files to samples, and the mini archives."""

import json
import shutil
import zipfile

import cv2
import numpy as np
import pytest

from resnest_jax.data import cityscapes, mini_cityscapes
from resnest_jax.data.archives import ArchiveConfig
from resnest_jax.data.cityscapes import IMAGES, MASKS, Cityscapes
from resnest_jax.data.datasets import DATASETS, open_split
from resnest_jax.data.labels import CITYSCAPES
from resnest_jax.data.prepare import prepare
from resnest_jax.data.scenes import city
from resnest_jax.errors import UserError

MINI = DATASETS['cityscapes_mini']
PREPARE = '-m', 'resnest_jax.data.prepare'
# The class of each of the 34 label ids, copied by hand from labels.py of
# cityscapesScripts; None: not evaluated.
TRAIN_IDS = [
  *[None] * 7,
  *(0, 1, None, None, 2, 3, 4, None, None, None, 5, None, 6, 7),
  *(8, 9, 10, 11, 12, 13, 14, 15, None, None, 16, 17, 18),
]


def encode(image):
  return cv2.imencode('.png', np.asarray(image))[1].tobytes()


def decode(png):
  return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)


IMAGE = encode(np.full((4, 8, 3), 128, np.uint8))
MASK = encode(np.full((4, 8), 7, np.uint8))


def image_name(sample, split='train'):
  return f'leftImg8bit/{split}/{sample.split("_")[0]}/{sample}_leftImg8bit.png'


def mask_name(sample, split='train', kind='labelIds'):
  return f'gtFine/{split}/{sample.split("_")[0]}/{sample}_gtFine_{kind}.png'


SAMPLES = {'train': 'ulm_1_9', 'val': 'lindau_1_9', 'test': 'bonn_1_9'}


def write_archives(folder, images=None, masks=None, comment=None):
  """A sample for each split, changed by name -> bytes, None to leave it out."""
  if comment is None:
    counts = {'train': 1, 'validation': 1, 'test': 1}
    comment = json.dumps({'images': counts, 'size': [8, 4]})
  for file, name, data, changes in (
    (IMAGES, image_name, IMAGE, images),
    (MASKS, mask_name, MASK, masks),
  ):
    entries = {name(s, split): data for split, s in SAMPLES.items()}
    entries |= changes or {}
    with zipfile.ZipFile(folder / file, 'w') as archive:
      archive.comment = comment.encode()
      for entry, content in entries.items():
        if content is not None:
          archive.writestr(entry, content)
  return folder


def contents_of(folder, config=cityscapes.MINI):
  return Cityscapes.open_contents(config, folder)


def read_all(folder, config):
  contents = contents_of(folder, config)
  return [contents.read(x) for pairs in contents.pairs.values() for x in pairs]


def error_of(folder, config=cityscapes.MINI):
  """What is wrong with the archives in `folder`, found before or in reading."""
  with pytest.raises(UserError) as error:
    read_all(folder, config)
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
  table = np.array([255 if i is None else i for i in TRAIN_IDS])
  for sample, name in zip(samples, sorted(names), strict=True):
    assert f'/{sample["name"]}_leftImg8bit.png' in name
    bgr = decode(archives[0].read(name))
    np.testing.assert_array_equal(sample['image'], bgr[..., ::-1])
    mask = decode(archives[1].read(mask_name(sample['name'], folder)))
    np.testing.assert_array_equal(sample['label'], table[mask])
    assert sample['label'].dtype == np.uint8
  assert samples.labels is CITYSCAPES
  assert (sample['label'] == 255).all() == (split == 'test')


def test_label_ids_become_train_ids(tmp_path):
  ids = np.array([[*range(16)], [*range(16, 32)], [32, 33, 255, *[0] * 13]])
  comment = {'images': {'train': 1, 'validation': 1, 'test': 1}}
  image = encode(np.zeros((3, 16, 3), np.uint8))
  write_archives(
    tmp_path,
    {image_name(s, split): image for split, s in SAMPLES.items()},
    {mask_name(s, x): encode(ids.astype(np.uint8)) for x, s in SAMPLES.items()},
    json.dumps(comment | {'size': [16, 3]}),
  )
  prepare(MINI, tmp_path / 'data', tmp_path)
  sample = open_split('cityscapes_mini', tmp_path / 'data', 'train')[0]
  expected = [255 if i is None else i for i in TRAIN_IDS]
  assert sample['label'].ravel()[:34].tolist() == expected
  assert (sample['label'].ravel()[34:] == 255).all()
  assert sample['name'] == 'ulm_1_9'


def test_unprepared_data_says_the_command(tmp_path):
  with pytest.raises(UserError) as error:
    open_split('cityscapes', tmp_path, 'train')
  command, hint = str(error.value).splitlines()[1:]
  assert command.strip() == (
    'python -m resnest_jax.data.prepare cityscapes --archive_dir FOLDER '
    f'--data_dir {tmp_path}'
  )
  for word in (IMAGES, MASKS, 'cityscapes-dataset.com'):
    assert word in hint


# ---- The command -----------------------------------------------------------


def test_generates_and_prepares_in_one_command(run_script, tmp_path):
  process = run_script(
    *(*PREPARE, 'cityscapes_mini', '--data_dir', tmp_path),
    *('--images', '3', '2', '--size', '64', '32'),
  )
  lines = [line.split() for line in process.stdout.splitlines()]
  for words in (['train', '3'], ['validation', '2'], ['test', '1']):
    assert [*words, 'images'] in lines
  assert 'configs/cityscapes_pspnet.py:mini' in lines[-1]
  sample = open_split('cityscapes_mini', tmp_path, 'validation')[1]
  assert sample['image'].shape == (32, 64, 3)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['cityscapes'], 'cannot be downloaded by itself.*--archive_dir FOLDER'),
    (['cityscapes', '--archive', 'a.zip'], 'has two archives'),
    (['ade20k', '--archive_dir', 'a'], '--archive_dir is for Cityscapes'),
    (['ade20k_mini', '--size', '64', '32'], '--size is for Cityscapes'),
    (['cityscapes_mini', '--size', '64', '8'], '--size 64 8: both are from'),
  ],
)
def test_flags_that_do_not_fit(arguments, message, monkeypatch, tmp_path):
  from resnest_jax.data import prepare as script

  data_dir = tmp_path / 'data'
  flags = [*arguments, '--data_dir', str(data_dir)]
  monkeypatch.setattr('sys.argv', ['prepare', *flags])
  with pytest.raises(UserError, match=f'(?s){message}'):
    script.main()
  assert not data_dir.exists()


def test_prepared_once(mini_cityscapes_archives, tmp_path, capsys):
  prepare(MINI, tmp_path, mini_cityscapes_archives)
  prepare(MINI, tmp_path, mini_cityscapes_archives)
  assert 'Already prepared' in capsys.readouterr().out
  other = tmp_path / 'other'
  other.mkdir()
  with pytest.raises(UserError, match=r'another archive.*Nothing was'):
    prepare(MINI, tmp_path, write_archives(other))


# ---- What is not the two archives ------------------------------------------


def test_missing_folder_and_file(tmp_path):
  assert 'there is no folder' in error_of(tmp_path / 'none')
  (tmp_path / 'a.zip').write_bytes(b'')
  assert 'is a file' in error_of(tmp_path / 'a.zip')


@pytest.mark.parametrize('missing', [IMAGES, MASKS])
def test_one_archive_is_missing(tmp_path, missing):
  write_archives(tmp_path)
  (tmp_path / missing).rename(tmp_path / 'gtCoarse.zip')
  message = error_of(tmp_path)
  assert f'has no {missing}; its zip files are g' in message
  assert 'gtCoarse.zip' in message


def test_unpacked_archives(tmp_path):
  (tmp_path / 'leftImg8bit').mkdir()
  (tmp_path / 'gtFine').mkdir()
  assert 'unpacked leftImg8bit and gtFine' in error_of(tmp_path)


@pytest.mark.parametrize('name', [IMAGES, MASKS])
def test_truncated_archive(mini_cityscapes_archives, tmp_path, name):
  shutil.copytree(mini_cityscapes_archives, tmp_path, dirs_exist_ok=True)
  data = (tmp_path / name).read_bytes()
  (tmp_path / name).write_bytes(data[: len(data) // 2])
  message = error_of(tmp_path)
  assert f'{name} is not a readable zip file' in message
  assert cityscapes.SHA1[name] in message


@pytest.mark.parametrize(
  ('file', 'names', 'message'),
  [
    (MASKS, ['gtCoarse/train/ulm/a_gtCoarse_labelIds.png'], 'coarse annot'),
    (MASKS, [mask_name('ulm_1_9', kind='labelTrainIds')], 'masks of train ids'),
    (MASKS, [image_name('ulm_1_9')], 'first file is leftImg8bit/train/ulm'),
    (IMAGES, ['leftImg8bit/train_extra/bad/a_leftImg8bit.png'], 'extra images'),
    (IMAGES, ['leftImg16bit/train/ulm/a_leftImg16bit.png'], '16-bit images'),
    (IMAGES, ['rightImg8bit/train/ulm/a_rightImg8bit.png'], 'right camera'),
    (IMAGES, [], 'it has no files'),
  ],
)
def test_other_packages_are_told_apart(tmp_path, file, names, message):
  write_archives(tmp_path)
  with zipfile.ZipFile(tmp_path / file, 'w') as archive:
    for name in names:
      archive.writestr(name, b'')
  assert message in error_of(tmp_path)


def test_sample_without_partner(tmp_path):
  lonely = 'zurich_5_9'
  write_archives(tmp_path, images={image_name(lonely, 'val'): IMAGE})
  assert '1 val samples have no mask, the first is zurich_5_9' in error_of(
    tmp_path
  )
  write_archives(tmp_path, masks={mask_name(lonely, 'val'): MASK})
  assert 'a mask but no image, the first is zurich_5_9' in error_of(tmp_path)


def test_other_files_of_the_release_are_left_alone(tmp_path):
  one = contents_of(write_archives(tmp_path))
  extra = {
    mask_name('ulm_1_9', kind=kind): b'?'
    for kind in ('color', 'instanceIds', 'labelTrainIds')
  }
  extra |= {'gtFine/train/ulm/ulm_1_9_gtFine_polygons.json': b'{}'}
  extra |= {'README': b'', '__MACOSX/' + mask_name('ulm_2_9'): b''}
  two = contents_of(write_archives(tmp_path, {'license.txt': b''}, extra))
  pair = image_name('ulm_1_9'), mask_name('ulm_1_9')
  assert two.pairs['train'] == one.pairs['train'] == [pair]
  assert two.fingerprint == one.fingerprint
  other = {mask_name('ulm_1_9'): encode(np.full((4, 8), 8, np.uint8))}
  changed = contents_of(write_archives(tmp_path, masks=other))
  assert changed.fingerprint != one.fingerprint


def test_counts_of_the_release(tmp_path):
  counts = {'train': 2975, 'val': 500, 'test': 1525}
  samples = [
    (f'ulm_{i:06d}_000019', split)
    for split, count in counts.items()
    for i in range(count)
  ]
  write_archives(
    tmp_path,
    dict.fromkeys((image_name(*x) for x in samples), b'')
    | {image_name(s, split): None for split, s in SAMPLES.items()},
    dict.fromkeys((mask_name(*x) for x in samples), b'')
    | {mask_name(s, split): None for split, s in SAMPLES.items()},
  )
  pairs = contents_of(tmp_path, cityscapes.RELEASE).pairs
  found = {split: len(names) for split, names in pairs.items()}
  assert found == {'train': 2975, 'validation': 500, 'test': 1525}
  assert pairs['test'][1524] == (
    image_name('ulm_001524_000019', 'test'),
    mask_name('ulm_001524_000019', 'test'),
  )


def test_other_counts_than_the_release(tmp_path):
  folder = write_archives(tmp_path, comment='')
  assert (
    'has 1 train, 1 val and 1 test images, expected are 2975, 500 and 1525'
  ) in error_of(folder, cityscapes.RELEASE)
  # A generated one says so.
  message = error_of(write_archives(tmp_path), cityscapes.RELEASE)
  assert 'Prepare it as cityscapes_mini' in message


def test_archives_without_a_comment_are_no_mini(tmp_path):
  write_archives(tmp_path, comment='')
  with pytest.raises(
    UserError, match=r'not a mini City.*mini_cityscapes --out'
  ):
    contents_of(tmp_path)


def test_size_of_the_release(tmp_path):
  counts = {'train': 1, 'validation': 1, 'test': 1}
  config = ArchiveConfig(name='large', counts=counts, size=(2048, 1024))
  message = error_of(write_archives(tmp_path), config)
  assert 'has 8 x 4 pixels, the release 2048 x 1024' in message


@pytest.mark.parametrize(
  ('mask', 'message'),
  [
    (np.full((4, 8), 34, np.uint8), 'has the value 34; the masks of this'),
    (np.full((4, 8, 3), 7, np.uint8), 'is a 8-bit RGB picture'),
    (np.full((4, 8), 7, np.uint16), 'is a 16-bit grey picture'),
    (np.full((2, 4), 7, np.uint8), 'its mask 4 x 2'),
  ],
)
def test_mask_that_does_not_fit(tmp_path, mask, message):
  name = mask_name('lindau_1_9', 'val')
  assert message in error_of(
    write_archives(tmp_path, masks={name: encode(mask)})
  )


@pytest.mark.parametrize(
  ('image', 'message'),
  [
    (np.zeros((4, 8), np.uint8), 'is a 8-bit grey picture; the images'),
    (np.zeros((4, 8, 3), np.uint16), 'is a 16-bit RGB picture; the images'),
  ],
)
def test_image_that_does_not_fit(tmp_path, image, message):
  name = image_name('lindau_1_9', 'val')
  assert message in error_of(write_archives(tmp_path, {name: encode(image)}))


def test_damage_found_late_leaves_nothing_behind(tmp_path):
  name = mask_name('bonn_1_9', 'test')
  write_archives(tmp_path, masks={name: b'bad'})
  with pytest.raises(UserError, match=r'bonn_1_9_gtFine.* is not a PNG'):
    prepare(MINI, tmp_path / 'data', tmp_path)
  assert list((tmp_path / 'data').glob('cityscapes/mini/*')) == []


# ---- Mini archives ---------------------------------------------------------


@pytest.fixture(scope='module')
def streets():
  """Pictures and masks of training and validation, small, default seed."""
  return [
    [mini_cityscapes._make_sample((0, split, i), (256, 128)) for i in range(30)]
    for split in (0, 1)
  ]


def test_layout_and_formats_are_the_releases(archives):
  images, masks = (archive.namelist() for archive in archives)
  assert len(images) == len(masks) == 17
  for image, mask in zip(images, masks, strict=True):
    root, split, place, file = image.split('/')
    assert root == 'leftImg8bit'
    assert file.startswith(f'{place}_')
    assert mask == mask_name(file.removesuffix('_leftImg8bit.png'), split)
    header = archives[0].read(image)[16:26], archives[1].read(mask)[16:26]
    assert header[0] == bytes([0, 0, 0, 192, 0, 0, 0, 96, 8, 2])  # RGB
    assert header[1] == bytes([0, 0, 0, 192, 0, 0, 0, 96, 8, 0])  # one channel
    values = set(np.unique(decode(archives[1].read(mask))))
    assert values <= (
      {0, 1, 3} if split == 'test' else {0, 1, 3, *range(7, 34)}
    )


def test_every_class_is_frequent_in_both_splits(streets):
  evaluated = [i for i in city.LABEL_IDS.values() if i > 3]
  assert len(evaluated) == 10
  for samples in streets:
    masks = np.stack([mask for _, mask in samples])
    for label_id in evaluated:
      present = masks == label_id
      assert present.mean() > 0.01, label_id
      assert present.any((1, 2)).sum() >= 15, label_id
    ignored = CITYSCAPES.to_train_id[masks] == 255
    assert 0.02 < ignored.mean() < 0.15


def test_colour_alone_does_not_tell_the_class(streets):
  def pixels(samples):
    x = np.concatenate([image.reshape(-1, 3) for image, _ in samples])
    y = np.concatenate([mask.ravel() for _, mask in samples])
    return x[::17].astype(float), CITYSCAPES.to_train_id[y[::17]]

  (x, y), (held_out, truth) = map(pixels, streets)
  classes = np.unique(y[y != 255])
  centres = np.stack([x[y == c].mean(0) for c in classes])
  distances = ((held_out[:, None] - centres) ** 2).sum(-1)
  guess = classes[distances.argmin(1)]
  ious = [
    ((guess == c) & (truth == c)).sum()
    / ((truth != 255) & ((guess == c) | (truth == c))).sum()
    for c in classes
  ]
  assert np.mean(ious) < 0.25


def test_archives_are_a_function_of_their_arguments(tmp_path):
  counts = {'train': 2, 'validation': 1, 'test': 1}
  for name, seed in (('a', 7), ('b', 7), ('c', 8)):
    mini_cityscapes.write_archives(tmp_path / name, counts, seed, (64, 32))
  for file in (IMAGES, MASKS):
    a, b, c = ((tmp_path / name / file).read_bytes() for name in 'abc')
    assert a == b
    assert a != c


def test_existing_archives_are_kept(tmp_path):
  write_archives(tmp_path)
  before = (tmp_path / MASKS).read_bytes()
  counts = {'train': 1, 'validation': 1, 'test': 1}
  with pytest.raises(UserError, match=f'{IMAGES} exists and was not written'):
    mini_cityscapes.write_archives(tmp_path, counts, 0, (64, 32))
  assert (tmp_path / MASKS).read_bytes() == before


def test_killed_between_the_two_files(tmp_path):
  what = {'train': 1, 'validation': 1, 'test': 1}, 0, (64, 32)
  mini_cityscapes.write_archives(tmp_path, *what)
  before = (tmp_path / MASKS).read_bytes()
  (tmp_path / MASKS).unlink()
  mini_cityscapes.write_archives(tmp_path, *what)
  assert (tmp_path / MASKS).read_bytes() == before
  assert sorted(p.name for p in tmp_path.iterdir()) == [MASKS, IMAGES]
