"""A user's own splits: drawn, in folders of many names, and in lists."""

import re
import shutil
from pathlib import Path

import pytest
from data import coast
from data.coast import TRAIN, both, names, not_opened, split_of, write_samples
from numpy.testing import assert_equal

from resnest_jax.data.own.pairing import Pair, walk
from resnest_jax.data.own.splits import draw_split


@pytest.fixture
def root(tmp_path):
  return write_samples(tmp_path)


def flatten(root):
  """The same files without the splits' folders: names like train_b."""
  for folder in both(root, ''):
    for path in walk(folder):
      path.rename(folder / '_'.join(path.relative_to(folder).parts))
    shutil.rmtree(folder / 'train')
    shutil.rmtree(folder / 'val')


def test_names_that_are_not_utf_8_are_drawn_and_read(root):
  flatten(root)
  for path in both(root, 'train_a.png'):
    path.rename(path.with_name('\udce4.png'))
  read = {x['name'] for kind in ('train', 'val') for x in split_of(root, kind)}
  assert '\udce4' in read
  assert len(read) == 6


def test_drawn_splits_share_out_all_samples(root):
  flatten(root)
  everything = [path.stem for path in walk(root / 'images')]
  options = {'eval_fraction': 0.5, 'split_seed': 1}
  train, val = (names(root, x, **options) for x in ('train', 'val'))
  assert (len(train), len(val)) == (3, 3)
  assert sorted(train + val) == everything
  not_opened(root, r"no split 'test'; 'train' and", 'test', eval_split='test')
  # A single sample cannot be shared.
  for folder in both(root, ''):
    for path in walk(folder)[1:]:
      path.unlink()
  assert len(split_of(root)) == 1
  not_opened(root, r'1 sample in .*none for the split val', 'val')


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
  assert coast.pairs_of_both(root, **one) == sorted(split.pairs)


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
  coast.write_pair(root, 'test/f')
  coast.write_pair(root, 'loose')
  assert names(root, 'test') == ['f']
  assert (names(root), names(root, 'val')) == (TRAIN, coast.VAL)
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
  assert (names(root, **paths), names(root, 'val', **paths)) == (
    TRAIN,
    coast.VAL,
  )


@pytest.mark.parametrize(('train', 'val'), [('Train', 'b'), ('train', 'w')])
def test_a_split_that_is_missing_is_not_drawn(root, train, val):
  rename(root, train=train, val=val)
  not_opened(root, f'are: {train}, {val}.*eval_split to their names', 'val')
  assert names(root, val, eval_split=val) == coast.VAL


def test_two_folders_for_a_split_are_not_guessed(root):
  rename(root, val='val_old')
  shutil.copytree(root / 'images' / 'val_old', root / 'images' / 'val_new')
  not_opened(root, r"'val': val_new, val_old.*names of two", 'val')
  assert names(root, 'val_old', eval_split='val_old') == coast.VAL


def test_folders_of_other_things_are_no_splits(root, capsys):
  rename(root, train='train station', val='valley')
  assert len(coast.pairs_of_both(root)) == 6
  told = capsys.readouterr().out
  assert 'sub folders: train station (4 files), valley (2 files)\n' in told
  rename(root, **{'train station': 'train and val'})
  assert len(coast.pairs_of_both(root)) == 6


@pytest.mark.parametrize('name', ['', ' ', '.', '..', '../masks', '/tmp'])
def test_names_that_are_no_folder_of_a_split(root, name):
  for key in ('train_split', 'eval_split'):
    for split in (name, 'val'):
      not_opened(root, 'no name of a folder', split, **{key: name})


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
  not_opened(root, message, lists='{split}.txt', **VOC)
