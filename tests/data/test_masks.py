"""Masks as programs write them: training, the doctor and `own` agree.

What the doctor finds right is trained on, and each remedy leads there.
"""

import contextlib
import re

import cv2
import numpy as np
import pytest
from data.garden import BLACK_AND_WHITE, CLASSES, COLOURS, rgb
from data.pictures import exif_of, few_bits, saved, tiff, with_palette
from data.refusals import refused
from data.small_archives import encode
from numpy.testing import assert_equal
from PIL import Image

from resnest_jax.data.annotations.command import main as own
from resnest_jax.errors import UserError


def in_colour(ids):
  return encode(np.dstack([ids] * 3))


def grey_alpha(ids):
  return saved('PNG', Image.fromarray(ids).convert('LA'))


REMEDIED = [
  (lambda ids: few_bits(ids, 2), 'mask_depth'),
  (lambda ids: few_bits(ids, 4), 'mask_depth'),
  (in_colour, 'grey_masks_in_colour'),
  (lambda ids: in_colour(np.uint16(ids)), 'grey_masks_in_colour'),
  (grey_alpha, 'grey_masks_in_colour'),
  (lambda ids: encode(np.dstack([ids] * 3 + [ids | 255])),
   'grey_masks_in_colour'),
  (rgb, 'colour_masks'),
  (with_palette(COLOURS + np.uint8(9)), 'colour_masks'),
  (lambda ids: encode(ids, '.tif'), 'refused'),
  (lambda ids: encode(ids, '.bmp'), 'refused'),
]  # fmt: skip


@pytest.mark.parametrize(('encoded', 'rule'), REMEDIED)
def test_the_command_of_a_remedy_leads_to_a_training(garden, encoded, rule):
  garden.write(encoded)
  (found,) = garden.found().values()
  assert garden.errors() == {rule}
  assert (' 2 channels' in found.what) is (encoded is grey_alpha)
  folders = '--classes {0}/classes.txt --data_dir {0}/masks_ids'
  assert f' {folders.format(garden.root)}\n' in found.remedy
  garden.obey(found.remedy)
  garden.check()


@pytest.mark.parametrize('classes', ['background\nleaf', BLACK_AND_WHITE])
def test_masks_of_one_bit(garden, classes):
  """Either number may be in the classes file: the stored 1, or the white."""
  garden.classes(classes)
  garden.write(lambda ids: few_bits(ids > 0, 1))
  garden.obey(refused('is a 1-bit grey picture', garden.labels))
  garden.check(lambda ids: ids > 0)


def white(ids):
  return (ids > 0) * np.uint8(255)


FINE_OR_NOT = [
  encode,
  # A note that 1 is not to be shown, which says nothing of its class.
  lambda ids: saved('PNG', Image.fromarray(ids), transparency=1),
  lambda ids: few_bits(ids > 0, 1),
  lambda ids: few_bits(ids * 0, 1),
  lambda ids: encode(ids, '.jpg'),
  lambda ids: encode(ids, '.webp'),
  lambda ids: encode(ids.T),
  lambda ids: encode(ids + np.uint8(60)),
  *(in_colour, grey_alpha, rgb, with_palette(COLOURS)),
  lambda ids: encode(ids)[:-30],
]


@pytest.mark.parametrize('encoded', FINE_OR_NOT)
def test_the_doctor_finds_what_training_refuses(garden, encoded):
  garden.write(encoded, 'train/2')
  raised = pytest.raises(UserError)
  with raised if garden.errors() else contextlib.nullcontext():
    garden.labels()


def test_masks_that_are_jpegs_within(garden):
  garden.write(lambda ids: encode(ids, '.jpg'))
  (found,) = garden.found().values()
  said = 'is not a PNG but JPEG.*write the originals as PNG'
  assert re.search(said, f'{found.what} {found.remedy}')


def test_masks_of_other_sizes_may_be_turned(garden):
  path = garden.image('train/2')
  garden.write(lambda ids: encode(ids.T), 'train/2')
  found = [garden.found()['size_mismatch']]
  garden.write(encode)
  Image.open(path).save(path, exif=exif_of(6))
  found.append(garden.found()['size_mismatch'])
  assert [x.samples for x in found] == [('2',), ('2',)]
  turned = [re.search(r'(\d) of 1 image ha', x.remedy)[1] for x in found]
  assert turned == ['0', '1']


