"""A user's own folders and lists: what pairs, what is read and refused."""

import contextlib
import json
import pickle
import re
import shlex
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from data.pictures import claiming, png_bomb, tiff
from data.small_archives import decode, encode
from numpy.testing import assert_equal
from pages import blocks_of
from PIL import Image
from trouble import obeying_permissions

from resnest_jax.config import load_config
from resnest_jax.data.datasets import open_data
from resnest_jax.data.own import palette2id
from resnest_jax.data.own.pairing import Pair, walk
from resnest_jax.data.own.splits import draw_split
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.errors import UnreadableSample, UserError

ROW = Path(__file__).parents[2] / 'configs' / 'folder.py'
OF_FOLDER = {key: f'folder.{key}' for key in load_config(ROW).data.folder}
CLASSES = '1: road 128 64 128\n2 5: tree 34 139 34\nignore: 0\n'
TRAIN = ['a', 'b', 'x/a', 'x/c']
VAL = ['E.e', 'd']


def both(root, path):
  """Two paths: below the images, and below the masks."""
  return root / 'images' / path, root / 'masks' / path


def write_pair(root, name):
  """An image and a mask of some of the values 0, 1, 2, 5 and 255."""
  rng = np.random.default_rng(list(name.encode()))
  pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
  values = rng.choice(np.uint8([0, 1, 2, 5, 255]), (12, 16))
  image, mask = both(root, f'{name}.png')
  for path, array in ((image, pixels), (mask, values)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
  return pixels, values


@pytest.fixture
def root(tmp_path):
  """Six samples in the two splits, some in sub folders."""
  (tmp_path / 'classes.txt').write_text(CLASSES)
  for name in (*(f'train/{name}' for name in TRAIN), 'val/d', 'val/E.e'):
    write_pair(tmp_path, name)
  image, mask = both(tmp_path, 'val/E.e.png')
  image.rename(image.with_suffix('.PNG'))
  mask.rename(mask.with_suffix('.Png'))
  return tmp_path


def data_config(root, **changes):
  """config.data with other values, those of its section `folder` as well."""
  changes = {f'data.{OF_FOLDER.get(x, x)}': y for x, y in changes.items()}
  return load_config(ROW, {'data.data_dir': str(root)} | changes).data


def split_of(root, split='train', **changes):
  return open_data(data_config(root, **changes), split)


def names(root, split='train', **changes):
  return [pair.name for pair in split_of(root, split, **changes).pairs]


def pairs_of_both(root, **changes):
  """The pairs of both splits, sorted."""
  splits = [split_of(root, split, **changes) for split in ('train', 'val')]
  return sorted([*splits[0].pairs, *splits[1].pairs])


def refused(root, message, split='train', **changes):
  """The split cannot be opened, for a reason that matches and is returned."""
  with pytest.raises(UserError, match=message) as told:
    split_of(root, split, **changes)
  return str(told.value)


def first_refused(root, message, kind=UserError):
  """The first sample, a, cannot be read."""
  split = split_of(root)
  with pytest.raises(kind, match=message):
    split[0]


def flatten(root):
  """The same files without the splits' folders: names like train_b."""
  for folder in both(root, ''):
    for path in walk(folder):
      path.rename(folder / '_'.join(path.relative_to(folder).parts))
    shutil.rmtree(folder / 'train')
    shutil.rmtree(folder / 'val')


def resave(path, new):
  Image.open(path).save(new)
  path.unlink()


# ---- Which files belong together --------------------------------------------


def test_samples_are_the_files_with_train_ids(root):
  pixels, values = write_pair(root, 'val/d')
  split = split_of(root, 'val')
  assert (split.name, split.split, len(split)) == ('folder', 'val', 2)
  train_ids = {0: 255, 1: 0, 2: 1, 5: 1, 255: 255}
  label = np.vectorize(train_ids.get)(values)
  for sample in (split[1], pickle.loads(pickle.dumps(split))[1]):
    assert_equal(sample, {'image': pixels, 'label': label, 'name': 'd'})
    assert sample['image'].dtype == sample['label'].dtype == np.uint8
  assert_equal(split.raw(1)['mask'], values)
  assert split.labels.classes == ('road', 'tree')
  with pytest.raises(IndexError, match='2 is not in 0'):
    split[2]


def test_suffixes_tell_images_from_masks_in_one_folder(tmp_path):
  names = 'a_rgb.JPG', 'a_Mask.png', 'b_rgb.png', 'b_mask.PNG', 'b.png'
  for file in (files := [tmp_path / name for name in names]):
    file.touch()
  (tmp_path / 'classes.txt').write_text(CLASSES)
  expected = [('a', *map(str, files[:2])), ('b', *map(str, files[2:4]))]
  paths = {'images': '.', 'masks': '.', 'eval_fraction': 0.5}
  for image, mask in (('_rgb', '_mask'), ('_RGB', '_mask.png')):
    affixes = {'image_suffix': image, 'mask_suffix': mask}
    assert pairs_of_both(tmp_path, **paths, **affixes) == expected


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


def test_names_that_are_not_utf_8_are_drawn_and_read(root):
  flatten(root)
  for path in both(root, 'train_a.png'):
    path.rename(path.with_name('\udce4.png'))
  read = {x['name'] for kind in ('train', 'val') for x in split_of(root, kind)}
  assert '\udce4' in read
  assert len(read) == 6


def test_missing_partners_are_counted_and_named(root):
  for i in range(5):
    (root / 'images/train' / f'photo{i}.jpeg').touch()
  (root / 'masks/train/sketch.png').touch()
  refused(
    root,
    rf'5 images have no mask in {root}/masks/train '
    r'\(photo0.jpeg, .* photo2\.jpeg, \.\.\.\); '
    rf'1 mask has no image in {root}/images/train \(sketch\.png\)',
  )


def test_closed_folders_are_counted_and_named(root):
  for folder in both(root, 'train/x'):
    folder.chmod(0)
  try:
    with obeying_permissions():
      closed = r'masks/train/x \(Permission denied\).*chmod -R u\+rX'
      refused(root, closed, 'train/x')
      (root / 'images').chmod(0)
      refused(root, r'images cannot be read \(Permission')
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
  first_refused(root, rf'Gone\.png cannot be read \({why}', UnreadableSample)
  said = capsys.readouterr().out
  assert f'left out of {root}/images/train: 1 no extension\n' in said


@pytest.mark.parametrize('kind', ['images', 'masks'])
def test_two_ways_into_a_folder_give_it_two_names(root, kind):
  # Neither is dropped, whichever the file system lists first.
  (root / kind / 'train' / 'y').symlink_to('x')
  refused(root, r'2 (images|masks) have no .*a\.png, c\.pn')


def test_masks_among_the_images_are_no_images(root):
  # As Roboflow and others write them, with flags for the masks alone.
  for path in walk(root / 'masks/train'):
    into = root / 'images' / path.relative_to(root / 'masks')
    path.rename(into.with_name(f'{into.stem}_mask.png'))
  assert names(root, masks='images', mask_suffix='_mask') == TRAIN
  refused(root, r'it has 8 masks\. Set .*image_suffix and', masks='images')
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
  told = refused(root, 'All have a partner').partition(' partner with ')[2]
  assert told == flags.replace('@', '--config.data.folder.')
  given = (x[1:].split('=') for x in shlex.split(flags))
  assert names(root, **dict(given)) == TRAIN


PARTNERS = [
  ('.heic', '.png', r'1 mask has no image.*\(a\.png\); a\.heic cannot be '
   r'read as image\. Save them as PNG or JPEG'),
  ('.png', '.tif', r'1 image has no mask .*; a\.tif cannot be read as mask.*'
   r'palette2id --masks {0}/masks --classes {0}/classes.txt --out '
   r'{0}/masks_ids --indices\nThen add --config.data.folder.masks=masks_ids'),
  ('.png', '.npy', r'a\.npy cannot be read as mask\. Write them as PNG'),
  ('.parquet', '.png', r'a\.parquet .*docs/own-data\.md has lines that write'),
  ('.png', '.json', r'a\.json cannot be .*Polygons are no masks: docs/own-d'),
  ('.png', '.jpg', r'a\.jpg cannot be read as mask\. JPEG changes'),
  # Neither is read, so that none lacks a partner.
  ('.gif', '.GIF', r'^a\.gif cannot be read as image; a\.GIF cannot be read '
   'as mask.*PNG or JPEG.*palette2id'),
  ('.dcm', '.npy', r'^a\.dcm cannot be read as image; a\.npy cannot be read'),
]  # fmt: skip


@pytest.mark.parametrize(('image', 'mask', 'message'), PARTNERS)
def test_a_partner_with_another_ending_is_named(root, image, mask, message):
  for path, new in zip(both(root, 'train/a.png'), (image, mask), strict=True):
    path.rename(path.with_suffix(new))
  refused(root, f'(?s){message.format(root)}')


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
  told = refused(root, r'no masks in .* it has 4 \.tif\.', **flags)
  _, command, then = told.splitlines()
  palette2id.main(shlex.split(command.partition('palette2id')[2]))
  key, _, value = then.removeprefix('Then add ')[:-1].partition('=')
  assert key == '--config.data.folder.masks'
  split = split_of(root, **flags | {'masks': value})
  assert [sample['name'] for sample in split] == TRAIN


def test_the_lines_of_the_page_draw_polygons(root, monkeypatch):
  code, _ = blocks_of('own-data.md')
  (root / 'mydata' / 'images').mkdir(parents=True)
  flower = {'label': 'flower', 'points': [[4, 2], [9, 2], [9, 8], [4, 8]]}
  about = {'imageWidth': 16, 'imageHeight': 12, 'shapes': [flower]}
  (root / 'mydata/images/a.json').write_text(json.dumps(about))
  monkeypatch.chdir(root)
  exec(code, {})
  expected = np.zeros((12, 16), np.uint8)
  expected[2:9, 4:10] = 2
  assert_equal(decode(Path('mydata/masks/a.png').read_bytes()), expected)


def test_folders_that_cannot_be_meant(root):
  for folder in (root / 'nodata', root / 'classes.txt'):
    refused(folder, f'no folder {folder}; set .*data_dir')
  refused(root, r'photos\. Set .*data\.folder\.images', images='photos')
  refused(root, r'In .*/images there are: train, val', 'test')
  refused(root, r'train\.txt cannot be read', lists='{split}.txt')
  second = root / 'images/train/a.BMP'
  shutil.copy(second.with_suffix('.png'), second)
  refused(root, r'a\.BMP and .*a\.png have the same')
  second.unlink()
  images, masks = both(root, 'train')
  shutil.move(images, root / 'kept')
  images.mkdir()
  refused(root, r'no images in .*has no files')
  images.rmdir()
  shutil.move(root / 'kept', images)
  for path in walk(masks):
    path.rename(path.with_suffix('.JPG'))
  refused(root, r'has 4 \.jpg\. JPEG changes the values')
  shutil.rmtree(masks)
  refused(root, r'no folder .*/masks/train')


# ---- Drawn splits and lists -------------------------------------------------


def test_drawn_splits_share_out_all_samples(root):
  flatten(root)
  everything = [path.stem for path in walk(root / 'images')]
  options = {'eval_fraction': 0.5, 'split_seed': 1}
  train, val = (names(root, x, **options) for x in ('train', 'val'))
  assert (len(train), len(val)) == (3, 3)
  assert sorted(train + val) == everything
  refused(root, r"no split 'test'; 'train' and", 'test', eval_split='test')
  # A single sample cannot be shared.
  for folder in both(root, ''):
    for path in walk(folder)[1:]:
      path.unlink()
  assert len(split_of(root)) == 1
  refused(root, r'1 sample in .*none for the split val', 'val')


def drawn(count, split='val', seed=0, fraction=0.2, without=()):
  pairs = [Pair(f'photo {i}', '', '') for i in range(count) if i not in without]
  found = draw_split(pairs, split, fraction, seed)
  return {pair.name for pair in found}


def test_the_share_is_right_within_a_sample():
  for fraction in (0.2, 0.1, 1 / 3, 0.5, 0.97, 1e-9):
    for count in (2, 3, 6, 10, 40, 41):
      number = len(drawn(count, fraction=fraction))
      assert abs(number - fraction * count) < 1
      assert 0 < number < count
      assert len(drawn(count, 'train', fraction=fraction)) == count - number
  assert [len(drawn(count)) for count in (1, 3, 6, 40)] == [0, 1, 1, 8]
  assert drawn(1, 'train') == {'photo 0'}


def test_a_new_sample_moves_one_other_at_most():
  few = drawn(40)
  for count in range(41, 90):
    many = drawn(count)
    assert len(few - many) + len(many - few - {f'photo {count - 1}'}) <= 1
    few = many
  for lost in range(40):
    rest = drawn(40, without=(lost,))
    assert len(drawn(40) - {f'photo {lost}'} - rest) <= 1
  assert not drawn(40, 'train') & drawn(40)
  # Another seed draws others; a larger share keeps those that were drawn.
  assert 0 < len(drawn(90) & drawn(90, seed=1)) < 12
  assert drawn(90) < drawn(90, fraction=0.3)
  # As the first release drew them, where it drew as many.
  assert drawn(20) == {f'photo {i}' for i in (1, 15, 17, 18)}


def test_lists_for_each_split_and_one_for_both(root):
  (root / 'lists').mkdir()
  (root / 'lists' / 'train.txt').write_text(
    '# harbour\n../images/train/b.png ../masks/train/b.png\n\n'
    '../images/train/x/a.png\t../masks/train/x/a.png'
  )
  split = split_of(root, lists='lists/{split}.txt')
  assert [x.name for x in split.pairs] == ['images/train/b', 'images/train/x/a']
  assert_equal(split[0], split_of(root)[1] | {'name': 'images/train/b'})
  one = {'lists': 'lists/train.txt', 'eval_fraction': 0.5, 'split_seed': 3}
  assert pairs_of_both(root, **one) == sorted(split.pairs)


def rename(root, **new):
  for old, name in new.items():
    for folder in both(root, old):
      folder.rename(folder.with_name(name))


SPLITS = [
  {},
  {'train': 'Train', 'val': 'Val'},
  {'train': 'training', 'val': 'validation'},
  {'train': 'TRAIN', 'val': 'valid'},
  {'train': 'train2017', 'val': 'val2017'},
  {'train': 'Training_Set', 'val': 'dev-set'},
]


@pytest.mark.parametrize('new', SPLITS)
def test_other_names_of_splits_are_understood(root, new, capsys):
  rename(root, **new)
  write_pair(root, 'test/f')
  write_pair(root, 'loose')
  assert names(root, 'test') == ['f']
  assert (names(root), names(root, 'val')) == (TRAIN, VAL)
  said = capsys.readouterr().out
  for split, name in new.items():
    assert f"{root}/images/{name} is the split '{split}'\n" in said
  assert f'{root}/masks, beside the splits: test (1 file), 1 picture\n' in said
  # The same above the two folders, and in one folder of both.
  for split in ({'train': 'train', 'val': 'val'} | new).values():
    (root / split).mkdir()
    for folder in both(root, split):
      folder.rename(root / split / folder.parent.name)
  paths = {'images': '{split}/images', 'masks': '{split}/masks'}
  assert (names(root, **paths), names(root, 'val', **paths)) == (TRAIN, VAL)


@pytest.mark.parametrize(('train', 'val'), [('Train', 'b'), ('train', 'w')])
def test_a_split_that_is_missing_is_not_drawn(root, train, val):
  rename(root, train=train, val=val)
  message = f'there are: {train}, {val}.*eval_split to their names'
  refused(root, message, 'val')
  assert names(root, val, eval_split=val) == VAL


def test_two_folders_for_a_split_are_not_guessed(root):
  rename(root, val='val_old')
  shutil.copytree(root / 'images' / 'val_old', root / 'images' / 'val_new')
  refused(root, r"'val': val_new, val_old.*names of two", 'val')
  assert names(root, 'val_old', eval_split='val_old') == VAL


def test_folders_of_other_things_are_no_splits(root, capsys):
  rename(root, train='train station', val='valley')
  assert len(pairs_of_both(root)) == 6
  told = capsys.readouterr().out
  assert 'sub folders: train station (4 files), valley (2 files)\n' in told
  rename(root, **{'train station': 'train and val'})
  assert len(pairs_of_both(root)) == 6


@pytest.mark.parametrize('name', ['', ' ', '.', '..', '../masks', '/tmp'])
def test_names_that_are_no_folder_of_a_split(root, name):
  for key in ('train_split', 'eval_split'):
    for split in (name, 'val'):
      refused(root, 'no name of a folder', split, **{key: name})


# ---- Lists as others write them ---------------------------------------------

LINES = (
  'images/train/b.png masks/train/b.png\n'
  'images/train/x/a.png masks/train/x/a.png'
)
VOC = {'images': 'images/{split}', 'masks': 'masks/{split}'}


PATHS = ['images/train/b', 'images/train/x/a']

LISTS = [
  (LINES.replace('\n', '\r\n'), 'utf-8-sig', PATHS),
  (LINES.replace('/', '\\'), 'utf-8', PATHS),
  (LINES.replace(' ', ','), 'utf-8', PATHS),
  (LINES.replace(' ', ', '), 'utf-8', PATHS),
  (LINES.replace(' ', ';'), 'utf-8', PATHS),
  (re.sub(r'(\S+) (\S+)', r'"\1","\2"', LINES), 'utf-8', PATHS),
  (LINES, 'utf-16', PATHS),
  # With blanks, commas and backslashes in the names.
  ('my photo, 1.png\tback\\slash.png', 'utf-8', ['my photo, 1']),
  ('"my photo, 1.png";back\\slash.png', 'utf-8', ['my photo, 1']),
  # Of names, as those of Pascal VOC.
  ('a\nx/c', 'utf-8', ['a', 'x/c']),
  ('a.png\nx/c.jpg', 'utf-8', ['a', 'x/c']),
  ('x\\c\n"a"', 'utf-8', ['x/c', 'a']),
  ('images/train/a.png\nimages/train/x/c.png', 'utf-8', ['a', 'x/c']),
]


@pytest.mark.parametrize(('text', 'coding', 'found'), LISTS)
def test_lists_as_others_write_them(root, text, coding, found):
  shutil.copy(root / 'images/train/b.png', root / 'my photo, 1.png')
  shutil.copy(root / 'masks/train/b.png', root / 'back\\slash.png')
  (root / 'train.txt').write_bytes(text.encode(coding))
  # Files that are not listed need no partner.
  (root / 'images/train/unlabelled.png').touch()
  pairs = split_of(root, lists='{split}.txt', **VOC).pairs
  assert [pair.name for pair in pairs] == found
  in_folders = found != ['my photo, 1']
  for pair in pairs:
    assert Path(pair.image).is_file()
    assert Path(pair.mask).is_file()
    assert pair.mask.startswith(f'{root}/masks/train/') == in_folders


def test_files_without_extensions_are_no_names(root):
  (root / 'images/train/a.PNG').touch()  # Not a folder of pairs.
  for folder in both(root, ''):
    shutil.copy(folder / 'train/b.png', folder / 'bare')
  (root / 'train.txt').write_text('images/bare masks/bare')
  assert names(root, lists='{split}.txt') == ['images/bare']


NO_PAIRS = [
  ('a\nlone', 'line 2: lone has no file in .*/masks/train. Add it, or rem'),
  ('nothing', "line 1: 'nothing' is not an image .* nor the name of both"),
  ('image,mask', '1 file is missing|2 files are missing .*mask in line 1'),
  ('a\na.png', 'line 2: a second image named a'),
  ('a b.png m.png', "line 1: 'a b.png m.png' is not .*Put a tab between"),
  ('a.png m.png\na.jpg m.png', 'line 2: a second image named a'),
  ('a.png m.png', r'2 files are missing \(\S*a\.png in line 1, \S*m\.png'),
  ('# nothing', 'has no samples'),
]


@pytest.mark.parametrize(('lines', 'message'), NO_PAIRS)
def test_lines_that_are_no_names_and_no_pairs_are_refused(root, lines, message):
  (root / 'images/train/lone.png').touch()
  (root / 'train.txt').write_text(lines)
  refused(root, message, lists='{split}.txt', **VOC)


# ---- What is read -----------------------------------------------------------


def test_a_mask_that_is_truncated_or_lost(root):
  mask = root / 'masks/train/a.png'
  mask.write_bytes(mask.read_bytes()[:-20])
  first_refused(root, r'masks/train/a\.png cannot be', UnreadableSample)
  split = split_of(root)
  mask.unlink()
  with pytest.raises(UnreadableSample, match=r'a\.png cannot be read \(No su'):
    split[0]


def save_mask(root, picture, **options):
  picture.save(root / 'masks/train/a.png', **options)


IS = r'is 16x12 .*/masks/train/a\.png is'
TO_IDS = (
  '.*palette2id --masks {0}/masks --classes {0}/classes.txt --out {0}/masks_ids'
)


NO_INDEX_MASKS = [
  (Image.new('RGB', (16, 12), (128, 64, 128)), rf'is a 8-bit RGB {TO_IDS}\n'),
  (Image.new('P', (16, 12)), rf'is a 1-bit palette {TO_IDS} --indices\n'),
  (Image.new('1', (16, 12)), rf'is a 1-bit grey {TO_IDS} --indices\n'),
  (Image.new('L', (15, 12), 1), f'{IS} 15x12; .*Repair'),
  (Image.new('L', (12, 16), 1), f'{IS} 12x16; .*mask is transposed'),
]


@pytest.mark.parametrize(('picture', 'message'), NO_INDEX_MASKS)
def test_masks_of_another_kind_or_size_are_refused(root, picture, message):
  save_mask(root, picture)
  first_refused(root, rf'(?s)/a\.png {message.format(root)}')
  assert split_of(root).raw(0)['name'] == 'a'  # For those who check it.


def test_values_that_are_no_class_are_named(root):
  mask = np.ones((12, 16), np.uint8)
  mask[0, :3] = 4, 7, 7
  save_mask(root, Image.fromarray(mask))
  message = '/a.png has 3 .*: 4 and 7; it has 0 to 2, 5 and 255.*"ignore: 4"'
  first_refused(root, message)
  (root / 'classes.txt').write_text(f'{CLASSES}ignore: 4 7\n')
  assert split_of(root)[0]['label'][0, :4].tolist() == [255, 255, 255, 0]


def test_images_of_other_bands_become_rgb_and_of_16_bits_do_not(root):
  # GDAL calls the fourth opacity, whatever it holds.
  pixels = np.random.default_rng(6).integers(0, 256, (12, 16, 4), np.uint8)
  one, four = encode(pixels[..., 0]), tiff(pixels, extra=2)
  for encoded, bands in ((one, [0, 0, 0]), (four, [0, 1, 2])):
    (root / 'images/train/a.png').write_bytes(encoded)
    assert_equal(split_of(root)[0]['image'], pixels[..., bands])
  (root / 'images/train/a.png').write_bytes(encode(np.uint16(pixels)))
  first_refused(root, r'a\.png has 16 bits per channel')


def test_exif_turns_the_image_and_not_the_mask(root):
  """As mmsegmentation reads them; the mask belongs to the upright picture."""
  exif = Image.Exif()
  exif[0x0112] = 6  # The camera was turned: rotate by 90 degrees to view.
  mask = np.tile(np.repeat(np.uint8([1, 2]), 8), (12, 1))
  image = Image.fromarray(mask * np.uint8(100))
  image.save(root / 'images/train/a.png', exif=exif)
  save_mask(root, Image.fromarray(mask.T), exif=exif)
  # The left half is now the upper one, in both.
  sample = split_of(root)[0]
  assert_equal(sample['label'], (sample['image'][..., 0] > 150))
  assert sample['label'].sum() == 96
  save_mask(root, Image.fromarray(mask))
  first_refused(root, 'is turned by its EXIF orientation')


def test_evaluation_skips_nothing(root):
  path = root / 'images/train/b.png'
  path.write_bytes(path.read_bytes()[:-50])
  config = data_config(root, skip_unreadable=True)
  split = open_data(config, 'train')
  batches = make_eval_iterator(config, split, batch_size=2, bucket=16)
  damaged = pytest.raises(UserError, match=r'b\.png cannot be decoded')
  with contextlib.closing(batches), damaged:
    list(batches)


def test_pictures_and_masks_of_too_many_pixels_are_unreadable(root):
  # A few bytes that claim to be large, and large ones of a few bytes.
  for path in both(root, 'train/a.png'):
    kept = path.read_bytes()
    for encoded in (claiming(60_000, 60_000)['PNG'], png_bomb(17_000, 17_000)):
      path.write_bytes(encoded)
      first_refused(root, rf'{path} is \d+ x \d+ pixels', UnreadableSample)
    path.write_bytes(kept)
  # As the message says.
  split = split_of(root, max_pixels=12 * 16 - 1)
  with pytest.raises(UnreadableSample, match=r'16 x 12 .*more than 191'):
    pickle.loads(pickle.dumps(split))[0]
  split_of(root, max_pixels=12 * 16)[0]


def test_a_link_to_a_device_is_no_picture(root):
  path = root / 'images/train/a.png'
  path.unlink()
  path.symlink_to('/dev/zero')
  first_refused(root, r'a\.png is a device', UnreadableSample)


def test_a_classes_file_of_any_length_is_not_read(root):
  with (root / 'classes.txt').open('ab') as file:
    file.truncate(2**40)  # Without taking space.
  refused(root, r'classes\.txt has 1099511627776 bytes')
