"""A user's own folders and lists: what pairs, what is read and refused."""

import contextlib
import json
import pickle
import shlex
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from data.pictures import claiming, png_bomb, tiff
from data.small_archives import encode
from numpy.testing import assert_equal
from pages import blocks_of
from PIL import Image
from trouble import obeying_permissions

from resnest_jax.config import load_config
from resnest_jax.data.batches import CheckedSplit, Unreadable
from resnest_jax.data.datasets import open_data
from resnest_jax.data.own import palette2id
from resnest_jax.data.own.pairing import Pair, walk
from resnest_jax.data.own.splits import draw_split
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
  files = 'a_rgb.JPG', 'a_Mask.png', 'b_rgb.png', 'b_mask.PNG', 'b.png'
  for file in files:
    (tmp_path / file).touch()
  (tmp_path / 'classes.txt').write_text(CLASSES)
  paths = {'images': '.', 'masks': '.', 'eval_fraction': 0.5}
  for image, mask in (('_rgb', '_mask'), ('_RGB', '_mask.png')):
    options = paths | {'image_suffix': image, 'mask_suffix': mask}
    pairs = [*split_of(tmp_path, **options).pairs]
    pairs += split_of(tmp_path, 'val', **options).pairs
    assert sorted(pair.name for pair in pairs) == ['a', 'b']
    found = sorted(Path(file).name for pair in pairs for file in pair[1:])
    assert found == sorted(files[:4])


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


def test_accents_in_one_piece_and_in_two_are_the_same(root):
  for kind, form in (('images', 'NFD'), ('masks', 'NFC')):
    path = root / kind / 'train' / 'a.png'
    path.rename(path.with_name(unicodedata.normalize(form, 'é.png')))
  split = split_of(root)
  assert names(split) == ['b', 'x/a', 'x/c', unicodedata.normalize('NFC', 'é')]
  assert split[3]['label'].shape == (12, 16)


def test_names_that_are_not_utf_8_are_drawn_and_read(root):
  flatten(root)
  for kind in ('images', 'masks'):
    path = root / kind / 'train_a.png'
    path.rename(path.with_name('\udce4.png'))
  splits = [split_of(root, split) for split in ('train', 'val')]
  both = {sample['name'] for split in splits for sample in split}
  assert '\udce4' in both
  assert len(both) == 6


def test_missing_partners_are_counted_and_named(root):
  for i in range(5):
    (root / 'images' / 'train' / f'photo{i}.jpeg').touch()
  (root / 'masks' / 'train' / 'sketch.png').touch()
  message = (
    rf'5 images have no mask in {root}/masks/train '
    r'\(photo0.jpeg, .* photo2\.jpeg, \.\.\.\); '
    rf'1 mask has no image in {root}/images/train \(sketch\.png\)'
  )
  with pytest.raises(UserError, match=message):
    split_of(root)


def test_closed_folders_are_counted_and_named(root):
  for folder in ('images/train/x', 'masks/train/x'):
    (root / folder).chmod(0)
  link = root / 'masks' / 'train' / 'round'
  link.symlink_to('round')
  try:
    with obeying_permissions():
      for folder, message in (
        ('train', r'2 folders .*train/round \(Too many.*train/x \(Permission'),
        ('train/x', r'masks/train/x \(Permission denied\).*chmod -R u\+rX'),
      ):
        with pytest.raises(UserError, match=message):
          split_of(root, folder)
      (root / 'images').chmod(0)
      with pytest.raises(
        UserError, match=r'images cannot be read \(Permission'
      ):
        split_of(root)
  finally:
    for path in ('images', 'images/train/x', 'masks/train/x'):
      (root / path).chmod(0o755)
  # What the message says.
  link.unlink()
  assert names(split_of(root)) == ['a', 'b', 'x/a', 'x/c']


