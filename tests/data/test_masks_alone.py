"""`prepare own` of masks alone: colours and values become index masks."""

import functools

import numpy as np
import pytest
from data.pictures import with_palette
from data.refusals import refused
from data.small_archives import decode
from numpy.testing import assert_equal
from PIL import Image

from resnest_jax.data import prepare
from resnest_jax.data.own.pairing import walk

CLASSES = '3: road 128 64 128\n7 8: tree 34 139 34\n0: sky 0 0 0\nignore: 5\n'
COLOURS = np.uint8([(128, 64, 128), (34, 139, 34), (0, 0, 0)])
PLACES = np.random.default_rng(0).integers(0, 3, (20, 30))  # In these colours.
IDS = np.uint8([3, 7, 0])[PLACES]
MASK = Image.fromarray(COLOURS[PLACES])


@pytest.fixture
def convert(call, tmp_path):
  (tmp_path / 'classes.txt').write_text(CLASSES)
  (tmp_path / 'masks').mkdir()
  words = 'own {0}/masks --classes {0}/classes.txt --data_dir {0}/ids'
  words += ' --format mask_colours'
  return functools.partial(call, prepare.main, *words.format(tmp_path).split())


def stopped(convert, root, message, *flags):
  """The command says why it fails, and writes nothing."""
  refused(message, convert, *flags)
  assert sorted(x.name for x in root.iterdir()) == ['classes.txt', 'masks']


def ids_of(path):
  """The written mask, after a look at its kind."""
  encoded = path.read_bytes()
  assert encoded[24:26] == b'\x08\x00'  # 8 bits, grey
  return decode(encoded)


def test_every_kind_of_picture_becomes_an_index_mask(convert, tmp_path, capsys):
  masks, out = tmp_path / 'masks', tmp_path / 'ids'
  (masks / 'train').mkdir()
  MASK.save(masks / 'train' / 'a.PNG')
  MASK.rotate(180).convert('RGBA').save(masks / 'b.png')
  places = np.uint8(PLACES[:, ::-1])
  (masks / 'c.png').write_bytes(with_palette(COLOURS)(places))
  MASK.crop((0, 0, 8, 9)).save(masks / 'd.bmp')
  (masks / 'notes.txt').write_text('no mask')
  (masks / 'train' / 'e.webp').write_bytes(b'')
  convert()
  found = {str(x.relative_to(out)): ids_of(x) for x in walk(out)}
  expected = {'train/a.png': IDS, 'b.png': IDS[::-1, ::-1]}
  expected |= {'c.png': IDS[:, ::-1], 'd.png': IDS[:9, :8]}
  assert_equal(found, expected)
  left, *_, last = capsys.readouterr().out.splitlines()
  assert left == f'left out of {masks}: 1 .txt, 1 .webp'
  assert last == f'4 masks in {out}'
  refused('ids is there already', convert)


def test_unknown_colours_are_named(convert, tmp_path, capsys):
  first, second = np.array(MASK), np.array(MASK)
  first[0, :2] = second[0, :5] = 128, 64, 129
  second[1, 0] = 1, 2, 3
  Image.fromarray(first).save(tmp_path / 'masks' / 'a.png')
  Image.fromarray(second).save(tmp_path / 'masks' / 'b.png')
  message = (
    r"2: is of the class '\(128, 64, 129\)', which is not listed "
    r'\(2 pixels in a\.png, 5 pixels in b\.png\)\n'
    r"  1: .* '\(1, 2, 3\)', .* \(1 pixel in b\.png\)\n"
  )
  stopped(convert, tmp_path, message)
  convert('--skip')
  assert 'left out: 3 bad annotations' in capsys.readouterr().out
  assert (ids_of(tmp_path / 'ids' / 'b.png') == 255).sum() == 6


def test_indices_are_kept(convert, tmp_path):
  ids = IDS.copy()
  ids[0, :3] = 5, 8, 255
  of_no_class = with_palette([(0, 0, i) for i in range(256)])
  (tmp_path / 'masks' / 'palette.png').write_bytes(of_no_class(ids))
  Image.fromarray(ids == 3).save(tmp_path / 'masks' / 'one_bit.png')
  convert('--format', 'mask_values', '--skip')
  assert_equal(ids_of(tmp_path / 'ids' / 'palette.png'), ids)
  # 1 is no class here; 0 is.
  expected = np.where(ids == 3, 255, 0)
  assert_equal(ids_of(tmp_path / 'ids' / 'one_bit.png'), expected)


def test_no_value_of_no_class_is_kept(convert, tmp_path):
  """However many there are; and colours may be equal, which do not count."""
  text = CLASSES.replace('34 139 34', '0 0 0')
  (tmp_path / 'classes.txt').write_text(text)
  RAMP.save(tmp_path / 'masks' / 'a.png')
  convert('--format', 'mask_values', '--skip')
  expected = [x if x in (0, 3, 5, 7, 8) else 255 for x in range(30)]
  assert ids_of(tmp_path / 'ids' / 'a.png').tolist() == [expected]


RAMP = Image.fromarray(np.arange(30, dtype=np.uint8)[None])
DARK = '0: dark 0 0 0\n255: light 9 9 9\n'


REFUSED = [
  (RAMP, CLASSES, '--format mask_values', r"(?s)'1', which.*'15 more, as JPEG"),
  (MASK, CLASSES, '--format mask_values', r'has colours \(RGB\).*a\.png\)'),
  (MASK, 'road 128 64 128\ntree\n', '', 'gives no colour for tree; add'),
  (MASK, 'road 1 2 3\ntree 1 2 3', '', 'gives road, tree the same colours'),
  (MASK, DARK, '--skip', r'writes 255 .* a class has this value'),
  (MASK, CLASSES, '--max_pixels 9', r'30 x 20 pixels, more than 9 \('),
]


@pytest.mark.parametrize(('mask', 'classes', 'flags', 'message'), REFUSED)
def test_what_cannot_be_meant(convert, tmp_path, mask, classes, flags, message):
  mask.save(tmp_path / 'masks' / 'a.png')
  (tmp_path / 'classes.txt').write_text(classes)
  stopped(convert, tmp_path, message, *flags.format(tmp_path).split())


def test_a_damaged_mask_stops_and_leaves_nothing(convert, tmp_path):
  for name in 'abc':
    MASK.save(tmp_path / 'masks' / f'{name}.png')
  path = tmp_path / 'masks' / 'b.png'
  path.write_bytes(path.read_bytes()[:-40])
  stopped(convert, tmp_path, r'1: cannot be decoded .*\(b\.png\)')


NO_FOLDERS = [
  (['a.JFIF'], r'it has 1 \.jfif\. JPEG changes the values'),
  (['notes.txt'], 'there are no masks'),
]


@pytest.mark.parametrize(('files', 'message'), NO_FOLDERS)
def test_folders_that_cannot_be_meant(convert, tmp_path, files, message):
  for file in files:
    (tmp_path / 'masks' / file).touch()
  stopped(convert, tmp_path, message)
