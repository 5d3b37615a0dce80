"""A user's own folders and lists: what pairs, what is read and refused."""

import contextlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from data.pictures import claiming, png_bomb, tiff
from data.small_archives import encode
from numpy.testing import assert_equal
from PIL import Image

from resnest_jax.config import load_config
from resnest_jax.data.batches import CheckedSplit, Unreadable
from resnest_jax.data.datasets import open_data
from resnest_jax.data.own.pairing import Pair, draw_split, match_pairs, walk
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.errors import UnreadableSample, UserError

ROW = Path(__file__).parents[2] / 'configs' / 'folder.py'
CLASSES = '1: road 128 64 128\n2 5: tree 34 139 34\nignore: 0\n'


def write_pair(root, name, size=(12, 16), image='.png', mask='.png'):
  """An image and a mask of some of the values 0, 1, 2, 5 and 255."""
  rng = np.random.default_rng(list(name.encode()))
  pixels = rng.integers(0, 256, (*size, 3), np.uint8)
  values = rng.choice(np.array([0, 1, 2, 5, 255], np.uint8), size)
  for path, array in (
    (root / 'images' / f'{name}{image}', pixels),
    (root / 'masks' / f'{name}{mask}', values),
  ):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
  return pixels, values


@pytest.fixture
def root(tmp_path):
  """Six samples in the two splits, some in sub folders."""
  (tmp_path / 'classes.txt').write_text(CLASSES)
  for name in ('train/b', 'train/a', 'train/x/a', 'train/x/c', 'val/d'):
    write_pair(tmp_path, name)
  write_pair(tmp_path, 'val/E.e', image='.PNG', mask='.Png')
  return tmp_path


def data_config(root, **changes):
  changes = {f'data.{key}': value for key, value in changes.items()}
  return load_config(ROW, {'data.data_dir': str(root)} | changes).data


def split_of(root, split='train', **changes):
  changes = {f'folder.{key}': value for key, value in changes.items()}
  return open_data(data_config(root, **changes), split)


def names(split):
  return [pair.name for pair in split.pairs]


def flatten(root):
  """The same files without the splits' folders: names like train_b."""
  for folder in (root / 'images', root / 'masks'):
    for path in walk(folder):
      path.rename(folder / '_'.join(path.relative_to(folder).parts))
    shutil.rmtree(folder / 'train')
    shutil.rmtree(folder / 'val')


# ---- Which files belong together --------------------------------------------


def test_sub_folders_are_the_splits(root):
  split = split_of(root)
  assert (split.name, split.split, len(split)) == ('folder', 'train', 4)
  assert names(split) == ['a', 'b', 'x/a', 'x/c']
  assert names(split_of(root, 'val')) == ['E.e', 'd']
  write_pair(root, 'more/f')
  assert names(split_of(root, 'more')) == ['f']


def test_samples_are_the_files_with_train_ids(root):
  pixels, values = write_pair(root, 'val/d')
  split = split_of(root, 'val')
  train_ids = {0: 255, 1: 0, 2: 1, 5: 1, 255: 255}
  label = np.vectorize(train_ids.get)(values)
  assert_equal(split[1], {'image': pixels, 'label': label, 'name': 'd'})
  assert split[1]['image'].dtype == split[1]['label'].dtype == np.uint8
  raw = split.raw(1)
  assert_equal(raw['mask'], values)
  assert raw['name'] == 'd'
  assert_equal(pickle.loads(pickle.dumps(split))[1], split[1])
  assert split.labels.classes == ('road', 'tree')
  with pytest.raises(IndexError, match='2 is not in 0'):
    split[2]


def test_split_in_the_middle_of_a_path(root):
  for split in ('train', 'val'):
    for kind in ('images', 'masks'):
      shutil.move(root / kind / split, root / split / kind)
  paths = {'images': '{split}/images', 'masks': '{split}/masks'}
  assert names(split_of(root, 'train', **paths)) == ['a', 'b', 'x/a', 'x/c']
  assert names(split_of(root, 'val', **paths)) == ['E.e', 'd']