def test_links_to_nothing_fail_by_their_names(root, capsys):
  for kind in ('images', 'masks'):
    (root / kind / 'train' / 'gone.png').symlink_to(root / 'nothing.png')
    (root / kind / 'train' / 'disk').symlink_to('/nothing/mounted')
  split = split_of(root)
  with pytest.raises(
    UnreadableSample, match=r'gone\.png cannot be read \(No su'
  ):
    split[names(split).index('gone')]
  said = capsys.readouterr().out
  assert f'left out of {root}/images/train: 1 no extension\n' in said


@pytest.mark.parametrize('kind', ['images', 'masks'])
def test_two_ways_into_a_folder_give_it_two_names(root, kind):
  """Neither is dropped, whichever the file system lists first."""
  (root / kind / 'train' / 'y').symlink_to('x')
  with pytest.raises(
    UserError, match=r'2 (images|masks) have no .*a\.png, c\.pn'
  ):
    split_of(root)


def test_masks_among_the_images_are_no_images(root):
  """As Roboflow and others write them, with flags for the masks alone."""
  for path in walk(root / 'masks' / 'train'):
    into = root / 'images' / path.relative_to(root / 'masks')
    path.rename(into.with_name(f'{into.stem}_mask.png'))
  flags = {'masks': 'images', 'mask_suffix': '_mask'}
  assert names(split_of(root, **flags)) == ['a', 'b', 'x/a', 'x/c']
  with pytest.raises(
    UserError, match=r'it has 8 masks\. Set .*image_suffix and'
  ):
    split_of(root, masks='images')
  # Photographs and masks that differ in nothing but the extension.
  for path in walk(root / 'images' / 'train'):
    if path.stem.endswith('_mask'):
      path.rename(path.with_name(path.name.replace('_mask', '')))
    else:
      path.rename(path.with_suffix('.jpg'))
  split = split_of(root, masks='images')
  assert names(split) == ['a', 'b', 'x/a', 'x/c']
  assert {Path(pair.image).suffix for pair in split.pairs} == {'.jpg'}


# What is done to the names of images and of masks, and the flags that help.
AFFIXES = [
  ('img_{}', 'mask_{}', '--{}image_prefix=img_ --{}mask_prefix=mask_'),
  ('{}', 'mask {}', "'--{}mask_prefix=mask '"),
  ('{}_rgb', '{}_gt', '--{}image_suffix=_rgb --{}mask_suffix=_gt'),
  ('{}', '{}_labelIds', '--{}mask_suffix=_labelIds'),
  (
    'p-{}.i',
    '{}.m',
    '--{}image_prefix=p- --{}image_suffix=.i --{}mask_suffix=.m',
  ),
]


@pytest.mark.parametrize(('image', 'mask', 'flags'), AFFIXES)
def test_the_affixes_that_pair_all_files_are_named(root, image, mask, flags):
  for kind, form in (('images', image), ('masks', mask)):
    for path in walk(root / kind / 'train'):
      path.rename(path.with_name(form.format(path.stem) + path.suffix))
  with pytest.raises(UserError) as raised:
    split_of(root)
  told = str(raised.value).partition('All have a partner with ')[2]
  assert told == flags.replace('{}', 'config.data.folder.')
  given = dict(
    x[len('--config.data.folder.') :].split('=') for x in shlex.split(told)
  )
  assert names(split_of(root, **given)) == ['a', 'b', 'x/a', 'x/c']


