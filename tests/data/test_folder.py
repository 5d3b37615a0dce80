"""A user's own folders: what pairs, what is read and refused."""

import contextlib
import pickle
import shlex
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from data import coast
from data.coast import TRAIN, both, names, not_opened, split_of, write_samples
from data.pictures import claiming, exif_of, png_bomb, tiff
from data.refusals import refused, unreadable
from data.small_archives import encode
from numpy.testing import assert_equal
from PIL import Image
from trouble import obeying_permissions

from resnest_jax.data.annotations import command as own
from resnest_jax.data.own.pairing import walk
from resnest_jax.data.pipeline import make_eval_iterator


@pytest.fixture
def root(tmp_path):
  return write_samples(tmp_path)


def resave(path, new):
  Image.open(path).save(new)
  path.unlink()


def test_samples_are_the_files_with_train_ids(root):
  pixels, values = coast.write_pair(root, 'val/d')
  split = split_of(root, 'val')
  assert (split.name, split.split, len(split)) == ('folder', 'val', 2)
  train_ids = {0: 255, 1: 0, 2: 1, 5: 1, 255: 255}
  label = np.vectorize(train_ids.get)(values)
  for sample in (split[1], pickle.loads(pickle.dumps(split))[1]):
    assert_equal(sample, {'image': pixels, 'label': label, 'name': 'd'})
    assert sample['image'].dtype == sample['label'].dtype == np.uint8
  assert_equal(split.raw(1)['mask'], values)
  assert split.labels.classes == ('road', 'tree')
  refused('2 is not in 0', split.__getitem__, 2, kind=IndexError)
  (root / 'masks/val/d.png').unlink()  # Since it was opened.
  unreadable(r'd\.png cannot be read \(No su', split.__getitem__, 1)


def test_suffixes_tell_images_from_masks_in_one_folder(tmp_path):
  names = 'a_rgb.JPG', 'a_Mask.png', 'b_rgb.png', 'b_mask.PNG', 'b.png'
  for file in (files := [tmp_path / name for name in names]):
    file.touch()
  (tmp_path / 'classes.txt').write_text(coast.CLASSES)
  expected = [('a', *map(str, files[:2])), ('b', *map(str, files[2:4]))]
  paths = {'images': '.', 'masks': '.', 'eval_fraction': 0.5}
  for image, mask in (('_rgb', '_mask'), ('_RGB', '_mask.png')):
    affixes = {'image_suffix': image, 'mask_suffix': mask}
    assert coast.pairs_of_both(tmp_path, **paths, **affixes) == expected


def test_hidden_and_other_files_are_left_out_and_links_followed(root):
  (root / 'images/train/.cache').mkdir()
  for file in ('images/train/._a.jpg', 'images/train/.cache/z.jpg'):
    (root / file).touch()
  (root / 'masks/train/Thumbs.db').touch()
  for folder in both(root, 'train'):
    (folder / 'linked').symlink_to(folder.with_name('val'))
    (folder / 'x' / 'up').symlink_to(folder)
  assert names(root) == ['a', 'b', 'linked/E.e', 'linked/d', 'x/a', 'x/c']


def test_accents_in_one_piece_and_in_two_are_the_same(root):
  for path, form in zip(both(root, 'train/a.png'), ('NFD', 'NFC'), strict=True):
    path.rename(path.with_name(unicodedata.normalize(form, 'é.png')))
  assert names(root) == [*TRAIN[1:], unicodedata.normalize('NFC', 'é')]
  assert split_of(root)[3]['label'].shape == (12, 16)


def test_missing_partners_are_counted_and_named(root):
  for i in range(5):
    (root / 'images/train' / f'photo{i}.jpeg').touch()
  (root / 'masks/train/sketch.png').touch()
  not_opened(
    root,
    rf'5 images have no mask in {root}/masks/train '
    r'\(photo0.jpeg, .* photo2\.jpeg and 2 more\); '
    rf'1 mask has no image in {root}/images/train \(sketch\.png\)',
  )