def test_suffixes_tell_images_from_masks_in_one_folder(tmp_path):
  for file in ('a_rgb.JPG', 'a_Mask.png', 'b_rgb.png', 'b_mask.PNG', 'b.png'):
    (tmp_path / file).touch()
  folders = tmp_path, tmp_path
  for suffixes in (('_rgb', '_mask'), ('_RGB', '_mask.png')):
    pairs = match_pairs(*folders, *suffixes)
    assert [pair.name for pair in pairs] == ['a', 'b']
    files = [Path(file).name for pair in pairs for file in pair[1:]]
    assert files == ['a_rgb.JPG', 'a_Mask.png', 'b_rgb.png', 'b_mask.PNG']


def test_hidden_and_other_files_are_left_out_and_links_followed(root):
  for hidden in ('images/train/._a.jpg', 'images/train/.cache/z.jpg'):
    path = root / hidden
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'')
  (root / 'masks' / 'train' / 'Thumbs.db').write_bytes(b'')
  for kind in ('images', 'masks'):
    (root / kind / 'train' / 'linked').symlink_to(root / kind / 'val')
    (root / kind / 'train' / 'x' / 'up').symlink_to(root / kind / 'train')
  found = names(split_of(root))
  assert found == ['a', 'b', 'linked/E.e', 'linked/d', 'x/a', 'x/c']


def test_missing_partners_are_counted_and_named(root):
  for i in range(5):
    (root / 'images' / 'train' / f'photo{i}.jpeg').touch()
  (root / 'masks' / 'train' / 'sketch.png').touch()
  message = (
    rf'5 images in {root}/images/train .*\(photo0.* photo2\.jpeg, \.\.\.\)'
    rf'.* 1 masks in {root}/masks/train have no image .*\(sketch\.png\)'
  )
  with pytest.raises(UserError, match=message):
    split_of(root)


def with_a_name_twice(root):
  shutil.copy(root / 'images/train/a.png', root / 'images/train/a.BMP')


def without_masks(root):
  shutil.rmtree(root / 'masks' / 'train')


def with_jpeg_masks(root):
  for path in walk(root / 'masks' / 'train'):
    path.rename(path.with_suffix('.JPG'))


def without_images(root):
  shutil.rmtree(root / 'images' / 'train')
  (root / 'images' / 'train').mkdir()


@pytest.mark.parametrize(
  ('spoil', 'options', 'message'),
  [
    (with_a_name_twice, {}, r'a\.BMP and .*a\.png have the same'),
    (None, {'images': 'photos'}, r'photos\. Set .*data\.folder\.images'),
    (None, {'split': 'test'}, r'In .*/images there are: train, val'),
    (without_masks, {}, r'no folder .*/masks/train'),
    (with_jpeg_masks, {}, r'has 4 \.jpg\. JPEG changes the values'),
    (without_images, {}, r'no images in .*has no files'),
    (None, {'lists': '{split}.txt'}, r'train\.txt cannot be read'),
    (flatten, {'split': 'test'}, r"no split 'test'; 'train' and 'val'"),
    (flatten, {'split': 'val', 'eval_fraction': 1e-9}, r'none .*eval_frac'),
  ],
)
def test_folders_that_cannot_be_meant(root, spoil, options, message):
  if spoil:
    spoil(root)
  with pytest.raises(UserError, match=message):
    split_of(root, **options)


# ---- Drawn splits and lists -------------------------------------------------


def test_drawn_splits_share_out_all_samples(root):
  flatten(root)
  everything = [path.stem for path in walk(root / 'images')]
  options = {'eval_fraction': 0.5, 'split_seed': 1}
  train, val = (names(split_of(root, x, **options)) for x in ('train', 'val'))
  assert train
  assert val
  assert sorted(train + val) == everything


def test_a_sample_stays_in_its_split_when_others_come():
  def drawn(count, split='val', seed=0, fraction=0.2):
    pairs = [Pair(f'photo {i}', '', '') for i in range(count)]
    drawn = draw_split(pairs, split, ('train', 'val'), fraction, seed)
    return {pair.name for pair in drawn}

  few, many = drawn(1000), drawn(3000)
  assert few == {name for name in many if int(name.split()[1]) < 1000}
  # Five standard deviations of a binomial distribution.
  assert abs(len(many) - 600) < 5 * np.sqrt(3000 * 0.2 * 0.8)
  assert len(drawn(3000, 'train') | many) == 3000
  assert not drawn(3000, 'train') & many
  # Another seed draws others; a larger share keeps those that were drawn.
  assert 60 < len(many & drawn(3000, seed=1)) < 180
  assert many < drawn(3000, fraction=0.3)


