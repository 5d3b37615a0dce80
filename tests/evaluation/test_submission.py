"""Zip files for the test servers: what is written, and each fault found."""

import io
import json
import zipfile

import cv2
import numpy as np
import pytest
from PIL import Image

from resnest_jax.data.labels import ADE20K, CITYSCAPES
from resnest_jax.errors import UserError
from resnest_jax.evaluation import submission, submission_rules
from resnest_jax.evaluation.submission_check import validate
from resnest_jax.evaluation.submission_rules import BENCHMARKS

CITY, ADE = BENCHMARKS['cityscapes'], BENCHMARKS['ade20k']
LABEL_IDS = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
ADE_SIZES = {  # Width, height.
  'ADE_test_00000001': (40, 30),
  'ADE_test_00000002': (25, 35),
  'ADE_test_00003489': (30, 30),
}
CITY_KEYS = ('berlin_000000_000019', 'mainz_000001_000120')


def png(pixels):
  return cv2.imencode('.png', pixels)[1].tobytes()


def encoded(image):
  file = io.BytesIO()
  image.save(file, 'png')
  return file.getvalue()


def random_mask(classes, size, seed=0):
  width, height = size
  rng = np.random.default_rng(seed)
  return rng.integers(0, classes, (height, width)).astype(np.uint8)


@pytest.fixture
def ade(tmp_path):
  """Folders of predictions, as predict.py writes them, and of test images."""
  predictions, images = tmp_path / 'predictions', tmp_path / 'release_test'
  predictions.mkdir()
  (images / 'testing').mkdir(parents=True)
  for i, (name, size) in enumerate(ADE_SIZES.items()):
    mask = random_mask(150, size, i)
    cv2.imwrite(str(predictions / f'{name}.png'), mask)
    cv2.imwrite(str(predictions / f'{name}_overlay.png'), mask)
    Image.new('RGB', size).save(images / 'testing' / f'{name}.jpg')
  (predictions / 'classes.json').write_text(
    json.dumps({'classes': ADE20K.classes})
  )
  return predictions, images


@pytest.fixture
def city(tmp_path):
  """Two predictions of Cityscapes, in the release's size, and their images."""
  predictions = tmp_path / 'predictions_city'
  predictions.mkdir()
  images = tmp_path / 'leftImg8bit_trainvaltest.zip'
  blank = encoded(Image.new('L', (2048, 1024)))
  with zipfile.ZipFile(images, 'w') as archive:
    archive.writestr('leftImg8bit/val/x/x_000000_000019_leftImg8bit.png', b'')
    for i, key in enumerate(CITY_KEYS):
      mask = random_mask(19, (128, 64), i).repeat(16, 0).repeat(16, 1)
      cv2.imwrite(str(predictions / f'{key}_leftImg8bit.png'), mask)
      cv2.imwrite(str(predictions / f'{key}_leftImg8bit_overlay.png'), mask)
      place = f'leftImg8bit/test/{key.split("_")[0]}/{key}_leftImg8bit.png'
      archive.writestr(place, blank)
  return predictions, images


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


