"""`prepare palette2id`: coloured masks become index masks, exactly or not."""

import functools
import re

import cv2
import numpy as np
import pytest
from numpy.testing import assert_equal
from PIL import Image

from resnest_jax.data import prepare
from resnest_jax.data.own.pairing import walk
from resnest_jax.errors import UserError

CLASSES = '3: road 128 64 128\n7 8: tree 34 139 34\n0: sky 0 0 0\nignore: 5\n'
COLOURS = {3: (128, 64, 128), 7: (34, 139, 34), 0: (0, 0, 0)}


@pytest.fixture
def convert(call, tmp_path):
  """Runs the command in this process."""
  (tmp_path / 'classes.txt').write_text(CLASSES)
  (tmp_path / 'masks').mkdir()
  words = ['palette2id', '--masks', tmp_path / 'masks']
  words += ['--classes', tmp_path / 'classes.txt', '--out', tmp_path / 'ids']
  return functools.partial(call, prepare.main, *words)


def ids_of(path):
  """The written mask, after a look at its kind."""
  encoded = path.read_bytes()
  assert encoded[24:26] == b'\x08\x00'  # 8 bits, grey
  return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)


def some_ids(seed=0):
  rng = np.random.default_rng(seed)
  return rng.choice(np.array([0, 3, 7], np.uint8), (20, 30))


def coloured(ids):
  table = np.zeros((256, 3), np.uint8)
  table[list(COLOURS)] = list(COLOURS.values())
  return Image.fromarray(table[ids])


def palette_image(ids, palette):
  """A palette PNG with these indices."""
  picture = Image.fromarray(ids).convert('P')
  picture.putpalette([x for colour in palette for x in colour])
  return picture


def test_every_kind_of_picture_becomes_an_index_mask(convert, tmp_path, capsys):
  masks = tmp_path / 'masks'
  (masks / 'train').mkdir()
  expected = {name: some_ids(seed) for seed, name in enumerate('abcd')}
  coloured(expected['a']).save(masks / 'train' / 'a.PNG')
  coloured(expected['b']).convert('RGBA').save(masks / 'b.png')
  indices = np.searchsorted([0, 3, 7], expected['c']).astype(np.uint8)
  palette = [COLOURS[value] for value in (0, 3, 7)]
  palette_image(indices, palette).save(masks / 'c.png')
  coloured(expected['d']).save(masks / 'd.bmp')
  (masks / 'notes.txt').write_text('no mask')
  (masks / 'train' / 'e.webp').write_bytes(b'')
  convert()
  files = {'train/a.png': 'a', 'b.png': 'b', 'c.png': 'c', 'd.png': 'd'}
  out = tmp_path / 'ids'
  assert {str(x.relative_to(out)) for x in walk(out)} == set(files)
  for file, name in files.items():
    assert_equal(ids_of(out / file), expected[name])
  left = f'left out of {masks}: 1 .txt, 1 .webp\n'
  assert capsys.readouterr().out == f'{left}4 masks in {out}\n'


def test_unknown_colours_are_counted_and_named(convert, tmp_path, capsys):
  ids = some_ids()
  first, second = (np.array(coloured(ids)) for _ in range(2))
  first[0, :2] = 128, 64, 129
  second[0, :5] = 128, 64, 129
  second[1, 0] = 1, 2, 3
  Image.fromarray(first).save(tmp_path / 'masks' / 'a.png')
  Image.fromarray(second).save(tmp_path / 'masks' / 'b.png')
  message = (
    r'(?s)2 values or .* \(128, 64, 129\): 7 pixels, first in \S*/a\.png\n'
    r'  \(1, 2, 3\): 1 pixels, first in \S*/b\.png\n'
  )
  with pytest.raises(UserError, match=message):
    convert()
  assert sorted(x.name for x in tmp_path.iterdir()) == ['classes.txt', 'masks']

  convert('--unknown', 'ignore')
  ids[0, :5] = ids[1, 0] = 255
  assert_equal(ids_of(tmp_path / 'ids' / 'b.png'), ids)
  printed = capsys.readouterr().out
  assert 'became 255 (ignored):\n  (128, 64, 129): 7 pixels' in printed