def test_closed_folders_are_counted_and_named(root):
  for folder in both(root, 'train/x'):
    folder.chmod(0)
  try:
    with obeying_permissions():
      closed = r'masks/train/x \(Permission denied\).*chmod -R u\+rX'
      not_opened(root, closed, 'train/x')
      (root / 'images').chmod(0)
      not_opened(root, r'images cannot be read \(Permission')
  finally:
    for folder in (root / 'images', *both(root, 'train/x')):
      folder.chmod(0o755)
  assert names(root) == TRAIN


@pytest.mark.parametrize(
  ('target', 'why'), [('nothing.png', 'No such'), ('Gone.png', 'Too many')]
)
def test_links_to_nothing_fail_by_their_names(root, capsys, target, why):
  for folder in both(root, 'train'):
    (folder / 'Gone.png').symlink_to(target)
    (folder / 'disk').symlink_to('/nothing/mounted')
  unreadable(
    rf'Gone\.png cannot be read \({why}', split_of(root).__getitem__, 0
  )
  said = capsys.readouterr().out
  assert f'left out of {root}/images/train: 1 no extension\n' in said


@pytest.mark.parametrize('kind', ['images', 'masks'])
def test_two_ways_into_a_folder_give_it_two_names(root, kind):
  # Neither is dropped, whichever the file system lists first.
  (root / kind / 'train' / 'y').symlink_to('x')
  not_opened(root, r'2 (images|masks) have no .*a\.png, c\.pn')


def test_masks_among_the_images_are_no_images(root):
  # As Roboflow and others write them, with flags for the masks alone.
  for path in walk(root / 'masks/train'):
    into = root / 'images' / path.relative_to(root / 'masks')
    path.rename(into.with_name(f'{into.stem}_mask.png'))
  assert names(root, masks='images', mask_suffix='_mask') == TRAIN
  not_opened(root, r'it has 8 masks\. Set .*image_suffix and', masks='images')
  # Photographs and masks that differ in nothing but the extension.
  for path in walk(root / 'images/train'):  # a.png comes before a_mask.png.
    new = path.name.replace('.png', '.jfif').replace('_mask.jfif', '.png')
    path.rename(path.with_name(new))
  assert names(root, masks='images') == TRAIN
  pairs = split_of(root, masks='images').pairs
  assert {Path(pair.image).suffix for pair in pairs} == {'.jfif'}


# What is done to the names of images and of masks, and the flags that help,
# with @ for --config.data.folder.
AFFIXES = [
  ('img_{}', 'mask_{}', '@image_prefix=img_ @mask_prefix=mask_'),
  ('{}', 'mask {}', "'@mask_prefix=mask '"),
  ('{}_rgb', '{}_gt', '@image_suffix=_rgb @mask_suffix=_gt'),
  ('{}', '{}_labelIds', '@mask_suffix=_labelIds'),
  ('p-{}.i', '{}.m', '@image_prefix=p- @image_suffix=.i @mask_suffix=.m'),
]


@pytest.mark.parametrize(('image', 'mask', 'flags'), AFFIXES)
def test_the_affixes_that_pair_all_files_are_named(root, image, mask, flags):
  for folder, form in zip(both(root, 'train'), (image, mask), strict=True):
    for path in walk(folder):
      path.rename(path.with_name(form.format(path.stem) + path.suffix))
  told = not_opened(root, 'All have a partner').partition(' partner with ')[2]
  assert told == flags.replace('@', '--config.data.folder.')
  given = (x[1:].split('=') for x in shlex.split(flags))
  assert names(root, **dict(given)) == TRAIN