def test_lists_for_each_split_and_one_for_both(root):
  (root / 'lists').mkdir()
  (root / 'lists' / 'train.txt').write_text(
    '# harbour\n../images/train/b.png ../masks/train/b.png\n\n'
    '../images/train/x/a.png\t../masks/train/x/a.png'
  )
  split = split_of(root, 'train', lists='lists/{split}.txt')
  assert names(split) == ['images/train/b', 'images/train/x/a']
  expected = split_of(root)[1] | {'name': 'images/train/b'}
  assert_equal(split[0], expected)
  one = {'lists': 'lists/train.txt', 'eval_fraction': 0.5, 'split_seed': 3}
  both = [*split_of(root, 'train', **one).pairs]
  both += split_of(root, 'val', **one).pairs
  assert sorted(both) == sorted(split.pairs)


@pytest.mark.parametrize(
  ('lines', 'message'),
  [
    (['a b.png m.png'], "line 1: 'a b.png m.png' is not .*Put a tab between"),
    (['a.png m.png', 'a.jpg m.png'], 'line 2: a second image named a'),
    (['a.png m.png'], r'2 files are missing \(.*a\.png, .*m\.png\)'),
    (['# nothing'], 'has no samples'),
  ],
)
def test_lines_that_are_no_pairs_are_refused(root, lines, message):
  (root / 'train.txt').write_text('\n'.join(lines))
  with pytest.raises(UserError, match=message):
    split_of(root, lists='{split}.txt')


# ---- What is read -----------------------------------------------------------


def test_a_mask_that_is_truncated_or_lost(root):
  split = split_of(root)
  mask = root / 'masks' / 'train' / 'a.png'
  mask.write_bytes(mask.read_bytes()[:-20])
  with pytest.raises(UnreadableSample, match=r'masks/train/a\.png cannot be'):
    split[0]
  mask.unlink()
  with pytest.raises(UnreadableSample, match=r'a\.png cannot be read \(No su'):
    split[0]


def save_mask(root, array, **options):
  picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
  picture.save(root / 'masks' / 'train' / 'a.png', **options)


@pytest.mark.parametrize(
  ('mode', 'kind', 'flag'),
  [
    ('RGB', '8-bit RGB', '\n'),
    ('P', '1-bit palette', ' --indices\n'),
    ('1', '1-bit grey', ' --indices\n'),
  ],
)
def test_masks_of_another_kind_name_the_command(root, mode, kind, flag):
  road = (128, 64, 128) if mode == 'RGB' else 0
  save_mask(root, Image.new(mode, (16, 12), road))
  words = f'--masks {root}/masks --classes {root}/classes.txt --out {root}'
  message = f'(?s)/a.png is a {kind} .*palette2id {words}/masks_ids{flag}'
  with pytest.raises(UserError, match=message):
    split_of(root)[0]
  assert split_of(root).raw(0)['name'] == 'a'  # For those who check it.


def test_values_that_are_no_class_are_named(root):
  mask = np.ones((12, 16), np.uint8)
  mask[0, :3] = 4, 7, 7
  save_mask(root, mask)
  message = '/a.png has 3 .*: 4 and 7; it has 0 to 2, 5 and 255.*"ignore: 4"'
  with pytest.raises(UserError, match=message):
    split_of(root)[0]
  (root / 'classes.txt').write_text(f'{CLASSES}ignore: 4 7\n')
  assert split_of(root)[0]['label'][0, :4].tolist() == [255, 255, 255, 0]


@pytest.mark.parametrize(
  ('size', 'hint'), [((12, 15), 'Repair'), ((16, 12), 'mask is transposed')]
)
def test_sizes_that_differ_name_both_files(root, size, hint):
  save_mask(root, np.ones(size, np.uint8))
  height, width = size
  message = rf'a\.png is 16x12 .*masks\S*a\.png is {width}x{height}; .*{hint}'
  with pytest.raises(UserError, match=message):
    split_of(root)[0]