@pytest.mark.parametrize(
  ('image', 'mask', 'message'),
  [
    ('.heic', '.png', r'1 mask has no image.*\(a\.png\); a\.heic cannot be '
     r'read as image\. Save them as PNG or JPEG'),
    ('.png', '.tif', r'1 image has no mask .*; a\.tif cannot be read as mask.*'
     r'palette2id --masks {0}/masks --classes {0}/classes.txt --out '
     r'{0}/masks_ids --indices\nThen add --config.data.folder.masks=masks_ids'),
    ('.png', '.npy', r'a\.npy cannot be read as mask\. Write them as PNG'),
    ('.png', '.json', r'a\.json cannot be .*Polygons are no masks: docs/own-d'),
    ('.png', '.jpg', r'a\.jpg cannot be read as mask\. JPEG changes'),
    # Neither is read, so that none lacks a partner.
    ('.gif', '.GIF', r'^a\.gif cannot be read as image; a\.GIF cannot be read '
     'as mask.*PNG or JPEG.*palette2id'),
    ('.dcm', '.npy', r'^a\.dcm cannot be read as image; a\.npy cannot be read'),
  ],
)  # fmt: skip
def test_a_partner_with_another_ending_is_named(root, image, mask, message):
  for kind, ending in (('images', image), ('masks', mask)):
    path = root / kind / 'train' / 'a.png'
    path.rename(path.with_suffix(ending))
  with pytest.raises(UserError, match=f'(?s){message.format(root)}'):
    split_of(root)


def test_jfif_files_are_jpegs(root):
  path = root / 'images' / 'train' / 'a.png'
  with Image.open(path) as picture:
    picture.save(path.with_suffix('.jfif'), 'JPEG')
  path.unlink()
  assert split_of(root)[0]['image'].shape == (12, 16, 3)


def test_tiff_masks_are_converted_as_the_message_says(root):
  for path in walk(root / 'masks' / 'train'):
    with Image.open(path) as picture:
      picture.save(path.with_suffix('.tif'))
    path.unlink()
  with pytest.raises(
    UserError, match=r'no masks in .* it has 4 \.tif\.'
  ) as told:
    split_of(root)
  _, command, then = str(told.value).splitlines()
  palette2id.main(shlex.split(command.partition('palette2id')[2]))
  key, _, value = then.removeprefix('Then add ')[:-1].partition('=')
  assert key == '--config.data.folder.masks'
  assert len(split_of(root, masks=value)) == 4
  split_of(root, masks=value)[0]


def test_tiff_masks_among_the_images_are_converted_as_well(root):
  for path in walk(root / 'masks' / 'train'):
    into = root / 'images' / path.relative_to(root / 'masks')
    with Image.open(into) as picture:
      picture.save(into.with_suffix('.jpg'))
    into.unlink()
    with Image.open(path) as picture:
      picture.save(into.with_name(f'{into.stem}_m.tif'))
  flags = {'masks': 'images', 'mask_suffix': '_m', 'image_suffix': '.jpg'}
  with pytest.raises(UserError, match=r'no masks in .*4 \.tif') as told:
    split_of(root, **flags)
  _, command, then = str(told.value).splitlines()
  palette2id.main(shlex.split(command.partition('palette2id')[2]))
  flags['masks'] = then.rpartition('=')[2][:-1]
  assert names(split_of(root, **flags)) == ['a', 'b', 'x/a', 'x/c']


def test_the_lines_of_the_page_draw_polygons(root, monkeypatch):
  (code,) = blocks_of('own-data.md')
  (root / 'mydata' / 'images').mkdir(parents=True)
  square = [[4, 2], [9, 2], [9, 8], [4, 8]]
  about = {'imageWidth': 16, 'imageHeight': 12, 'shapes': []}
  about['shapes'] += [{'label': 'flower', 'points': square}]
  (root / 'mydata/images/a.json').write_text(json.dumps(about))
  monkeypatch.chdir(root)
  exec(code, {})
  with Image.open('mydata/masks/a.png') as picture:
    mask = np.array(picture)
  expected = np.zeros((12, 16), np.uint8)
  expected[2:9, 4:10] = 2
  assert_equal(mask, expected)


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


def drawn(count, split='val', seed=0, fraction=0.2, without=()):
  names = [f'photo {i}' for i in range(count) if i not in without]
  pairs = [Pair(name, '', '') for name in names]
  found = draw_split(pairs, split, ('train', 'val'), fraction, seed)
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


def test_a_single_sample_cannot_be_shared(root):
  flatten(root)
  for kind in ('images', 'masks'):
    for path in walk(root / kind)[1:]:
      path.unlink()
  assert len(split_of(root)) == 1
  with pytest.raises(
    UserError, match=r"1 sample in .*none for the split 'val'"
  ):
    split_of(root, 'val')


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


