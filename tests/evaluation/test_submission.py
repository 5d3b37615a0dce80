"""Zip files for the test servers: what is written, and each fault found."""

import json
import re
import zipfile

import cv2
import numpy as np
import pytest
from data.pictures import claiming
from data.refusals import refused
from data.small_archives import decode, encode, full, image_name, write_zip
from PIL import Image

from resnest_jax.evaluation.submission import __main__ as submission
from resnest_jax.evaluation.submission import check, rules, write
from resnest_jax.labels import ADE20K, CITYSCAPES

CITY, ADE = rules.BENCHMARKS['cityscapes'], rules.BENCHMARKS['ade20k']
LABEL_IDS = np.array([7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33])
MASK = full((30, 40), 1)
SIZES = {1: (40, 30), 2: (25, 35), 3489: (30, 30)}  # Width, height.
ADE_SIZES = {f'ADE_test_{i:08d}': size for i, size in SIZES.items()}
CITY_KEYS = ('berlin_000000_000019', 'mainz_000001_000120')


def random_mask(classes, size, seed):
  return np.random.default_rng(seed).integers(0, classes, size[::-1], np.uint8)


def street_mask(seed):
  return random_mask(19, (128, 64), seed).repeat(16, 0).repeat(16, 1)


def write_predictions(folder, masks):
  # As predict.py does, from name -> mask.
  folder.mkdir()
  for name, mask in masks.items():
    for end in ('', '_overlay'):
      cv2.imwrite(f'{folder}/{name}{end}.png', mask)
  return folder


@pytest.fixture
def ade(tmp_path):
  # Folders of predictions, as predict.py writes them, and of test images.
  images = tmp_path / 'release_test'
  (images / 'testing').mkdir(parents=True)
  masks = {}
  for i, (name, size) in enumerate(ADE_SIZES.items()):
    masks[name] = random_mask(150, size, i)
    Image.new('RGB', size).save(images / 'testing' / f'{name}.jpg')
  predictions = write_predictions(tmp_path / 'predictions', masks)
  text = json.dumps({'classes': ADE20K.classes})
  (predictions / 'classes.json').write_text(text)
  return predictions, images


@pytest.fixture
def city(tmp_path):
  # Two predictions of Cityscapes, in the release's size, images, and a zip.
  masks, images = {}, {image_name('x_000000_000019', 'val'): b''}
  for i, key in enumerate(CITY_KEYS):
    masks[f'{key}_leftImg8bit'] = street_mask(i)
    images[image_name(key, 'test')] = full((1024, 2048), 0)
  archive = write_zip(tmp_path / 'leftImg8bit_trainvaltest.zip', images)
  folder = write_predictions(tmp_path / 'predictions_city', masks)
  out, sizes = tmp_path / 'cityscapes.zip', rules.read_images(CITY, archive)
  write.write(CITY, folder, out, sizes)
  return folder, archive, out


def read_zip(path):
  with zipfile.ZipFile(path) as archive:
    return {name: archive.read(name) for name in archive.namelist()}


def faults(path, images=None):
  findings = check.validate(path, ADE, images).errors
  return ' '.join(f'{x.what} {x.remedy}' for x in findings)


def changed(source, files):
  # A copy of a zip with other files; None leaves one out.
  return write_zip(source.with_name('bad.zip'), read_zip(source) | files)


@pytest.fixture
def good(ade, tmp_path):
  write.write(ADE, ade[0], tmp_path / 'good.zip', ADE_SIZES)
  return tmp_path / 'good.zip'


def test_ade20k_counts_from_one(ade, tmp_path):
  out = tmp_path / 'new' / 'ade20k.zip'
  flags = '--predictions', ade[0], '--out', out, '--images', ade[1]
  submission.main(['ade20k', *map(str, flags)])
  written = {name: decode(png) for name, png in read_zip(out).items()}
  assert sorted(written) == [f'{name}.png' for name in ADE_SIZES]
  for i, (name, size) in enumerate(ADE_SIZES.items()):
    expected = random_mask(150, size, i) + 1
    np.testing.assert_array_equal(written[f'{name}.png'], expected)
  verdict = check.validate(out, images=ade[1])
  assert (verdict.benchmark, verdict.files, verdict.errors) == (ADE, 3, [])
  assert '3 test images, ade20k has 3352' in verdict.warnings[0].what
  counted = sum(np.bincount(x.ravel(), minlength=151) for x in written.values())
  assert verdict.pixels.tolist() == counted[1:].tolist()