WHERE = ' --classes {0}/classes.txt --data_dir {0}/masks_ids'
TO_IDS = '.*own {0}/masks --format mask_'
PARTNERS = [
  ('.heic', '.png', r'1 mask has no image.*\(a\.png\); a\.heic cannot be '
   r'read as image\. Save them as PNG or JPEG'),
  ('.png', '.tif', r'1 image has no mask .*; a\.tif cannot be read as mask.*'
   f'{TO_IDS}values{WHERE}\nThen add --config.data.folder.masks=masks_ids'),
  ('.png', '.npy', r'a\.npy cannot be read as mask\. Write them as PNG'),
  ('.parquet', '.png', r'a\.parquet .*This makes a data set of them: .* own'),
  ('.npy', '.png', r'a\.npy cannot .* bands with config\.data\.bands'),
  ('.png', '.json', r'a\.json cannot be .*Polygons are no masks: this draws'),
  ('.png', '.jpg', r'a\.jpg cannot be read as mask\. JPEG changes'),
  # Neither is read, so that none lacks a partner.
  ('.gif', '.GIF', r'^a\.gif cannot be read as image; a\.GIF cannot be read '
   'as mask.*PNG or JPEG.*prepare own'),
  ('.dcm', '.npy', r'^a\.dcm cannot be read as image; a\.npy cannot be read'),
]  # fmt: skip


@pytest.mark.parametrize(('image', 'mask', 'message'), PARTNERS)
def test_a_partner_with_another_ending_is_named(root, image, mask, message):
  for path, new in zip(both(root, 'train/a.png'), (image, mask), strict=True):
    path.rename(path.with_suffix(new))
  not_opened(root, f'(?s){message.format(root)}')


AMONG_IMAGES = {'masks': 'images', 'mask_suffix': '_m', 'image_suffix': '.jpg'}


@pytest.mark.parametrize('flags', [{}, AMONG_IMAGES])
def test_tiff_masks_are_converted_as_the_message_says(root, flags):
  for path in walk(root / 'masks/train'):
    new = path.with_suffix('.tif')
    if flags:
      image = root / 'images' / path.relative_to(root / 'masks')
      resave(image, image.with_suffix('.jpg'))
      new = image.with_name(f'{image.stem}_m.tif')
    resave(path, new)
  # Programs of maps write whole numbers as fractions.
  Image.open(new).convert('F').save(new)
  told = not_opened(root, r'no masks in .* it has 4 \.tif\.', **flags)
  _, command, then = told.splitlines()
  own.main(shlex.split(command.partition(' own ')[2]))
  key, _, value = then.removeprefix('Then add ')[:-1].partition('=')
  assert key == '--config.data.folder.masks'
  split = split_of(root, **flags | {'masks': value})
  assert [sample['name'] for sample in split] == TRAIN


def test_folders_that_cannot_be_meant(root):
  for folder in (root / 'nodata', root / 'classes.txt'):
    not_opened(folder, f'no folder {folder}; set .*data_dir')
  not_opened(root, r'photos\. Set .*data\.folder\.images', images='photos')
  not_opened(root, r'In .*/images there are: train, val', 'test')
  not_opened(root, r'train\.txt cannot be read', lists='{split}.txt')
  second = root / 'images/train/a.BMP'
  shutil.copy(second.with_suffix('.png'), second)
  not_opened(root, r'a\.BMP and .*a\.png have the same')
  second.unlink()
  images, masks = both(root, 'train')
  for path in walk(masks):
    path.rename(path.with_suffix('.JPG'))
  not_opened(root, r'has 4 \.jpg\. JPEG changes the values')
  shutil.rmtree(masks)
  not_opened(root, r'no folder .*/masks/train')
  shutil.move(both(root, 'val')[1], masks)
  shutil.rmtree(images)
  images.mkdir()
  not_opened(root, r'no images in .*has no files')


def save_mask(root, picture, **options):
  picture.save(root / 'masks/train/a.png', **options)


IS = r'is 16x12 .*/masks/train/a\.png is'
NO_INDEX_MASKS = [
  (
    Image.new('RGB', (16, 12), (128, 64, 128)),
    rf'is a 8-bit RGB {TO_IDS}colours{WHERE}\n',
  ),
  (Image.new('P', (16, 12)), rf'is a 1-bit palette {TO_IDS}values{WHERE}\n'),
  (Image.new('1', (16, 12)), rf'is a 1-bit grey {TO_IDS}values{WHERE}\n'),
  (Image.new('L', (15, 12), 1), f'{IS} 15x12; .*Repair'),
  (Image.new('L', (12, 16), 1), f'{IS} 12x16; .*says whether one of'),
]