def rename(root, **new):
  """Renames the splits' folders of images and masks."""
  for kind in ('images', 'masks'):
    for old, name in new.items():
      (root / kind / old).rename(root / kind / name)


@pytest.mark.parametrize(
  'new',
  [
    {'train': 'Train', 'val': 'Val'},
    {'train': 'TRAIN'},
    {'train': 'training', 'val': 'validation'},
    {'val': 'valid'},
    {'train': 'train2017', 'val': 'val2017'},
    {'train': 'Training_Set', 'val': 'dev-set'},
  ],
)
def test_other_names_of_splits_are_understood(root, new, capsys):
  rename(root, **new)
  (root / 'images' / 'test').mkdir()
  assert names(split_of(root)) == ['a', 'b', 'x/a', 'x/c']
  assert names(split_of(root, 'val')) == ['E.e', 'd']
  said = capsys.readouterr().out
  for split, name in new.items():
    assert f"{root}/images/{name} is the split '{split}'\n" in said
  # The same above the two folders, and in one folder of both.
  for split in ({'train': 'train', 'val': 'val'} | new).values():
    for kind in ('images', 'masks'):
      (root / split / kind).parent.mkdir(exist_ok=True)
      (root / kind / split).rename(root / split / kind)
  paths = {'images': '{split}/images', 'masks': '{split}/masks'}
  assert names(split_of(root, 'val', **paths)) == ['E.e', 'd']


@pytest.mark.parametrize(
  ('new', 'message', 'flags'),
  [
    (
      {'train': 'Train', 'val': 'b'},
      'there are: Train, b',
      {'eval_split': 'b'},
    ),
    (
      {'train': 'train', 'val': 'w'},
      'there are: train, w',
      {'eval_split': 'w'},
    ),
  ],
)
def test_a_split_that_is_missing_is_not_drawn(root, new, message, flags):
  rename(root, **new)
  with pytest.raises(UserError, match=f'{message}.*eval_split to their names'):
    split_of(root, 'val')
  config = data_config(root, **flags)
  assert names(open_data(config, config.eval_split)) == ['E.e', 'd']


def test_two_folders_for_a_split_are_not_guessed(root):
  rename(root, val='val_old')
  shutil.copytree(root / 'images' / 'val_old', root / 'images' / 'val_new')
  with pytest.raises(UserError, match=r"'val': val_new, val_old.*names of two"):
    split_of(root, 'val')
  config = data_config(root, eval_split='val_old')
  assert names(open_data(config, 'val_old')) == ['E.e', 'd']


def test_folders_of_other_things_are_no_splits(root):
  rename(root, train='train station', val='valley')
  everything = names(split_of(root)) + names(split_of(root, 'val'))
  assert len(everything) == 6
  rename(root, **{'train station': 'train and val'})
  assert len(names(split_of(root)) + names(split_of(root, 'val'))) == 6


@pytest.mark.parametrize('name', ['', ' ', '.', '..', '../masks', '/tmp'])
def test_names_that_are_no_folder_of_a_split(root, name):
  for key in ('train_split', 'eval_split'):
    config = data_config(root, **{key: name})
    for split in (name, 'val'):
      with pytest.raises(UserError, match='no name of a folder'):
        open_data(config, split)


def test_a_folder_that_does_not_exist(root):
  for folder in (root / 'nodata', root / 'classes.txt'):
    with pytest.raises(UserError, match=f'no folder {folder}; set .*data_dir'):
      split_of(folder)


# ---- Lists as others write them ---------------------------------------------

LINES = [
  'images/train/b.png masks/train/b.png',
  'images/train/x/a.png masks/train/x/a.png',
]


