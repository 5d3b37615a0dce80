"""Masks as programs write them: training, the doctor and palette2id agree.

What the doctor finds right is trained on, and each remedy leads there.
"""

import io
import itertools
import re
import shlex
import struct
import zlib

import cv2
import numpy as np
import pytest
from data.pictures import tiff
from numpy.testing import assert_equal
from PIL import Image
from small import RUN, small_flags

from resnest_jax.config import load_config
from resnest_jax.data import prepare
from resnest_jax.data.datasets import open_data
from resnest_jax.data.doctor.examine import examine
from resnest_jax.data.doctor.rules import ERROR, diagnose
from resnest_jax.data.own.palette2id import main as palette2id
from resnest_jax.errors import UserError

CONFIG = 'configs/folder.py:mini'
COLOURS = np.array([[60, 60, 60], [34, 139, 34], [220, 20, 60]], np.uint8)
NAMES = ('background', 'leaf', 'flower')
THREE = '\n'.join(
  f'{name} {" ".join(map(str, colour))}'
  for name, colour in zip(NAMES, COLOURS, strict=True)
)
BLACK_AND_WHITE = '0: background\n255: leaf'


class Garden:
  """Photographs with masks of three classes, four for training, two not."""

  def __init__(self, root):
    self.root = root
    self.overrides = {}
    self.ids = {}
    rng = np.random.default_rng(0)
    for i in range(6):
      name = f'{"val" if i > 3 else "train"}/{i}'
      mask = np.zeros((40, 60), np.uint8)
      for k in (1, 2):
        x, y = rng.integers(4, 28, 2)
        mask[y : y + 9, x : x + 24] = k
      self.ids[name] = mask
      noise = rng.integers(-25, 25, (40, 60, 3))
      image = (COLOURS[mask] + noise).clip(0, 255).astype(np.uint8)
      self.path('images', name, '.jpg').parent.mkdir(
        parents=True, exist_ok=True
      )
      cv2.imwrite(str(self.path('images', name, '.jpg')), image[..., ::-1])
    self.classes(THREE)
    self.write(encode)

  def path(self, kind, name, ending='.png'):
    return self.root / kind / f'{name}{ending}'

  def classes(self, text):
    (self.root / 'classes.txt').write_text(text)

  def write(self, encoded, which=None):
    """Writes `encoded(ids)`, bytes, as the masks."""
    for name in which or self.ids:
      path = self.path('masks', name)
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(encoded(self.ids[name]))

  def splits(self):
    config = load_config(
      CONFIG, {'data.data_dir': str(self.root)} | self.overrides
    )
    return config, [open_data(config.data, x) for x in ('train', 'val')]

  def found(self):
    """Rule -> finding, of the doctor."""
    return {d.rule.name: d.finding for d in diagnose(examine(*self.splits()))}

  def errors(self):
    found = diagnose(examine(*self.splits()))
    return {d.rule.name for d in found if d.rule.severity == ERROR}

  def labels(self):
    """What training gets."""
    return [sample['label'] for split in self.splits()[1] for sample in split]

  def obey(self, remedy, call):
    """Runs the command of a remedy, and sets what it says."""
    (words,) = re.findall(r'resnest_jax\.data\.prepare (.*)', remedy)
    call(prepare.main, *shlex.split(words))
    (flag,) = shlex.split(re.findall(r'add (\S*--config\S+)\.$', remedy)[0])
    key, _, value = flag.removeprefix('--config.').partition('=')
    self.overrides[key] = value

  def rewrite(self, remedy):
    """Writes the classes file with the first lines that a remedy shows."""
    lines = itertools.dropwhile(
      lambda x: not x.startswith('  '), remedy.split('\n')
    )
    lines = itertools.takewhile(lambda x: x.startswith('  '), lines)
    self.classes('\n'.join(line.strip() for line in lines))


@pytest.fixture
def garden(tmp_path):
  return Garden(tmp_path)


# ---- Files of many kinds ----------------------------------------------------


def encode(array, ending='.png'):
  return cv2.imencode(ending, np.asarray(array))[1].tobytes()