def test_indices_are_kept(convert, tmp_path):
  masks = tmp_path / 'masks'
  ids = some_ids()
  ids[0] = 5, 8, 255, *ids[0, 3:]
  wrong_colours = [(0, 0, i) for i in range(256)]
  palette_image(ids, wrong_colours).save(masks / 'palette.png')
  Image.fromarray(ids).save(masks / 'grey.png')
  Image.fromarray(ids.astype(np.uint16)).save(masks / 'sixteen.png')
  small = np.where(ids == 3, 3, 0).astype(np.uint8)
  palette_image(small, wrong_colours[:4]).save(masks / 'two_bits.png', bits=2)
  Image.fromarray(small > 0).save(masks / 'one_bit.png')
  convert('--indices', '--unknown', 'ignore')
  out = tmp_path / 'ids'
  for name in ('palette', 'grey', 'sixteen'):
    assert_equal(ids_of(out / f'{name}.png'), ids)
  assert_equal(ids_of(out / 'two_bits.png'), small)
  # 1 is no class here; 0 is.
  expected = np.where(small > 0, 255, 0)
  assert_equal(ids_of(out / 'one_bit.png'), expected)


RAMP = Image.fromarray(np.arange(30, dtype=np.uint8)[None])
MASK = coloured(some_ids())


@pytest.mark.parametrize(
  ('mask', 'classes', 'flags', 'message'),
  [
    (RAMP, CLASSES, '--indices', r'(?s)\n  1: 1 pixels.*and 15 more'),
    (MASK, CLASSES, '--indices', r'a\.png is a colour picture .*Leave out'),
    (MASK, 'road 128 64 128\ntree\n', '', 'gives no colour for tree; add'),
    (
      *(MASK, '0: dark 0 0 0\n255: light 9 9 9\n', '--unknown ignore'),
      r'writes 255, but in .* is light',
    ),
    (MASK, CLASSES, '--masks none', r'no folder .*none'),
    (MASK, CLASSES, '--out {0}/masks/ids', 'masks/ids lies in --masks'),
  ],
)
def test_what_cannot_be_meant(convert, tmp_path, mask, classes, flags, message):
  mask.save(tmp_path / 'masks' / 'a.png')
  (tmp_path / 'classes.txt').write_text(classes)
  with pytest.raises(UserError, match=message):
    convert(*flags.format(tmp_path).split())
  assert sorted(x.name for x in tmp_path.iterdir()) == ['classes.txt', 'masks']


def test_nothing_is_overwritten(convert, tmp_path):
  coloured(some_ids()).save(tmp_path / 'masks' / 'a.png')
  convert()
  with pytest.raises(UserError, match='ids is there already'):
    convert()


def test_a_damaged_mask_stops_and_leaves_nothing(convert, tmp_path):
  path = tmp_path / 'masks' / 'b.png'
  for name in 'abc':
    coloured(some_ids()).save(tmp_path / 'masks' / f'{name}.png')
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(UserError, match=re.escape(f'{path} cannot be decoded')):
    convert()
  assert sorted(x.name for x in tmp_path.iterdir()) == ['classes.txt', 'masks']


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    (['a.jpg'], r'a\.jpg is a JPEG, which changes the colours'),
    (['a.JFIF'], r'a\.JFIF is a JPEG, which changes the colours'),
    (['a.png', 'a.tif'], r'a\.png and .*a\.tif would both become a\.png'),
    (['notes.txt'], 'there are no masks'),
  ],
)
def test_folders_that_cannot_be_meant(convert, tmp_path, files, message):
  for file in files:
    (tmp_path / 'masks' / file).touch()
  with pytest.raises(UserError, match=message):
    convert()
