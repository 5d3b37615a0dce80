"""Zip files for the test servers: what is written, and each fault found."""

import io
import json
import zipfile

import cv2
import numpy as np
import pytest
from PIL import Image

from resnest_jax.errors import UserError
from resnest_jax.evaluation.submission import __main__ as submission
from resnest_jax.evaluation.submission import rules, write
from resnest_jax.evaluation.submission.check import validate
from resnest_jax.evaluation.submission.rules import BENCHMARKS
from resnest_jax.labels import ADE20K, CITYSCAPES

CITY, ADE = BENCHMARKS['cityscapes'], BENCHMARKS['ade20k']
LABEL_IDS = np.array([7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33])
ADE_SIZES = {  # Width, height.
  'ADE_test_00000001': (40, 30),
  'ADE_test_00000002': (25, 35),
  'ADE_test_00003489': (30, 30),
}
CITY_KEYS = ('berlin_000000_000019', 'mainz_000001_000120')


def png(pixels):
  """The file of an array or, with a palette, of Pillow's image."""
  if isinstance(pixels, np.ndarray):
    return cv2.imencode('.png', pixels)[1].tobytes()
  file = io.BytesIO()
  pixels.save(file, 'png')
  return file.getvalue()


def filled(value=1, size=(30, 40), dtype=np.uint8):
  return png(np.full(size, value, dtype))


def random_mask(classes, size, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, classes, size[::-1]).astype(np.uint8)


@pytest.fixture
def ade(tmp_path):
  """Folders of predictions, as predict.py writes them, and of test images."""
  predictions, images = tmp_path / 'predictions', tmp_path / 'release_test'
  predictions.mkdir()
  (images / 'testing').mkdir(parents=True)
  for i, (name, size) in enumerate(ADE_SIZES.items()):
    for end in ('', '_overlay'):
      mask = random_mask(150, size, i)
      cv2.imwrite(f'{predictions}/{name}{end}.png', mask)
    Image.new('RGB', size).save(images / 'testing' / f'{name}.jpg')
  names = {'classes': ADE20K.classes}
  (predictions / 'classes.json').write_text(json.dumps(names))
  return predictions, images


@pytest.fixture
def city(tmp_path):
  """Two predictions of Cityscapes, in the release's size, and their images."""
  predictions = tmp_path / 'predictions_city'
  predictions.mkdir()
  images = tmp_path / 'leftImg8bit_trainvaltest.zip'
  with zipfile.ZipFile(images, 'w') as archive:
    archive.writestr('leftImg8bit/val/x/x_000000_000019_leftImg8bit.png', b'')
    for i, key in enumerate(CITY_KEYS):
      mask = random_mask(19, (128, 64), i).repeat(16, 0).repeat(16, 1)
      for end in ('', '_overlay'):
        cv2.imwrite(f'{predictions}/{key}_leftImg8bit{end}.png', mask)
      place = f'leftImg8bit/test/{key.split("_")[0]}/{key}_leftImg8bit.png'
      archive.writestr(place, filled(0, (1024, 2048)))
  return predictions, images


@pytest.fixture
def good_city(city, tmp_path):
  out = tmp_path / 'good.zip'
  write.write(CITY, city[0], out, rules.read_images(CITY, city[1]))
  return out


def command(name, folders, out):
  predictions, images = map(str, folders)
  submission.main(
    [name, '--predictions', predictions, '--out', str(out), '--images', images]
  )


def read_zip(path):
  with zipfile.ZipFile(path) as archive:
    return {
      name: cv2.imdecode(
        np.frombuffer(archive.read(name), np.uint8), cv2.IMREAD_UNCHANGED
      )
      for name in archive.namelist()
    }


def said(findings):
  return ' '.join(f'{x.what} {x.remedy}' for x in findings)


def changed(source, files):
  """A copy of a zip with other files; None leaves one out."""
  target = source.with_name('bad.zip')
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w') as new:
    contents = {name: old.read(name) for name in old.namelist()} | files
    for name, content in contents.items():
      if content is not None:
        new.writestr(name, content)
  return target


def test_ade20k_counts_from_one(ade, tmp_path, capsys):
  out = tmp_path / 'new' / 'ade20k.zip'
  command('ade20k', ade, out)
  assert '3 masks' in capsys.readouterr().out
  written = read_zip(out)
  assert sorted(written) == [f'{name}.png' for name in ADE_SIZES]
  for i, (name, size) in enumerate(ADE_SIZES.items()):
    expected = random_mask(150, size, i) + 1
    np.testing.assert_array_equal(written[f'{name}.png'], expected)
  verdict = validate(out, images=ade[1])
  assert verdict.benchmark is ADE
  assert (verdict.files, verdict.errors) == (3, [])
  assert '3 test images, ade20k has 3352' in said(verdict.warnings)
  everything = np.concatenate([x.ravel() for x in written.values()])
  counted = np.bincount(everything, minlength=151)[1:]
  np.testing.assert_array_equal(verdict.pixels, counted)
  assert [p.name for p in out.parent.iterdir()] == ['ade20k.zip']