@pytest.mark.parametrize('lists', [False, True])
def test_photographs_among_the_masks_are_no_masks(garden, lists):
  garden.write(in_colour)
  # As in Roboflow's export: both in one folder, in a folder for a split.
  for name in garden.ids:
    new = garden.root / f'{name}.jpg'
    new.parent.mkdir(exist_ok=True)
    garden.image(name).rename(new)
    garden.mask(name).rename(new.with_name(f'{new.stem}_mask.png'))
  if lists:
    garden.use_lists(lambda name: f'{name}.jpg {name}_mask.png')
  else:
    garden.use(masks='{split}', images='{split}')
    garden.use(mask_suffix='_mask', image_suffix='.jpg')
  found = garden.diagnoses()
  assert len(found) == 2  # Each split has a folder of its own.
  for d in found:
    if not lists:
      garden.obey(d.finding.remedy)
      continue
    garden.convert(d.finding.remedy)
    new = f'{garden.root}/{d.split}_ids'
    assert f'files of {new} in {garden.root}/{{split}}.txt.' in d.finding.remedy
    path = garden.root / f'{d.split}.txt'
    path.write_text(path.read_text().replace(f' {d.split}/', f' {new}/'))
  garden.check()


def test_a_background_that_the_classes_file_lacks(garden):
  garden.classes('leaf\nflower 220 20 60')
  said = 'if 0 is the background, add a line for it in front'
  text = garden.rewrite('off_by_one', said)
  assert text == '0: background\n1: leaf\n2: flower 220 20 60'
  garden.check()


@pytest.mark.parametrize('values', [(0, 100, 200), (0, 127, 255)])
def test_positions_where_the_classes_file_has_values(garden, values):
  lines = zip(values, CLASSES.split('\n'), strict=True)
  garden.classes('\n'.join(f'{value}: {line}' for value, line in lines))
  assert set(garden.found()) == {'train_ids'}
  garden.rewrite('train_ids', 'only values from 0 to 2: the positions')
  garden.check()


def test_values_where_the_classes_file_has_positions(garden):
  garden.classes('background\nleaf')
  garden.write(lambda ids: encode(white(ids)))
  assert set(garden.found()) == {'stretched_masks'}
  text = garden.rewrite('stretched_masks', f'{garden.root}/classes.txt')
  assert text == BLACK_AND_WHITE
  garden.check(lambda ids: ids > 0)


def test_nineteen_classes_need_not_be_those_of_streets(garden):
  garden.classes('\n'.join(f'kind {k}' for k in range(19)))
  garden.write(lambda ids: encode(ids + np.uint8(18)))
  assert 'label_ids' not in garden.found()
  assert garden.errors() == {'unknown_values'}


def test_a_class_of_255_is_not_for_unknown_pixels(garden):
  garden.classes(BLACK_AND_WHITE)
  stain = np.arange(2400).reshape(40, 60) < 10
  garden.write(lambda ids: encode(np.where(stain, np.uint8(77), white(ids))))
  found = garden.found()['unknown_values']
  assert found.remedy.startswith('Name them')
  assert 'to ignore' not in found.what
  refused(r"6: .* '77', .* \(10 pixels in train/0", garden.to_ids)
  (line,) = re.findall('"(ignore: 77)"', found.remedy)
  garden.classes(f'{BLACK_AND_WHITE}\n{line}')
  assert garden.errors() == set()


VALUED = '0: background\n1: leaf\n{}: name'
COMMENTED = CLASSES.replace('\n', '\n# \n')