def few_bits(ids, bits, spread=False):
  """A grey PNG of 1, 2 or 4 bits, which neither OpenCV nor Pillow writes."""
  ids = ids.astype(np.uint8)
  planes = np.unpackbits(ids[..., None], axis=-1)[..., 8 - bits :]
  rows = np.packbits(planes.reshape(len(ids), -1), axis=-1)
  lines = np.pad(rows, ((0, 0), (1, 0)))

  def chunk(kind, content):
    checked = kind + content
    return (
      struct.pack('>I', len(content))
      + checked
      + struct.pack('>I', zlib.crc32(checked))
    )

  head = struct.pack('>IIBBBBB', *ids.shape[::-1], bits, 0, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', head)
    + chunk(b'IDAT', zlib.compress(lines.tobytes()))
    + chunk(b'IEND', b'')
  )


def with_palette(colours):
  def encoded(ids):
    picture = Image.fromarray(ids).convert('P')
    picture.putpalette(np.asarray(colours).ravel().tolist())
    return pillow(picture)

  return encoded


def pillow(picture, kind='PNG', **options):
  file = io.BytesIO()
  picture.save(file, kind, **options)
  return file.getvalue()


def rgb(ids):
  return encode(COLOURS[ids][..., ::-1])


def grey_in_colour(ids):
  return encode(np.dstack([ids] * 3))


def wide_in_colour(ids):
  return encode(np.dstack([ids.astype(np.uint16)] * 3))


def grey_alpha(ids):
  return pillow(Image.fromarray(ids).convert('LA'))


def grey_rgba(ids):
  return encode(np.dstack([ids, ids, ids, np.full_like(ids, 255)]))


OTHERS = np.random.default_rng(1).integers(1, 250, (3, 3))


@pytest.mark.parametrize(
  ('encoded', 'rule'),
  [
    (lambda ids: few_bits(ids, 2), 'mask_depth'),
    (lambda ids: few_bits(ids, 4), 'mask_depth'),
    (lambda ids: encode(ids.astype(np.uint16)), 'mask_depth'),
    (grey_in_colour, 'grey_masks_in_colour'),
    (wide_in_colour, 'grey_masks_in_colour'),
    (grey_alpha, 'grey_masks_in_colour'),
    (grey_rgba, 'grey_masks_in_colour'),
    (rgb, 'colour_masks'),
    (with_palette(OTHERS), 'colour_masks'),
    (lambda ids: encode(ids, '.tif'), 'refused'),
    (lambda ids: encode(ids, '.bmp'), 'refused'),
  ],
)
def test_the_command_of_a_remedy_leads_to_a_training(
  garden, call, encoded, rule
):
  garden.write(encoded)
  (found,) = garden.found().values()
  assert garden.errors() == {rule}
  garden.obey(found.remedy, call)
  assert garden.errors() == set()
  for label, ids in zip(garden.labels(), garden.ids.values(), strict=True):
    assert_equal(label, ids)


@pytest.mark.parametrize('classes', ['background\nleaf', BLACK_AND_WHITE])
def test_masks_of_one_bit(garden, call, classes):
  """Either number may be in the classes file: the stored 1, or the white."""
  garden.classes(classes)
  garden.write(lambda ids: few_bits(ids > 0, 1))
  with pytest.raises(UserError, match='is a 1-bit grey picture') as error:
    garden.labels()
  garden.obey(str(error.value), call)
  assert garden.errors() == set()
  for label, ids in zip(garden.labels(), garden.ids.values(), strict=True):
    assert_equal(label, ids > 0)


def transparent(ids):
  # A note that 1 is not to be shown, which says nothing of its class.
  return pillow(Image.fromarray(ids), transparency=1)


@pytest.mark.parametrize(
  'encoded',
  [
    encode,
    transparent,
    lambda ids: few_bits(ids > 0, 1),
    lambda ids: few_bits(ids * 0, 1),
    lambda ids: encode(ids, '.jpg'),
    lambda ids: encode(ids, '.webp'),
    lambda ids: encode(ids.T),
    lambda ids: encode(ids + np.uint8(60)),
    lambda ids: encode(ids.astype(np.uint16)),
    wide_in_colour,
    grey_alpha,
    rgb,
    with_palette(COLOURS),
    lambda ids: encode(ids)[:-30],
  ],
)
def test_the_doctor_finds_what_training_refuses(garden, encoded):
  garden.write(encoded, which=['train/2'])
  try:
    garden.labels()
    refused = set()
  except UserError:
    refused = {'error'}
  assert bool(garden.errors()) == bool(refused)


def test_masks_that_are_jpegs_within(garden):
  garden.write(lambda ids: encode(ids, '.jpg'))
  (found,) = garden.found().values()
  assert 'is not a PNG but JPEG' in found.what
  assert 'write the originals as PNG' in found.remedy