def changed(source, target, **files):
  """A copy of a zip with other files; None leaves one out."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w') as new:
    contents = {name: old.read(name) for name in old.namelist()}
    contents |= {name.replace('__', '/'): x for name, x in files.items()}
    for name, content in contents.items():
      if content is not None:
        new.writestr(name, content)
  return target


def test_ade20k_counts_from_one(ade, tmp_path, capsys):
  predictions, images = ade
  out = tmp_path / 'new' / 'ade20k.zip'
  submission.main(
    [
      *('ade20k', '--predictions', str(predictions)),
      *('--out', str(out), '--images', str(images)),
    ]
  )
  assert '3 masks' in capsys.readouterr().out
  written = read_zip(out)
  assert sorted(written) == [f'{name}.png' for name in ADE_SIZES]
  for i, (name, size) in enumerate(ADE_SIZES.items()):
    expected = random_mask(150, size, i) + 1
    np.testing.assert_array_equal(written[f'{name}.png'], expected)
  verdict = validate(out, images=images)
  assert verdict.benchmark is ADE
  assert (verdict.files, verdict.errors) == (3, [])
  assert '3 test images, ade20k has 3352' in said(verdict.warnings)
  everything = np.concatenate([x.ravel() for x in written.values()])
  np.testing.assert_array_equal(
    verdict.pixels, np.bincount(everything, minlength=151)[1:]
  )
  assert [p.name for p in out.parent.iterdir()] == ['ade20k.zip']


def test_cityscapes_has_label_ids(city, tmp_path, capsys):
  predictions, images = city
  out = tmp_path / 'cityscapes.zip'
  submission.main(
    [
      *('cityscapes', '--predictions', str(predictions)),
      *('--out', str(out), '--images', str(images)),
    ]
  )
  written = read_zip(out)
  assert sorted(written) == [f'{key}_labelIds.png' for key in CITY_KEYS]
  for i, mask in enumerate(written.values()):
    assert mask.shape == (1024, 2048)
    train_ids = random_mask(19, (128, 64), i)
    np.testing.assert_array_equal(
      mask[::16, ::16], np.array(LABEL_IDS)[train_ids]
    )
  verdict = validate(out, images=images)
  assert verdict.errors == []
  assert verdict.images.tolist() == [2] * 19
  submission.main(['validate', str(out), '--images', str(images)])
  assert '0 errors, 1 warnings' in capsys.readouterr().out


def test_numbers_and_names_without_the_images(city, tmp_path):
  out = tmp_path / 'cityscapes.zip'
  sizes = submission_rules.read_images(CITY, city[1])
  submission.write(CITY, city[0], out, sizes)
  found = validate(out)
  assert '1045 masks are missing, of 1046 ' in found.errors[0].what
  assert found.errors[0].samples[:2] == (
    'berlin_000001_000019',
    'berlin_000002_000019',
  )
  assert '0 masks are there whose names begin with bielefeld_' in said(
    found.errors
  )
  assert 'begin with mainz_; the benchmark has 298' in said(found.errors)
  with pytest.raises(UserError, match='1045 masks are missing'):
    submission.write(CITY, city[0], tmp_path / 'other.zip')
  assert not list(tmp_path.glob('*other*'))


def complete_cityscapes():
  frames = {'bielefeld': 181, 'mainz': 298}
  numbers = {'berlin': 544, 'bonn': 46, 'leverkusen': 58, 'munich': 398}
  names = [f'{c}_{i:06d}_000019' for c, n in numbers.items() for i in range(n)]
  return names + [
    f'{c}_000000_{100 * i:06d}' for c, n in frames.items() for i in range(n)
  ]


def test_complete_sets_have_nothing_missing():
  names = complete_cityscapes()
  assert len(set(names)) == 1525
  assert submission_rules.check_names(CITY, names, None) == []
  (finding,) = submission_rules.check_names(
    CITY, [*names, 'aachen_000000_000019'], None
  )
  assert finding.samples == ('aachen_000000_000019',)
  (finding,) = submission_rules.check_names(CITY, names[:-1], None)
  assert '297 masks are there whose names begin with mainz_' in finding.what
  numbers = [f'ADE_test_{i:08d}' for i in range(1, 3353)]
  assert submission_rules.check_names(ADE, numbers, None) == []
  (finding,) = submission_rules.check_names(ADE, numbers[1:], None)
  assert '3351 masks are there' in finding.what
  beyond = [*numbers[1:], 'ADE_test_00003490']
  findings = submission_rules.check_names(ADE, beyond, None)
  assert findings[-1].samples == ('ADE_test_00003490',)


@pytest.fixture
def good(ade, tmp_path):
  """A good zip of ADE20K, and a function that judges a changed one."""
  out = tmp_path / 'good.zip'
  submission.write(ADE, ade[0], out, ADE_SIZES)

  def judge(**files):
    bad = changed(out, tmp_path / 'bad.zip', **files)
    return validate(bad, ADE, ade[1]).errors

  return judge


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({'ADE_test_00000001.png': None}, '1 masks are missing, of 3'),
    (
      {'ADE_test_00000007.png': png(np.ones((3, 3), np.uint8))},
      '1 masks are of no test image of ade20k',
    ),
    ({'.DS_Store': b'x'}, '1 files have names that no test image has'),
    ({'ADE_test_00000001.png': b'GIF89a'}, '1 of 3 files are no PNG files'),
    (
      {'ADE_test_00000001.png': png(np.ones((40, 30), np.uint8))},
      'another size than their image: 30 x 40 instead of 40 x 30',
    ),
    (
      {'ADE_test_00000001.png': png(np.ones((30, 40, 3), np.uint8))},
      'not 8-bit grey: 8-bit RGB',
    ),
    (
      {'ADE_test_00000001.png': png(np.ones((30, 40), np.uint16))},
      'not 8-bit grey: 16-bit grey',
    ),
    (
      {'ADE_test_00000001.png': encoded(Image.new('P', (40, 30), 3))},
      'palette',
    ),
    (
      {'ADE_test_00000001.png': png(np.ones((30, 40), np.uint8))[:50]},
      '1 of 3 files cannot be decoded',
    ),
    (
      {'ADE_test_00000001.png': png(np.zeros((30, 40), np.uint8))},
      '1 of 3 masks have the value 0, which is "other" and no class',
    ),
    (
      {'ADE_test_00000001.png': png(np.full((30, 40), 255, np.uint8))},
      '1 of 3 masks have values above 150: 255.',
    ),
    (
      {
        'ADE_test_00000001.png': None,
        'x__ADE_test_00000001.png': png(np.ones((30, 40), np.uint8)),
      },
      '1 masks lie in folders',
    ),
    (
      {'x__ADE_test_00000001.png': png(np.ones((30, 40), np.uint8))},
      '1 test images have several masks',
    ),
  ],
)
def test_faults_of_a_zip_are_named(good, files, message):
  assert good() == []
  assert message in said(good(**files))


def test_a_forgotten_one_is_seen(ade, tmp_path):
  bad = tmp_path / 'bad.zip'
  with zipfile.ZipFile(bad, 'w') as archive:
    for name in ADE_SIZES:
      archive.write(ade[0] / f'{name}.png', f'{name}.png')
  (finding,) = validate(bad, images=ade[1]).errors
  assert 'none has 150: they count the classes from 0' in finding.what
  assert len(finding.samples) == 3
  assert 'Add 1' in finding.remedy


def test_train_ids_are_told_from_label_ids(city, tmp_path):
  """Predictions themselves, 255, and ids that are not evaluated."""
  good, bad = tmp_path / 'good.zip', tmp_path / 'bad.zip'
  sizes = submission_rules.read_images(CITY, city[1])
  submission.write(CITY, city[0], good, sizes)
  first = f'{CITY_KEYS[0]}_labelIds.png'
  trained = (city[0] / f'{CITY_KEYS[0]}_leftImg8bit.png').read_bytes()
  changed(good, bad, **{first: trained})
  (finding,) = validate(bad, images=city[1]).errors
  assert '1 of 2 masks hold train ids' in finding.what
  assert finding.samples == (first,)
  pixels = np.full((1024, 2048), 7, np.uint8)
  pixels[0] = 255
  changed(good, bad, **{first: png(pixels)})
  (finding,) = validate(bad, images=city[1]).errors
  assert 'no label id: 255;' in finding.what
  pixels[0] = 0
  changed(good, bad, **{first: png(pixels)})
  verdict = validate(bad, images=city[1])
  assert verdict.errors == []
  assert 'not evaluated: 0.' in verdict.warnings[-1].what
  # If no mask has anything else, 0 is the train id of road.
  pixels[:] = 0
  second = f'{CITY_KEYS[1]}_labelIds.png'
  changed(good, bad, **{first: png(pixels), second: png(pixels)})
  (finding,) = validate(bad, images=city[1]).errors
  assert '2 of 2 masks hold train ids' in finding.what


def test_damaged_bytes_are_seen_by_their_checksum(good, tmp_path):
  content = bytearray((tmp_path / 'good.zip').read_bytes())
  content[200] ^= 0xFF  # In the first mask's pixels.
  (tmp_path / 'bad.zip').write_bytes(content)
  errors = validate(tmp_path / 'bad.zip', ADE).errors
  assert '1 of 3 files cannot be decoded: not readable (Bad CRC' in said(errors)
  (tmp_path / 'bad.zip').write_bytes(content[:-40])
  with pytest.raises(UserError, match='is no zip file, or is cut off'):
    validate(tmp_path / 'bad.zip')


def test_the_command_ends_with_one_for_errors(good, tmp_path, capsys):
  with pytest.raises(SystemExit) as end:
    submission.main(['validate', str(tmp_path / 'good.zip')])
  assert end.value.code == 1
  out = capsys.readouterr().out
  assert '3 masks are there whose names begin with ADE_test_' in out
  assert '3 of 3352 masks for ade20k' in out
  assert '1 errors, 0 warnings' in out


def test_nothing_is_written_over_or_halfway(ade, tmp_path):
  out = tmp_path / 'ade20k.zip'
  out.write_text('precious')
  with pytest.raises(UserError, match='is there already'):
    submission.write(ADE, ade[0], out, ADE_SIZES)
  assert out.read_text() == 'precious'
  out.unlink()
  sizes = ADE_SIZES | {'ADE_test_00000002': (7, 7)}
  with pytest.raises(UserError, match='25 x 35 instead of 7 x 7'):
    submission.write(ADE, ade[0], out, sizes)
  cv2.imwrite(
    str(ade[0] / 'ADE_test_00000001.png'), np.full((30, 40), 150, np.uint8)
  )
  with pytest.raises(UserError, match=r'has the value 150; .* from 0 to 149'):
    submission.write(ADE, ade[0], out, ADE_SIZES)
  assert not list(tmp_path.glob('*.zip*'))
  assert not list(tmp_path.glob('.*zip*'))


def test_predictions_that_do_not_fit(ade, city, tmp_path):
  out = tmp_path / 'x.zip'
  with pytest.raises(UserError, match='there is no folder'):
    submission.write(ADE, tmp_path / 'nothing', out)
  with pytest.raises(UserError, match=r'has to end with \.zip'):
    submission.write(ADE, ade[0], tmp_path / 'x.tar')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(
    UserError, match='no prediction of a test image of ade20k'
  ):
    submission.write(ADE, tmp_path / 'empty', out)
  names = {'classes': CITYSCAPES.classes}
  (ade[0] / 'classes.json').write_text(json.dumps(names))
  with pytest.raises(UserError, match='of 19 classes, road, sidewalk'):
    submission.write(ADE, ade[0], out, ADE_SIZES)
  with pytest.raises(UserError, match='holds no test image of cityscapes'):
    submission_rules.read_images(CITY, ade[1])
  with pytest.raises(UserError, match='no folder and no zip'):
    submission_rules.read_images(CITY, ade[0] / 'classes.json')


def test_a_zip_of_something_else(tmp_path):
  other = tmp_path / 'other.zip'
  with zipfile.ZipFile(other, 'w') as archive:
    archive.writestr('thesis.txt', 'all of it')
  with pytest.raises(UserError, match=r'first of 1 is thesis\.txt'):
    validate(other)
  with pytest.raises(UserError, match='there is no file'):
    validate(tmp_path / 'nothing.zip')