def test_images_of_16_bits_are_refused(root):
  path = root / 'images' / 'train' / 'a.png'
  path.write_bytes(encode(np.ones((12, 16, 3), np.uint16)))
  with pytest.raises(UserError, match=r'a\.png has 16 bits per channel'):
    split_of(root)[0]


def test_grey_images_become_rgb(root):
  grey = np.arange(192, dtype=np.uint8).reshape(12, 16)
  (root / 'images' / 'train' / 'a.png').write_bytes(encode(grey))
  assert_equal(split_of(root)[0]['image'], np.stack([grey] * 3, -1))


def test_exif_turns_the_image_and_not_the_mask(root):
  """As mmsegmentation reads them; the mask belongs to the upright picture."""
  exif = Image.Exif()
  exif[0x0112] = 6  # The camera was turned: rotate by 90 degrees to view.
  mask = np.where(np.arange(16) < 8, 1, 2) * np.ones((12, 1))
  mask = mask.astype(np.uint8)
  (root / 'images' / 'train' / 'a.png').unlink()
  path = root / 'images' / 'train' / 'a.jpg'
  Image.fromarray(mask * 100).convert('RGB').save(path, exif=exif)
  save_mask(root, mask.T, exif=exif)
  # The left half is now the upper one, in both.
  sample = split_of(root)[0]
  assert_equal(sample['label'], (sample['image'][..., 0] > 150))
  assert sample['label'].sum() == 96
  save_mask(root, mask)
  with pytest.raises(UserError, match='is turned by its EXIF orientation'):
    split_of(root)[0]


def test_evaluation_skips_nothing(root):
  path = root / 'images' / 'train' / 'b.png'
  path.write_bytes(path.read_bytes()[:-50])
  config = data_config(root, skip_unreadable=True)
  batches = make_eval_iterator(
    config, open_data(config, 'train'), batch_size=2, bucket=16
  )
  with (
    contextlib.closing(batches),
    pytest.raises(UserError, match=r'b\.png cannot be decoded'),
  ):
    list(batches)


def test_pictures_and_masks_of_too_many_pixels_are_unreadable(root):
  """A few bytes that claim to be large, and large ones of a few bytes."""
  for kind in ('images', 'masks'):
    path = root / kind / 'train' / 'a.png'
    kept = path.read_bytes()
    for encoded in (claiming(60_000, 60_000)['PNG'], png_bomb(17_000, 17_000)):
      path.write_bytes(encoded)
      with pytest.raises(
        UnreadableSample, match=rf'{path} is \d+ x \d+ pixels'
      ):
        split_of(root)[0]
    path.write_bytes(kept)
  # As the message says.
  split = open_data(data_config(root, max_pixels=12 * 16 - 1), 'train')
  with pytest.raises(UnreadableSample, match=r'16 x 12 .*more than 191'):
    pickle.loads(pickle.dumps(split))[0]
  open_data(data_config(root, max_pixels=12 * 16), 'train')[0]


def test_a_link_to_a_device_is_no_picture(root):
  path = root / 'images' / 'train' / 'a.png'
  path.unlink()
  path.symlink_to('/dev/zero')
  with pytest.raises(UnreadableSample, match=r'a\.png is a device'):
    split_of(root)[0]


def test_a_fourth_band_leaves_the_first_three_alone(root):
  """GDAL calls it opacity, whatever it holds."""
  pixels = np.random.default_rng(6).integers(0, 256, (12, 16, 4), np.uint8)
  (root / 'images' / 'train' / 'a.png').unlink()
  (root / 'images' / 'train' / 'a.tif').write_bytes(tiff(pixels, extra=2))
  assert_equal(split_of(root)[0]['image'], pixels[..., :3])


def test_training_skips_pictures_of_too_many_pixels(root):
  path = root / 'images' / 'train' / 'b.png'
  path.write_bytes(claiming(60_000, 60_000)['PNG'])
  config = data_config(root, skip_unreadable=True)
  split = CheckedSplit(open_data(config, 'train'), config.skip_unreadable)
  skipped = [isinstance(split[i], Unreadable) for i in range(len(split))]
  assert skipped.count(True) == 1