@pytest.mark.parametrize('lists', [False, True])
def test_photographs_among_the_masks_are_no_masks(garden, call, lists):
  """As in Roboflow's export: both in one folder, in a folder for a split."""
  garden.write(lambda ids: encode(ids.astype(np.uint16)))
  for name in garden.ids:
    new = garden.root / f'{name}_mask.png'
    new.parent.mkdir(exist_ok=True)
    garden.path('masks', name).rename(new)
    garden.path('images', name, '.jpg').rename(garden.root / f'{name}.jpg')
  folder = {'masks': '{split}', 'images': '{split}', 'mask_suffix': '_mask'}
  folder['image_suffix'] = '.jpg'
  if lists:
    folder = {'lists': '{split}.txt'}
    for split, name in itertools.product(('train', 'val'), garden.ids):
      with (garden.root / f'{split}.txt').open('a') as file:
        if name.startswith(split):
          file.write(f'{name}.jpg {name}_mask.png\n')
  garden.overrides = {f'data.folder.{k}': v for k, v in folder.items()}
  found = [d.finding for d in diagnose(examine(*garden.splits()))]
  assert len(found) == 2  # Each split has a folder of its own.
  for finding in found:
    if lists:
      (words,) = re.findall('data.prepare (.*)', finding.remedy)
      call(prepare.main, *shlex.split(words))
      ((new, file),) = re.findall(r'files of (\S+) in (\S+)\.$', finding.remedy)
      split = new.rpartition('/')[2].removesuffix('_ids')
      path = garden.root / file.replace('{split}', split)
      lines = [line.split() for line in path.read_text().splitlines()]
      path.write_text(
        ''.join(f'{x} {new}/{y.rpartition("/")[2]}\n' for x, y in lines)
      )
    else:
      garden.obey(finding.remedy, call)
  assert garden.errors() == set()
  assert_equal(garden.labels(), list(garden.ids.values()))


# ---- The meaning of numbers -------------------------------------------------


def test_a_background_that_the_classes_file_lacks(garden):
  garden.classes('leaf\nflower 220 20 60')
  remedy = garden.found()['off_by_one'].remedy
  assert 'if 0 is the background, add a line for it in front' in remedy
  garden.rewrite(remedy)
  text = (garden.root / 'classes.txt').read_text()
  assert text == '0: background\n1: leaf\n2: flower 220 20 60'
  assert garden.errors() == set()
  assert_equal(garden.labels(), list(garden.ids.values()))


def test_a_zero_that_is_rare_is_no_background(garden):
  garden.classes('leaf\nflower')
  garden.write(
    lambda ids: encode(np.where(np.arange(60) < 2, 0, ids + (ids < 1)))
  )
  remedy = garden.found()['off_by_one'].remedy
  assert 'if 0 is no class, replace the lines by:\n  ignore: 0\n' in remedy
  garden.rewrite(remedy)
  assert garden.errors() == set()
  assert garden.labels()[0][0, :4].tolist() == [255, 255, 0, 0]


@pytest.mark.parametrize('values', [(0, 100, 200), (0, 127, 255)])
def test_positions_where_the_classes_file_has_values(garden, values):
  lines = zip(values, THREE.split('\n'), strict=True)
  garden.classes('\n'.join(f'{value}: {line}' for value, line in lines))
  (found,) = garden.found().values()
  assert 'only values from 0 to 2: the positions' in found.what
  garden.rewrite(found.remedy)
  assert garden.errors() == set()
  assert_equal(garden.labels(), list(garden.ids.values()))


def test_nineteen_classes_need_not_be_those_of_streets(garden):
  garden.classes('\n'.join(f'kind {k}' for k in range(19)))
  garden.write(lambda ids: encode(ids + np.uint8(18)))
  assert 'label_ids' not in garden.found()
  assert garden.errors() == {'unknown_values'}


def test_a_class_of_255_is_not_for_unknown_pixels(garden, call):
  garden.classes(BLACK_AND_WHITE)
  white = np.uint8(255)

  def with_a_stain(ids):
    mask = (ids > 0) * white
    mask[:2, :5] = 77
    return encode(mask)

  garden.write(with_a_stain)
  found = garden.found()['unknown_values']
  assert 'Name the values' in found.remedy
  assert 'Write 255' not in found.remedy
  assert 'to ignore' not in found.what
  words = ['--masks', garden.root / 'masks', '--out', garden.root / 'ids']
  words += ['--classes', garden.root / 'classes.txt', '--indices']
  with pytest.raises(UserError, match='77: 60 pixels') as error:
    palette2id(list(map(str, words)))
  assert '--unknown' not in str(error.value)
  assert '--indices' not in str(error.value)
  (line,) = re.findall('"(ignore: 77)"', found.remedy)
  garden.classes(f'{BLACK_AND_WHITE}\n{line}')
  assert garden.errors() == set()