def test_cityscapes_has_label_ids(city):
  _, images, out = city
  written = read_zip(out)
  assert sorted(written) == [f'{key}_labelIds.png' for key in CITY_KEYS]
  for i, mask in enumerate(map(decode, written.values())):
    np.testing.assert_array_equal(mask, LABEL_IDS[street_mask(i)])
  verdict = check.validate(out, images=images)
  assert (verdict.errors, verdict.images.tolist()) == ([], [2] * 19)


NUMBERS = {'berlin': 544, 'bonn': 46, 'leverkusen': 58, 'munich': 398}
STREETS = [f'{c}_{i:06d}_000019' for c, n in NUMBERS.items() for i in range(n)]
STREETS += [f'bielefeld_000000_{100 * i:06d}' for i in range(181)]
STREETS += [f'mainz_000000_{100 * i:06d}' for i in range(298)]
ADE_NAMES = [f'ADE_test_{i:08d}' for i in range(1, 3353)]


def test_names_of_complete_sets_and_others():
  assert len(set(STREETS)) == 1525
  for benchmark, names in ((CITY, STREETS), (ADE, ADE_NAMES)):
    assert rules.check_names(benchmark, names, None) == []
  for benchmark, names, told in (
    (CITY, [*STREETS, 'aachen_000000_000019'], "('aachen_000000_000019',)"),
    (CITY, STREETS[1:], "('berlin_000000_000019',) 1 mask is missing"),
    (CITY, STREETS[:-1], '297 masks are there whose names begin with mainz'),
    (ADE, [*ADE_NAMES, 'ADE_test_00003490'], "('ADE_test_00003490',)"),
  ):
    (finding,) = rules.check_names(benchmark, names, None)
    assert told in f'{finding.samples} {finding.what}'


FIRST = 'ADE_test_00000001.png'
FROM_0 = {f'{x}.png': full(ADE_SIZES[x][::-1], 0) for x in ADE_SIZES}


def test_faults_of_a_zip_are_named(ade, good):
  assert faults(good, ade[1]) == ''
  for files, message in (
    ({FIRST: None}, '1 mask is missing, of 3'),
    ({'ADE_test_00000007.png': MASK}, '1 mask is of no ade20k test image'),
    ({'.DS_Store': b'x'}, '1 file has names that no test image has'),
    ({FIRST: b'GIF89a'}, '1 of 3 files is not PNG'),
    ({FIRST: full((40, 30), 1)}, '30 x 40 instead of 40 x 30'),
    ({FIRST: full((30, 40), 1, np.uint16)}, 'not 8-bit grey: 16-bit grey'),
    ({FIRST: MASK[:50]}, '1 of 3 files cannot be decoded'),
    (
      {FIRST: full((30, 40), 0)},
      '1 of 3 masks has the value 0, which is "other"',
    ),
    (FROM_0, 'none has 150: they count the classes from 0'),
    ({FIRST: full((30, 40), 255)}, '1 of 3 masks has values above 150: 255.'),
    ({FIRST: None, f'x/{FIRST}': MASK}, '1 mask is in folders'),
    ({f'x/{FIRST}': MASK}, '1 test image has several masks'),
  ):
    assert message in faults(changed(good, files), ade[1])


def test_train_ids_are_told_from_label_ids(city):
  # Predictions themselves, 255, and ids that are not evaluated.
  predictions, images, out = city
  names = [f'{key}_labelIds.png' for key in CITY_KEYS]

  def judge(*masks):
    files = dict(zip(names, masks, strict=False))
    return check.validate(changed(out, files), images=images)

  trained = predictions / f'{CITY_KEYS[0]}_leftImg8bit.png'
  (finding,) = judge(trained.read_bytes()).errors
  assert '1 of 2 masks has train ids' in finding.what
  assert finding.samples == (names[0],)
  pixels = np.full((1024, 2048), 7, np.uint8)
  pixels[0] = 255
  (finding,) = judge(encode(pixels)).errors
  assert 'no label id: 255;' in finding.what
  pixels[0] = 0
  verdict = judge(encode(pixels))
  assert verdict.errors == []
  assert 'not evaluated: 0.' in verdict.warnings[-1].what
  # If no mask has anything else, 0 is the train id of road.
  road = full((1024, 2048), 0)
  (finding,) = judge(road, road).errors
  assert '2 of 2 masks have train ids' in finding.what