def test_cityscapes_has_label_ids(city, tmp_path, capsys):
  out = tmp_path / 'cityscapes.zip'
  command('cityscapes', city, out)
  written = read_zip(out)
  assert sorted(written) == [f'{key}_labelIds.png' for key in CITY_KEYS]
  for i, mask in enumerate(written.values()):
    assert mask.shape == (1024, 2048)
    expected = LABEL_IDS[random_mask(19, (128, 64), i)]
    np.testing.assert_array_equal(mask[::16, ::16], expected)
  verdict = validate(out, images=city[1])
  assert verdict.errors == []
  assert verdict.images.tolist() == [2] * 19
  submission.main(['validate', str(out), '--images', str(city[1])])
  assert '0 errors, 1 warnings' in capsys.readouterr().out


def test_numbers_and_names_without_the_images(city, good_city, tmp_path):
  errors = validate(good_city).errors
  assert '1045 masks are missing, of 1046 ' in errors[0].what
  assert errors[0].samples[:2] == (
    'berlin_000001_000019',
    'berlin_000002_000019',
  )
  assert '0 masks are there whose names begin with bielefeld_' in said(errors)
  assert 'begin with mainz_; the benchmark has 298' in said(errors)
  with pytest.raises(UserError, match='1045 masks are missing'):
    write.write(CITY, city[0], tmp_path / 'other.zip')
  assert not list(tmp_path.glob('*other*'))


NUMBERS = {'berlin': 544, 'bonn': 46, 'leverkusen': 58, 'munich': 398}
CITY_NAMES = [
  *(f'{c}_{i:06d}_000019' for c, n in NUMBERS.items() for i in range(n)),
  *(f'bielefeld_000000_{100 * i:06d}' for i in range(181)),
  *(f'mainz_000000_{100 * i:06d}' for i in range(298)),
]
ADE_NAMES = [f'ADE_test_{i:08d}' for i in range(1, 3353)]


def test_complete_sets_have_nothing_missing():
  assert len(set(CITY_NAMES)) == 1525
  for benchmark, names in ((CITY, CITY_NAMES), (ADE, ADE_NAMES)):
    assert rules.check_names(benchmark, names, None) == []


@pytest.mark.parametrize(
  ('benchmark', 'names', 'told'),
  [
    (CITY, [*CITY_NAMES, 'aachen_000000_000019'], "('aachen_000000_000019',)"),
    (CITY, CITY_NAMES[:-1], '297 masks are there whose names begin with mainz'),
    (ADE, ADE_NAMES[1:], '3351 masks are there'),
    (ADE, [*ADE_NAMES, 'ADE_test_00003490'], "('ADE_test_00003490',)"),
  ],
  ids=['unknown', 'one missing', 'another missing', 'beyond'],
)
def test_names_of_no_complete_set_are_told(benchmark, names, told):
  (finding,) = rules.check_names(benchmark, names, None)
  assert told in f'{finding.samples} {finding.what}'


@pytest.fixture
def good(ade, tmp_path):
  out = tmp_path / 'good.zip'
  write.write(ADE, ade[0], out, ADE_SIZES)
  return out


FIRST = 'ADE_test_00000001.png'


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({FIRST: None}, '1 masks are missing, of 3'),
    (
      {'ADE_test_00000007.png': filled()},
      '1 masks are of no test image of ade20k',
    ),
    ({'.DS_Store': b'x'}, '1 files have names that no test image has'),
    ({FIRST: b'GIF89a'}, '1 of 3 files are no PNG files'),
    (
      {FIRST: filled(size=(40, 30))},
      'another size than their image: 30 x 40 instead of 40 x 30',
    ),
    ({FIRST: filled(size=(30, 40, 3))}, 'not 8-bit grey: 8-bit RGB'),
    ({FIRST: filled(dtype=np.uint16)}, 'not 8-bit grey: 16-bit grey'),
    ({FIRST: png(Image.new('P', (40, 30), 3))}, 'palette'),
    ({FIRST: filled()[:50]}, '1 of 3 files cannot be decoded'),
    (
      {FIRST: filled(0)},
      '1 of 3 masks have the value 0, which is "other" and no class',
    ),
    ({FIRST: filled(255)}, '1 of 3 masks have values above 150: 255.'),
    ({FIRST: None, f'x/{FIRST}': filled()}, '1 masks lie in folders'),
    ({f'x/{FIRST}': filled()}, '1 test images have several masks'),
  ],
)
def test_faults_of_a_zip_are_named(ade, good, files, message):
  assert validate(good, ADE, ade[1]).errors == []
  assert message in said(validate(changed(good, files), ADE, ade[1]).errors)