@pytest.mark.parametrize('classes', [THREE, THREE.replace('\n', '\n# \n')])
def test_a_value_gets_a_class(garden, classes):
  garden.classes(classes)
  garden.write(lambda ids: encode(np.where(ids == 2, 77, ids).astype(np.uint8)))
  remedy = garden.found()['unknown_values'].remedy
  with pytest.raises(UserError) as error:
    garden.labels()
  line = '"77: name", with a value in all lines ("0: background", ...)'
  assert line in remedy
  assert line in str(error.value)
  lines = [f'{k}: {line}' for k, line in enumerate(THREE.split('\n')[:2])]
  garden.classes('\n'.join([*lines, '77: name']))
  assert garden.errors() == set()
  assert garden.found() == {}


@pytest.mark.parametrize('classes', ['background\nleaf', BLACK_AND_WHITE])
def test_smoothed_black_and_white(garden, classes):
  garden.classes(classes)
  garden.write(
    lambda ids: encode(cv2.GaussianBlur((ids > 0) * np.uint8(255), (5, 5), 0))
  )
  found = garden.found()['smoothed_masks']
  assert garden.errors() == {'smoothed_masks'}
  code = re.search(r'middle: (.*)\.$', found.remedy)[1]
  for name in garden.ids:
    path = str(garden.path('masks', name))
    exec(code, {'cv2': cv2, 'np': np, 'old': path, 'new': path})
  assert garden.errors() == set()
  different = [
    np.mean(label != (ids > 0))
    for label, ids in zip(garden.labels(), garden.ids.values(), strict=True)
  ]
  assert max(different) < 0.02


def larger(how):
  return lambda ids: cv2.resize(ids, None, fx=3, fy=3, interpolation=how)