@pytest.mark.parametrize('classes', [CLASSES, COMMENTED, VALUED.format(2)])
def test_a_value_gets_a_class(garden, classes):
  garden.classes(classes)
  garden.write(lambda ids: encode(np.where(ids == 2, 77, ids)))
  found = [d.finding for d in garden.diagnoses()]
  line = '"77: name"'
  if classes != VALUED.format(2):
    line += ', with a value in all lines ("0: background", ...)'
  assert len(found) == 2
  assert 'that no class has: 77, on' in found[0].what
  assert line in found[0].remedy
  assert line in refused('.', garden.labels)
  for text in ('id;name\n0;background\n1;leaf', '["background", "leaf"]'):
    garden.classes(text)
    found.append(garden.found()['unknown_values'])
  for finding in found[-2:]:
    assert '("77: name" in the form of that file, ' in finding.remedy
    assert 'or "ignore: 77"; docs' in finding.remedy
  garden.classes(VALUED.format(77))
  assert garden.found() == {}
  garden.check()


@pytest.mark.parametrize('classes', ['background\nleaf', BLACK_AND_WHITE])
def test_smoothed_black_and_white(garden, classes):
  garden.classes(classes)
  garden.write(lambda ids: encode(cv2.GaussianBlur(white(ids), (5, 5), 0)))
  assert garden.errors() == {'smoothed_masks'}
  remedy = garden.found()['smoothed_masks'].remedy
  code = re.search(r'middle: (.*)\.$', remedy)[1]
  for path in map(str, map(garden.mask, garden.ids)):
    exec(code, {'cv2': cv2, 'np': np, 'old': path, 'new': path})
  assert garden.errors() == set()
  expected = [ids > 0 for ids in garden.ids.values()]
  different = np.not_equal(garden.labels(), expected).mean((1, 2))
  assert max(different) < 0.02


def larger(how):
  return lambda ids: cv2.resize(ids, None, fx=3, fy=3, interpolation=how)