@pytest.mark.parametrize(('picture', 'message'), NO_INDEX_MASKS)
def test_masks_of_another_kind_or_size_are_refused(root, picture, message):
  save_mask(root, picture)
  refused(rf'(?s)/a\.png {message.format(root)}', split_of(root).__getitem__, 0)
  assert split_of(root).raw(0)['name'] == 'a'  # For those who check it.


def test_values_that_are_no_class_are_named(root):
  mask = np.ones((12, 16), np.uint8)
  mask[0, :3] = 4, 7, 7
  save_mask(root, Image.fromarray(mask))
  message = r'/a\.png has 3 .*: 4, 7; it has 0, 1, 2, 5, 255\..*"ignore: 4"'
  refused(message, split_of(root).__getitem__, 0)
  (root / 'classes.txt').write_text(f'{coast.CLASSES}ignore: 4 7\n')
  assert split_of(root)[0]['label'][0, :4].tolist() == [255, 255, 255, 0]


def test_images_of_other_bands_become_rgb_and_of_16_bits_do_not(root):
  # GDAL calls the fourth opacity, whatever it holds.
  pixels = np.random.default_rng(6).integers(0, 256, (12, 16, 4), np.uint8)
  one, four = encode(pixels[..., 0]), tiff(pixels, extra=2)
  for encoded, bands in ((one, [0, 0, 0]), (four, [0, 1, 2])):
    (root / 'images/train/a.png').write_bytes(encoded)
    assert_equal(split_of(root)[0]['image'], pixels[..., bands])
  (root / 'images/train/a.png').write_bytes(encode(np.uint16(pixels)))
  refused(r'a\.png has 16 bits per channel', split_of(root).__getitem__, 0)


def test_exif_turns_the_image_and_not_the_mask(root):
  """As mmsegmentation reads them; the mask belongs to the upright picture."""
  exif = exif_of(6)
  mask = np.tile(np.repeat(np.uint8([1, 2]), 8), (12, 1))
  image = Image.fromarray(mask * np.uint8(100))
  image.save(root / 'images/train/a.png', exif=exif)
  save_mask(root, Image.fromarray(mask.T), exif=exif)
  # The left half is now the upper one, in both.
  sample = split_of(root)[0]
  assert_equal(sample['label'], (sample['image'][..., 0] > 150))
  assert sample['label'].sum() == 96
  save_mask(root, Image.fromarray(mask))
  refused('is 12x16 .* is 16x12; both', split_of(root).__getitem__, 0)


def test_evaluation_skips_nothing(root):
  path = root / 'images/train/b.png'
  path.write_bytes(path.read_bytes()[:-50])
  options = {'skip_unreadable': True}
  config, split = coast.data_config(root, **options), split_of(root, **options)
  batches = make_eval_iterator(config, split, batch_size=2, bucket=16)
  with contextlib.closing(batches):
    refused(r'b\.png cannot be decoded', list, batches)


def test_pictures_and_masks_of_too_many_pixels_are_unreadable(root):
  # A few bytes that claim to be large, and large ones of a few bytes.
  for path in both(root, 'train/a.png'):
    kept = path.read_bytes()
    for encoded in (claiming(60_000, 60_000)['PNG'], png_bomb(17_000, 17_000)):
      path.write_bytes(encoded)
      unreadable(rf'{path} is \d+ x \d+ pixels', split_of(root).__getitem__, 0)
    path.write_bytes(kept)
  # As the message says.
  split = split_of(root, max_pixels=12 * 16 - 1)
  again = pickle.loads(pickle.dumps(split))
  unreadable(r'16 x 12 .*more than 191', again.__getitem__, 0)
  split_of(root, max_pixels=12 * 16)[0]


def test_a_classes_file_of_any_length_is_not_read(root):
  with (root / 'classes.txt').open('ab') as file:
    file.truncate(2**40)  # Without taking space.
  not_opened(root, r'classes\.txt has 1099511627776 bytes')