@pytest.mark.parametrize(
  ('change', 'smoothed'),
  [
    (larger(cv2.INTER_LINEAR), True),
    (larger(cv2.INTER_CUBIC), True),
    (larger(cv2.INTER_NEAREST), False),
    # A class that only lies around another, as in masks of cells.
    (lambda ids: (ids > 1) + cv2.dilate(ids // 2, np.ones((5, 5))), False),
  ],
)
def test_numbers_between_those_of_two_classes(garden, change, smoothed):
  for name in garden.ids:
    path = str(garden.path('images', name, '.jpg'))
    shape = change(garden.ids[name]).shape[::-1]
    cv2.imwrite(path, cv2.resize(cv2.imread(path), shape))
  garden.write(lambda ids: encode(change(ids)))
  assert ('maybe_smoothed' in garden.found()) == smoothed
  assert garden.errors() == set()


def test_a_rim_of_255_is_deliberate(garden):
  """As around the objects of Pascal VOC."""

  def rimmed(ids):
    rim = cv2.morphologyEx(ids, cv2.MORPH_GRADIENT, np.ones((3, 3)))
    return encode(np.where(rim > 0, 255, ids).astype(np.uint8))

  garden.write(rimmed)
  assert garden.found() == {}


def test_values_come_before_the_conversion(garden, call):
  garden.classes('leaf\nflower')
  garden.write(lambda ids: few_bits(ids, 2))
  found = garden.found()
  assert set(found) == {'mask_depth', 'off_by_one'}
  assert found['mask_depth'].remedy.startswith('Name their values in ')
  garden.rewrite(found['off_by_one'].remedy)
  garden.obey(found['mask_depth'].remedy, call)
  assert garden.errors() == set()
  assert_equal(garden.labels(), list(garden.ids.values()))


@pytest.mark.parametrize('split', ['', '/{split}'])
def test_lists_of_names_get_another_folder(garden, call, split):
  """As those of Pascal VOC."""
  garden.write(grey_in_colour)
  for part in ('train', 'val'):
    names = [x.rpartition('/') for x in garden.ids if x.startswith(part)]
    lines = [x[2] if split else ''.join(x) for x in names]
    (garden.root / f'{part}.txt').write_text('\n'.join(lines))
  garden.overrides = {
    'data.folder.lists': '{split}.txt',
    'data.folder.images': f'images{split}',
    'data.folder.masks': f'masks{split}',
  }
  found = diagnose(examine(*garden.splits()))
  for remedy in dict.fromkeys(d.finding.remedy for d in found):
    garden.obey(remedy, call)
  assert garden.errors() == set()
  assert_equal(garden.labels(), list(garden.ids.values()))


# ---- Colours ----------------------------------------------------------------


def test_colours_of_no_class_get_no_command(garden, call):
  """As in panoptic masks, whose colours number objects."""
  garden.write(lambda ids: encode(np.dstack([ids * 0, ids * 0, ids + 1])))
  remedy = garden.found()['colour_masks'].remedy
  assert 'palette2id' not in remedy
  assert 'has one of the colours (1, 0, 0), (2, 0, 0), (3, 0, 0)' in remedy
  with pytest.raises(UserError) as error:
    garden.labels()
  assert 'palette2id' not in str(error.value)
  garden.classes('background 1 0 0\nleaf 2 0 0\nflower 3 0 0')
  garden.obey(garden.found()['colour_masks'].remedy, call)
  assert_equal(garden.labels(), list(garden.ids.values()))


def test_some_colours_are_of_no_class(garden, call):
  garden.write(
    lambda ids: encode(
      np.where(ids[..., None] == 2, 9, COLOURS[ids][..., ::-1])
    )
  )
  remedy = garden.found()['colour_masks'].remedy
  assert remedy.startswith('1 colour is no class of ')
  assert '(9, 9, 9). Add them to it first, or add --unknown ignore' in remedy
  garden.obey(
    remedy.replace('masks_ids\n', 'masks_ids --unknown ignore\n'), call
  )
  expected = [np.where(x == 2, 255, x) for x in garden.ids.values()]
  assert_equal(garden.labels(), expected)


def test_classes_without_colours_get_them_first(garden, call):
  garden.classes(f'{THREE}\nstone')
  garden.write(rgb)
  remedy = garden.found()['colour_masks'].remedy
  assert remedy.startswith('Give stone a colour in ')
  garden.classes(f'{THREE}\nstone 1 2 3')
  garden.obey(remedy, call)
  assert garden.errors() == set()


def test_colours_are_known_by_a_palette_in_another_order(garden, call):
  """Its indices are numbers of classes as well, of the wrong ones."""
  order = [2, 0, 1]
  garden.write(
    lambda ids: with_palette(COLOURS[order])(
      np.argsort(order)[ids].astype(np.uint8)
    )
  )
  remedy = garden.found()['colour_masks'].remedy
  assert 'Add --indices if' in remedy
  garden.obey(remedy.partition('\nAdd --indices')[0], call)
  assert_equal(garden.labels(), list(garden.ids.values()))


# ---- palette2id alone --------------------------------------------------------


def test_few_bits_among_masks_of_eight(garden, call):
  """Programs that make files smaller write 0 and 255 with one bit."""
  garden.write(lambda ids: few_bits(ids > 0, 1), which=['train/2'])
  garden.write(lambda ids: few_bits(ids * 0, 1), which=['train/1'])
  words = ['--masks', garden.root / 'masks', '--out', garden.root / 'ids']
  words += ['--classes', garden.root / 'classes.txt', '--indices']
  words = list(map(str, words))
  message = r'(?s)train/2\.png has 1 bits .* may mean 1 or 255\. .*with 8 bits'
  with pytest.raises(UserError, match=message) as error:
    palette2id(words)
  code = re.search(r'8 bits first: (.*)\.$', str(error.value))[1]
  exec(code, {'cv2': cv2, 'path': str(garden.path('masks', 'train/2'))})
  palette2id(words)
  mask = cv2.imread(str(garden.root / 'ids/train/2.png'), -1)
  assert_equal(mask, (garden.ids['train/2'] > 0) * 255)
  assert not cv2.imread(str(garden.root / 'ids/train/1.png'), -1).any()


def test_a_link_to_nothing_is_an_error(garden):
  path = garden.path('masks', 'train/2')
  path.unlink()
  path.symlink_to('nowhere.png')
  words = ['--masks', garden.root / 'masks', '--out', garden.root / 'ids']
  words += ['--classes', garden.root / 'classes.txt', '--indices']
  with pytest.raises(UserError, match=r'train/2\.png'):
    palette2id(list(map(str, words)))
  assert not (garden.root / 'ids').exists()


@pytest.mark.parametrize(
  ('encoded', 'message'),
  [
    (lambda ids: encode(COLOURS[ids], '.jpg'), 'is a JPEG, whatever its name'),
    (lambda ids: encode(COLOURS[ids], '.webp'), 'is a WEBP, whatever its name'),
    (
      lambda ids: pillow(
        Image.fromarray(ids),
        'GIF',
        save_all=True,
        append_images=[Image.fromarray(ids.T.copy().reshape(ids.shape))],
      ),
      'has 2 pictures, and a mask is one',
    ),
    (
      lambda ids: pillow(Image.fromarray(ids.astype(np.float32)), 'TIFF'),
      'holds numbers with fractions',
    ),
  ],
)
def test_files_that_are_no_masks_within(garden, encoded, message):
  garden.write(encoded, which=['train/2'])
  words = ['--masks', garden.root / 'masks', '--out', garden.root / 'ids']
  words += ['--classes', garden.root / 'classes.txt', '--indices']
  with pytest.raises(UserError, match=message):
    palette2id(list(map(str, words)))
  assert not (garden.root / 'ids').exists()


# ---- Images -----------------------------------------------------------------


@pytest.mark.parametrize('bits', [16, 12])
@pytest.mark.parametrize('bands', [3, 4])
def test_images_of_more_bits(garden, bits, bands):
  expected = []
  for name in garden.ids:
    path = garden.path('images', name, '.jpg')
    image = cv2.imread(str(path))
    expected.append(image)
    wide = np.round(image * ((2**bits - 1) / 255)).astype(np.uint16)
    path.unlink()
    # As GDAL writes them, infrared last.
    wide = np.dstack([wide[..., ::-1], wide[..., 0] // 4])[..., :bands]
    path.with_suffix('.tif').write_bytes(tiff(wide, 0, grey=True))
  found = garden.found()['image_depth']
  code = re.search(r'file: (.*)\. Take', found.remedy)[1]
  for name in garden.ids:
    old = garden.path('images', name, '.tif')
    new = garden.path('images', name, '.png')
    exec(code, {'cv2': cv2, 'np': np, 'old': str(old), 'new': str(new)})
    old.unlink()
  assert garden.found() == {}
  samples = [x['image'] for split in garden.splits()[1] for x in split]
  for image, before in zip(samples, expected, strict=True):
    assert np.abs(image[..., ::-1].astype(int) - before).max() < 25


@pytest.mark.parametrize(
  ('ending', 'channels', 'said'),
  [
    ('.png', 4, '4 channels, of which the first 3 are used'),
    ('.tif', 4, '4 channels, of which the first 3 are used'),
    ('.webp', 4, '4 channels, of which the first 3 are used'),
    ('.bmp', 4, '4 channels, of which the first 3 are used'),
    ('.png', 3, ''),
    ('.tif', 1, ''),
  ],
)
def test_channels_that_are_not_used(garden, ending, channels, said):
  for name in garden.ids:
    path = garden.path('images', name, '.jpg')
    image = cv2.imread(str(path))
    path.unlink()
    image = np.dstack([image, image[..., 0]])[..., :channels].squeeze()
    cv2.imwrite(str(path.with_suffix(ending)), image)
  found = garden.found()
  assert garden.errors() == set()
  assert set(found) == ({'image_channels'} if said else set())
  assert not said or said in found['image_channels'].what


# ---- The whole way ----------------------------------------------------------


@pytest.mark.long
def test_training_starts_after_the_remedy(garden, call, run_script):
  garden.classes(BLACK_AND_WHITE)
  garden.write(lambda ids: few_bits(ids > 0, 1))
  command = ['train.py', '--config', CONFIG]
  command += [f'--config.data.data_dir={garden.root}']
  command += ['--workdir', garden.root / 'run']
  command += small_flags(RUN | {'model.head': 'fcn', 'train.total_steps': 1})
  text = run_script(*command, status=1).stderr
  assert 'error: mask_depth (train)' in text
  assert 'nevertheless' not in text
  remedy = text.partition('What to do: ')[2].partition('masks_ids.')[0]
  garden.obey(f'{remedy}masks_ids.', call)
  flags = [f'--config.{key}={value}' for key, value in garden.overrides.items()]
  assert 'nothing wrong' in run_script(*command, *flags).stdout