def test_damaged_bytes_are_seen_by_their_checksum(good):
  content = bytearray(good.read_bytes())
  content[200] ^= 0xFF  # In the first mask's pixels.
  good.write_bytes(content)
  assert '1 of 3 files cannot be decoded: not readable (Bad CRC' in faults(good)


def test_the_command_ends_with_one_for_errors(good, capsys):
  with pytest.raises(SystemExit, match='1'):
    submission.main(['validate', str(good)])
  assert '1 error, 0 warnings' in capsys.readouterr().out


def test_nothing_is_written_over_or_halfway(ade, tmp_path):
  out = tmp_path / 'ade20k.zip'
  out.write_text('precious')
  given = write.write, ADE, ade[0], out
  refused('is there already', *given, ADE_SIZES)
  assert out.read_text() == 'precious'
  out.unlink()
  for number, told in ((4, '1 mask is missing'), (2, '25 x 35 instead of 7')):
    refused(told, *given, ADE_SIZES | {f'ADE_test_{number:08d}': (7, 7)})
  (ade[0] / FIRST).write_bytes(full((30, 40), 150))
  refused('has the value 150; .* from 0 to 149', *given, ADE_SIZES)
  assert not [*tmp_path.glob('*.zip*'), *tmp_path.glob('.*zip*')]


def test_predictions_that_do_not_fit(ade, tmp_path):
  (predictions, images), classes = ade, ade[0] / 'classes.json'
  classes.write_text(json.dumps({'classes': CITYSCAPES.classes}))
  (tmp_path / 'empty').mkdir()
  for folder, out, message in (
    (tmp_path / 'nothing', 'x.zip', 'there is no folder'),
    (predictions, 'x.tar', r'has to end with \.zip'),
    (tmp_path / 'empty', 'x.zip', 'no prediction of a test image of ade20k'),
    (predictions, 'x.zip', 'of 19 classes, road, sidewalk'),
  ):
    refused(message, write.write, ADE, folder, tmp_path / out, ADE_SIZES)
  given = write.write, ADE, predictions, tmp_path / 'x.zip', ADE_SIZES
  for content in ('[' * 10**5, '{"classes": 3}', '[]', 'NaN', '\xff'):
    classes.write_text(content, 'latin-1')
    refused(r'classes\.json is damaged', *given)
  refused('no test image of cityscapes', rules.read_images, CITY, images)
  refused('no folder and no zip', rules.read_images, CITY, classes)


def test_what_is_no_zip_of_masks(good, tmp_path):
  other = write_zip(tmp_path / 'other.zip', {'thesis.txt': b'all of it'})
  refused(r'first of 1 is thesis\.txt', check.validate, other)
  refused('there is no file', check.validate, tmp_path / 'nothing.zip')
  good.write_bytes(good.read_bytes()[:-40])
  refused('is no zip file, or is cut off', check.validate, good)


def test_masks_that_would_fill_the_memory(good):
  # Without --images any size is accepted, but not each that is claimed.
  sizes = (np.array(x, '>u4').tobytes() for x in ((40, 30), (60_000, 60_000)))
  claimed = changed(good, {FIRST: MASK.replace(*sizes)})
  assert 'the most that are decoded: 60000 x 60000' in faults(claimed)
  with zipfile.ZipFile(good, 'a', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('ADE_test_00000005.png', bytes(2**24 + 1))
  with zipfile.ZipFile(good, 'a', zipfile.ZIP_LZMA) as archive:
    archive.writestr('ADE_test_00000006.png', MASK)
  told = r'2 of \d files cannot .* to 16777217 bytes.*compressed in another way'
  assert re.search(told, faults(good))


def test_test_images_that_claim_to_be_large(good, tmp_path):
  name, images = 'testing/ADE_test_00000001.jpg', tmp_path / 'images.zip'
  for content, method, why in (
    (claiming(60_000, 60_000)['PNG'], zipfile.ZIP_STORED, 'exceeds limit'),
    (bytes(2**24 + 1), zipfile.ZIP_DEFLATED, 'would unpack from'),
    (MASK, zipfile.ZIP_BZIP2, 'is compressed in another way'),
    (MASK[:20], zipfile.ZIP_STORED, 'Unpack or download it again'),
  ):
    write_zip(images, {name: content}, method=method)
    refused(f'{name} .*{why}', check.validate, good, ADE, images)