CHANGES = [
  (larger(cv2.INTER_LINEAR), True),
  (larger(cv2.INTER_CUBIC), True),
  (larger(cv2.INTER_NEAREST), False),
  # A class that only lies around another, as in masks of cells.
  (lambda ids: (ids > 1) + cv2.dilate(ids // 2, np.ones((5, 5))), False),
]


@pytest.mark.parametrize(('change', 'smoothed'), CHANGES)
def test_numbers_between_those_of_two_classes(garden, change, smoothed):
  for name, ids in garden.ids.items():
    path = str(garden.image(name))
    image = cv2.resize(cv2.imread(path), change(ids).shape[::-1])
    cv2.imwrite(path, image)
  garden.write(lambda ids: encode(change(ids)))
  assert ('maybe_smoothed' in garden.found()) == smoothed
  assert garden.errors() == set()


def test_a_rim_of_255_is_deliberate(garden):
  # As around the objects of Pascal VOC.
  def rimmed(ids):
    rim = cv2.morphologyEx(ids, cv2.MORPH_GRADIENT, np.ones((3, 3)))
    return encode(np.where(rim > 0, 255, ids))

  garden.write(rimmed)
  assert garden.found() == {}


def test_values_come_before_the_conversion(garden):
  garden.classes('leaf\nflower')
  garden.write(lambda ids: few_bits(ids, 2))
  found = garden.found()
  assert set(found) == {'mask_depth', 'off_by_one'}
  assert found['mask_depth'].remedy.startswith('Name their values in ')
  garden.rewrite('off_by_one', 'classes.txt')
  garden.obey(found['mask_depth'].remedy)
  garden.check()


@pytest.mark.parametrize('split', ['', '/{split}'])
def test_lists_of_names_get_another_folder(garden, split):
  garden.write(in_colour)
  # As those of Pascal VOC.
  garden.use_lists(lambda name: name.rpartition('/')[2] if split else name)
  garden.use(images=f'images{split}', masks=f'masks{split}')
  for remedy in dict.fromkeys(d.finding.remedy for d in garden.diagnoses()):
    garden.obey(remedy)
  garden.check()


def test_colours_of_no_class_get_no_command(garden):
  # As in panoptic masks, whose colours number objects.
  garden.write(lambda ids: encode(np.dstack([ids * 0, ids * 0, ids + 1])))
  remedy = garden.found()['colour_masks'].remedy
  assert '--format' not in remedy
  assert 'has one of the colours (1, 0, 0), (2, 0, 0), (3, 0, 0)' in remedy
  assert '--format' not in refused('.', garden.labels)
  garden.classes('background 1 0 0\nleaf 2 0 0\nflower 3 0 0')
  garden.obey(garden.found()['colour_masks'].remedy)
  garden.check()


def test_some_colours_are_of_no_class(garden):
  colours = np.uint8([*COLOURS[:2], (9, 9, 9)])
  garden.write(lambda ids: encode(colours[ids][..., ::-1]))
  remedy = garden.found()['colour_masks'].remedy
  assert remedy.startswith('1 colour is no class of ')
  assert '(9, 9, 9). Add them to it first, or add --skip' in remedy
  garden.obey(remedy.replace('masks_ids\n', 'masks_ids --skip\n'))
  garden.check(lambda ids: np.where(ids == 2, 255, ids))


def test_classes_without_colours_get_them_first(garden):
  garden.classes(f'{CLASSES}\nstone')
  garden.write(rgb)
  remedy = garden.found()['colour_masks'].remedy
  assert remedy.startswith('Give stone a colour in ')
  garden.classes(f'{CLASSES}\nstone 1 2 3')
  garden.obey(remedy)
  garden.check()


def test_colours_are_known_by_a_palette_in_another_order(garden):
  # Its indices are numbers of classes as well, of the wrong ones.
  order = [2, 0, 1]
  swapped = with_palette(COLOURS[order])
  garden.write(lambda ids: swapped(np.uint8(np.argsort(order))[ids]))
  remedy = garden.found()['colour_masks'].remedy
  assert 'Say --format mask_values if' in remedy
  garden.obey(remedy.partition('\nSay --format')[0])
  garden.check()


def test_few_bits_among_masks_of_eight(garden):
  # Programs that make files smaller write 0 and 255 with one bit.
  garden.write(lambda ids: few_bits(ids > 0, 1), 'train/2')
  garden.write(lambda ids: few_bits(ids * 0, 1), 'train/1')
  message = r'has 1 bits .* may mean 1 or 255\. .*with 8 bits.*train/2\.png\)'
  told = refused(message, garden.to_ids)
  code = re.search(r'8 bits first: (.*) \(train', told)[1]
  exec(code, {'cv2': cv2, 'path': str(garden.mask('train/2'))})
  garden.to_ids()
  for name, expected in (('1', 0), ('2', white(garden.ids['train/2']))):
    path = garden.root / 'ids' / 'train' / f'{name}.png'
    assert_equal(cv2.imread(str(path), -1), expected)


def two_frames(ids):
  first, *more = map(Image.fromarray, (ids, ids[::-1]))
  return saved('GIF', first, save_all=True, append_images=more)


@pytest.mark.parametrize('classes', ['', 'a\nb\nc', CLASSES])
def test_masks_of_class_numbers_need_no_conversion(garden, classes):
  garden.classes(classes)
  if not classes:
    (garden.root / 'classes.txt').unlink()
  said = 'nothing to convert. configs/folder.py reads them'
  words = str(garden.root), '--data_dir', f'{garden.root}_new'
  refused(said, own, words)
  # They may be grey colours.
  garden.classes('background 0 0 0\nleaf 255 255 255')
  garden.write(lambda ids: encode(white(ids)))
  own(words)
  path = garden.mask('train/2')
  path = f'{words[-1]}/{path.relative_to(garden.root)}'
  assert_equal(cv2.imread(path, -1), garden.ids['train/2'] > 0)


NO_MASKS = [
  (None, r'train/2\.png'),  # A link to nothing.
  (lambda ids: encode(COLOURS[ids], '.jpg'), 'is a JPEG, whatever its name'),
  (lambda ids: encode(COLOURS[ids], '.webp'), 'is a WEBP, whatever its name'),
  (two_frames, 'has 2 pictures, and a mask is one'),
  (
    lambda ids: encode(np.float32(ids + 0.5), '.tif'),
    'no whole numbers from 0 to 65535',
  ),
]


@pytest.mark.parametrize(('encoded', 'message'), NO_MASKS)
def test_files_that_are_no_masks_within(garden, encoded, message):
  garden.write(encoded or encode, 'train/2')
  if not encoded:
    garden.mask('train/2').unlink()
    garden.mask('train/2').symlink_to('nowhere.png')
  refused(message, garden.to_ids)
  assert not (garden.root / 'ids').exists()


@pytest.mark.parametrize('bits', [16, 12])
@pytest.mark.parametrize('bands', [3, 4])
def test_images_of_more_bits(garden, bits, bands):
  paths = list(map(garden.image, garden.ids))
  expected = [cv2.imread(str(path)) for path in paths]
  for path, image in zip(paths, expected, strict=True):
    pixels = np.uint16(np.round(image * ((2**bits - 1) / 255)))
    path.unlink()
    # As GDAL writes them, infrared last.
    pixels = np.dstack([pixels[..., ::-1], pixels[..., 0] // 4])[..., :bands]
    path.with_suffix('.tif').write_bytes(tiff(pixels, 0, grey=True))
  remedy = garden.found()['image_depth'].remedy
  code = re.search(r'file: (.*)\. Here', remedy)[1]
  for path in paths:
    old, new = (str(path.with_suffix(x)) for x in ('.tif', '.png'))
    exec(code, {'cv2': cv2, 'np': np, 'old': old, 'new': new})
    path.with_suffix('.tif').unlink()
  assert garden.found() == {}
  images = [x['image'] for split in garden.splits()[1] for x in split]
  assert np.abs(np.flip(images, -1) - np.int_(expected)).max() < 25


def test_channels_that_are_not_used(garden):
  kinds = '.png', '.tif', '.webp', '.png', '.bmp', '.tif'
  channels = 4, 4, 4, 3, 4, 1
  for name, ending, number in zip(garden.ids, kinds, channels, strict=True):
    path = garden.image(name)
    image = cv2.imread(str(path))
    path.unlink()
    image = np.dstack([image, image[..., 0]])[..., :number].squeeze()
    path.with_suffix(ending).write_bytes(encode(image, ending))
  assert garden.errors() == set()
  train, val = garden.diagnoses()
  assert train.rule.name == val.rule.name == 'image_channels'
  samples = [d.finding.samples for d in (train, val)]
  assert samples == [('0', '1', '2'), ('4',)]
  assert '4 channels, of which the first 3 are used' in train.finding.what


def at_values(*values):
  return lambda ids: encode(np.array(values, np.uint16)[ids])


def test_masks_of_16_bits_have_values_beyond_255(garden):
  garden.classes('0: background\n700 9: leaf\n65535: flower\nignore: 300')
  garden.write(at_values(0, 700, 65535))
  garden.write(lambda ids: encode(np.uint8([0, 9, 255])[ids]), 'val/4')
  assert garden.errors() == set()
  labels = garden.labels()
  assert_equal(labels[0], garden.ids['train/0'])
  assert_equal(labels[4], np.array([0, 1, 255])[garden.ids['val/4']])
  garden.write(at_values(0, 700, 301), 'train/1')
  assert refused('that .*classes.txt does not have: 301', garden.labels)


@pytest.mark.parametrize(
  ('values', 'rule', 'written'),
  [
    ((0, 3, 7), 'unknown_values', (0, 3, 7)),
    ((0, 300, 7), 'unknown_values', (0, 7, 300)),
    ((0, 1, 9), 'unknown_values', (0, 1, 9)),
    ((0, 400, 800), 'stretched_masks', (0, 400, 800)),
  ],
)
def test_lines_for_values_with_gaps_can_be_pasted(
  garden, values, rule, written
):
  garden.classes('background\nleaf\nflower')
  garden.write(at_values(*values))
  lines = map('{}: {}'.format, written, ('background', 'leaf', 'flower'))
  assert garden.rewrite(rule, 'alues mean') == '\n'.join(lines)
  assert garden.errors() == set()


def test_lines_for_new_values_keep_the_others(garden):
  garden.classes('background 60 60 60\n7: leaf'.replace('back', '0: back'))
  garden.write(at_values(0, 7, 500))
  text = garden.rewrite('unknown_values', 'whose new names you change')
  assert text == '0: background 60 60 60\n7: leaf\n500: class_500'
  garden.check()