@pytest.mark.parametrize(
  ('text', 'coding'),
  [
    ('\r\n'.join(LINES), 'utf-8-sig'),
    ('\n'.join(LINES).replace('/', '\\'), 'utf-8'),
    ('\n'.join(LINES).replace(' ', ','), 'utf-8'),
    ('\n'.join(LINES).replace(' ', ', '), 'utf-8'),
    ('\n'.join(LINES).replace(' ', ';'), 'utf-8'),
    ('"' + '"\n"'.join(LINES).replace(' ', '","') + '"', 'utf-8'),
    ('\n'.join(LINES), 'utf-16'),
  ],
)
def test_lists_from_spreadsheets_and_windows(root, text, coding):
  (root / 'all.txt').write_bytes(text.encode(coding))
  options = {'lists': 'all.txt', 'eval_fraction': 0.5}
  pairs = [
    *split_of(root, **options).pairs,
    *split_of(root, 'val', **options).pairs,
  ]
  assert sorted(names_of(pairs)) == ['images/train/b', 'images/train/x/a']
  assert all(Path(file).is_file() for pair in pairs for file in pair[1:])


def names_of(pairs):
  return [pair.name for pair in pairs]


def test_files_without_extensions_are_no_names(root):
  (root / 'images' / 'train' / 'a.PNG').touch()  # Not a folder of pairs.
  for kind in ('images', 'masks'):
    shutil.copy(root / kind / 'train/b.png', root / kind / 'bare')
  (root / 'train.txt').write_text('images/bare masks/bare')
  assert names(split_of(root, lists='{split}.txt')) == ['images/bare']


def test_paths_with_blanks_commas_and_backslashes(root):
  shutil.copy(root / 'images/train/b.png', root / 'my photo, 1.png')
  shutil.copy(root / 'masks/train/b.png', root / 'back\\slash.png')
  for line in (
    'my photo, 1.png\tback\\slash.png',
    '"my photo, 1.png";back\\slash.png',
  ):
    (root / 'train.txt').write_text(line)
    (pair,) = split_of(root, lists='{split}.txt').pairs
    assert pair.name == 'my photo, 1'
    assert pair.mask == str(root / 'back\\slash.png')


@pytest.mark.parametrize(
  'lines',
  [
    ['a', 'x/c'],
    ['a.png', 'x/c.jpg'],
    ['x\\c', '"a"'],
    ['images/train/a.png', 'images/train/x/c.png'],
  ],
)
def test_lists_of_names_as_those_of_pascal_voc(root, lines):
  (root / 'train.txt').write_text('\n'.join(lines))
  folders = {'images': 'images/{split}', 'masks': 'masks/{split}'}
  # Files that are not listed need no partner.
  (root / 'images' / 'train' / 'unlabelled.png').touch()
  pairs = split_of(root, lists='{split}.txt', **folders).pairs
  assert sorted(names_of(pairs)) == ['a', 'x/c']
  assert pairs[0].mask.startswith(str(root / 'masks' / 'train'))


@pytest.mark.parametrize(
  ('lines', 'message'),
  [
    (
      ['a', 'lone'],
      'line 2: lone has no file in .*/masks/train. Add it, or rem',
    ),
    (['nothing'], "line 1: 'nothing' is not an image .* nor the name of both"),
    (['image,mask'], '1 file is missing|2 files are missing .*mask in line 1'),
    (['a', 'a.png'], 'line 2: a second image named a'),
  ],
)
def test_names_without_files_are_refused(root, lines, message):
  (root / 'images' / 'train' / 'lone.png').touch()
  (root / 'train.txt').write_text('\n'.join(lines))
  folders = {'images': 'images/{split}', 'masks': 'masks/{split}'}
  with pytest.raises(UserError, match=message):
    split_of(root, lists='{split}.txt', **folders)


@pytest.mark.parametrize(
  ('lines', 'message'),
  [
    (['a b.png m.png'], "line 1: 'a b.png m.png' is not .*Put a tab between"),
    (['a.png m.png', 'a.jpg m.png'], 'line 2: a second image named a'),
    (['a.png m.png'], r'2 files are missing \(\S*a\.png in line 1, \S*m\.png'),
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