def test_a_forgotten_one_is_seen(ade, tmp_path):
  bad = tmp_path / 'bad.zip'
  with zipfile.ZipFile(bad, 'w') as archive:
    for name in ADE_SIZES:
      archive.write(ade[0] / f'{name}.png', f'{name}.png')
  (finding,) = validate(bad, images=ade[1]).errors
  assert 'none has 150: they count the classes from 0' in finding.what
  assert len(finding.samples) == 3
  assert 'Add 1' in finding.remedy


def test_train_ids_are_told_from_label_ids(city, good_city):
  """Predictions themselves, 255, and ids that are not evaluated."""
  first, second = (f'{key}_labelIds.png' for key in CITY_KEYS)
  pixels = np.full((1024, 2048), 7, np.uint8)

  def judge(*masks):
    files = dict(zip((first, second), masks, strict=False))
    return validate(changed(good_city, files), images=city[1])

  trained = city[0] / f'{CITY_KEYS[0]}_leftImg8bit.png'
  (finding,) = judge(trained.read_bytes()).errors
  assert '1 of 2 masks hold train ids' in finding.what
  assert finding.samples == (first,)
  pixels[0] = 255
  (finding,) = judge(png(pixels)).errors
  assert 'no label id: 255;' in finding.what
  pixels[0] = 0
  verdict = judge(png(pixels))
  assert verdict.errors == []
  assert 'not evaluated: 0.' in verdict.warnings[-1].what
  # If no mask has anything else, 0 is the train id of road.
  road = filled(0, (1024, 2048))
  (finding,) = judge(road, road).errors
  assert '2 of 2 masks hold train ids' in finding.what


def test_damaged_bytes_are_seen_by_their_checksum(good, tmp_path):
  content = bytearray(good.read_bytes())
  content[200] ^= 0xFF  # In the first mask's pixels.
  good.write_bytes(content)
  errors = said(validate(good, ADE).errors)
  assert '1 of 3 files cannot be decoded: not readable (Bad CRC' in errors
  good.write_bytes(content[:-40])
  with pytest.raises(UserError, match='is no zip file, or is cut off'):
    validate(good)


def test_the_command_ends_with_one_for_errors(good, capsys):
  with pytest.raises(SystemExit) as end:
    submission.main(['validate', str(good)])
  assert end.value.code == 1
  out = capsys.readouterr().out
  assert '3 masks are there whose names begin with ADE_test_' in out
  assert '3 of 3352 masks for ade20k' in out
  assert '1 errors, 0 warnings' in out


def test_nothing_is_written_over_or_halfway(ade, tmp_path):
  out = tmp_path / 'ade20k.zip'
  out.write_text('precious')

  def refused(message, **sizes):
    with pytest.raises(UserError, match=message):
      write.write(ADE, ade[0], out, ADE_SIZES | sizes)

  refused('is there already')
  assert out.read_text() == 'precious'
  out.unlink()
  refused('25 x 35 instead of 7 x 7', ADE_test_00000002=(7, 7))
  (ade[0] / FIRST).write_bytes(filled(150))
  refused('has the value 150; .* from 0 to 149')
  assert not [*tmp_path.glob('*.zip*'), *tmp_path.glob('.*zip*')]


def test_predictions_that_do_not_fit(ade, tmp_path):
  names = {'classes': CITYSCAPES.classes}
  (ade[0] / 'classes.json').write_text(json.dumps(names))
  (tmp_path / 'empty').mkdir()
  for folder, out, message in (
    (tmp_path / 'nothing', 'x.zip', 'there is no folder'),
    (ade[0], 'x.tar', r'has to end with \.zip'),
    (tmp_path / 'empty', 'x.zip', 'no prediction of a test image of ade20k'),
    (ade[0], 'x.zip', 'of 19 classes, road, sidewalk'),
  ):
    with pytest.raises(UserError, match=message):
      write.write(ADE, folder, tmp_path / out, ADE_SIZES)
  for images, message in (
    (ade[1], 'holds no test image of cityscapes'),
    (ade[0] / 'classes.json', 'no folder and no zip'),
  ):
    with pytest.raises(UserError, match=message):
      rules.read_images(CITY, images)


def test_a_zip_of_something_else(tmp_path):
  other = tmp_path / 'other.zip'
  with zipfile.ZipFile(other, 'w') as archive:
    archive.writestr('thesis.txt', 'all of it')
  with pytest.raises(UserError, match=r'first of 1 is thesis\.txt'):
    validate(other)
  with pytest.raises(UserError, match='there is no file'):
    validate(tmp_path / 'nothing.zip')
