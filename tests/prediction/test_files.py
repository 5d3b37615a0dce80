"""`predict.py` on pictures of all kinds, with a tiny network."""

import contextlib
import json
import os
import re

import cv2
import jax
import numpy as np
import pytest
from data.pictures import claiming, tiff
from evaluation import plain
from evaluation.drawn import write_video
from evaluation.plain import make_predictor
from evaluation.runs import OVERRIDES, STEP
from PIL import Image
from trouble import small_disk, small_files

from resnest_jax import from_checkpoint, load_checkpoint
from resnest_jax.data.preprocess import preprocess
from resnest_jax.errors import UserError
from resnest_jax.labels import ADE20K

ENDS = ('', '_color', '_overlay')
BROKEN = ('cut_off.jpg', 'cut_off.png', 'empty.png')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """A folder with files of all kinds, and what a viewer shows of each.

  All are of few sizes, as the network is compiled for each.
  """
  folder = tmp_path_factory.mktemp('pictures')
  rng = np.random.default_rng(1)
  rgb = cv2.resize(rng.integers(0, 256, (6, 9, 3), np.uint8), (123, 77))
  grey = np.repeat(rgb[..., :1], 3, -1)
  photo = Image.fromarray(rgb)
  jpeg = {'format': 'JPEG', 'quality': 100, 'subsampling': 0}
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation: to be turned by 90 degrees.
  photo.save(folder / 'plain.png')
  photo.transpose(Image.FLIP_LEFT_RIGHT).save(folder / 'plain.bmp')
  photo.save(folder / 'turned.JPG', exif=exif, **jpeg)
  photo.convert('CMYK').save(folder / 'cmyk.jpeg', **jpeg)
  Image.fromarray(grey[..., 0]).save(folder / 'grey.webp', lossless=True)
  half = np.full(rgb.shape[:2], 128, np.uint8)
  Image.fromarray(np.dstack([rgb, half])).save(folder / 'rgba.png')
  # OpenCV takes BGR.
  deep = rgb[..., ::-1].astype(np.uint16) * 256 + 77
  cv2.imwrite(str(folder / '16bit.png'), deep)
  cv2.imwrite(str(folder / '16grey.tif'), deep[..., 2])
  Image.fromarray(rgb[:1, :1]).save(folder / 'pixel.png')
  (folder / 'notes.txt').write_text('no picture')
  write_video(folder / 'clip.avi', 6, 12.5, size=(122, 76))
  return folder, {
    'plain.png': rgb,
    'plain.bmp': rgb[:, ::-1],
    'turned': np.rot90(rgb, -1),
    'cmyk': rgb,
    'grey': grey,
    'rgba': rgb,
    '16bit': rgb,
    '16grey': grey,
    'pixel': rgb[:1, :1],
  }


@pytest.fixture(scope='module')
def broken(tmp_path_factory):
  """Three files that are no pictures, whatever their names say."""
  folder = tmp_path_factory.mktemp('broken')
  picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  for name in BROKEN[:2]:
    encoded = cv2.imencode(name[-4:], picture)[1].tobytes()
    (folder / name).write_bytes(encoded[: len(encoded) // 2])
  (folder / BROKEN[2]).touch()
  return [str(folder / name) for name in BROKEN]


@pytest.fixture(scope='module')
def predicted(written_run, pictures, broken, run_script, tmp_path_factory):
  """The folder of predictions, the finished process and its record."""
  out = tmp_path_factory.mktemp('predicted') / 'out'
  process = run_script(
    *('predict.py', '--weights', written_run, '--out', out),
    *('--image_scale', 256, 64, '--opacity', 0.25, *broken, pictures[0]),
    status=1,
  )
  return out, process, json.loads((out / 'predictions.json').read_text())


def read(out, name, flags=cv2.IMREAD_COLOR_RGB):
  return cv2.imread(f'{out}/{name}.png', flags)


def test_predicts_pictures_of_all_kinds(written_run, pictures, predicted):
  out, process, _ = predicted
  expected = pictures[1]
  assert {path.name for path in out.iterdir()} == {
    *('classes.json', 'predictions.json'),
    *('clip_color.mp4', 'clip_overlay.mp4'),
    *(f'{name}{end}.png' for name in expected for end in ENDS),
  }
  said = ' '.join(process.stdout.split())
  assert '9 pictures and 1 video of 6 frames predicted in' in said
  assert '1 picture has 4 channels, of which the first 3 are used' in said
  assert said.count('compiling for images of up to ') == 1

  model, variables, _ = load_checkpoint(written_run)
  apply = jax.jit(lambda v, x: model.apply(v, x, train=False).logits)
  for name, picture in expected.items():
    height, width = picture.shape[:2]
    size = plain.fitted(height, width, 256, 64)
    image = cv2.resize(picture, size[::-1])[None]
    logits = apply(variables, preprocess(image, np.asarray([size])))[0]
    scores = plain.resized(plain.resized(logits, size), (height, width))
    found = read(out, name, cv2.IMREAD_UNCHANGED)
    assert found.shape == (height, width), name
    # JPEG's pixels are a little off, CMYK's more.
    lossy = name in ('turned', 'cmyk')
    same = found == scores.argmax(-1)
    assert same.mean() > (0.97 if lossy else 0.999), name
    colours = read(out, f'{name}_color')
    np.testing.assert_array_equal(colours, ADE20K.palette[found])
    if not lossy:
      mixed = picture * 0.75 + colours * 0.25
      assert np.abs(read(out, f'{name}_overlay') - mixed).max() <= 0.5


def test_broken_pictures_are_told_after_all_others(predicted, broken):
  error, *reasons = predicted[1].stderr.splitlines()
  assert error.startswith('error: 3 of 13 could not be read or written; rep')
  for path, reason in zip(broken, reasons, strict=True):
    assert f'{path} cannot be read as a picture: it is da' in reason


def test_predictions_say_how_they_were_made(written_run, predicted, broken):
  out, _, about = predicted
  assert about['weights']['source'] == str(written_run)
  assert about['weights']['step'] == STEP
  assert about['protocol'] == {'name': 'whole', 'image_scale': [256, 64]}
  assert len(about['predictions']) == 10
  (clip,) = (x for x in about['predictions'] if 'frames' in x)
  assert (clip['frames'], clip['overlays']) == (6, 'clip_overlay.mp4')
  assert [x['source'] for x in about['failed']] == broken
  clip = cv2.VideoCapture(str(out / 'clip_overlay.mp4'))
  assert clip.get(cv2.CAP_PROP_FPS) == 12.5


def test_windows_are_as_large_as_the_crops_of_the_training(written_run):
  protocol = from_checkpoint(written_run, protocol='slide').protocol
  assert protocol.crop == OVERRIDES['data.crop_size']
  assert protocol.image_scale == OVERRIDES['data.image_scale']


def test_pictures_that_cannot_be_decoded_do_not_end_the_others(
  pictures, tmp_path
):
  """In process, by a tiny network: bombs, a device and a picture too large."""
  (tmp_path / 'good.png').write_bytes((pictures[0] / 'plain.png').read_bytes())
  reasons = {}
  for kind, encoded in claiming(60_000, 60_000).items():
    reasons[f'{kind}.jpg'] = r'is \d+ x \d+ pixels, more than 2684'
    (tmp_path / f'{kind}.jpg').write_bytes(encoded)
  reasons['HDR.jpg'] = 'cannot be read as a picture'
  reasons['bands.tif'] = 'has 12 bands'
  bands = tiff(np.zeros((5, 7, 12), np.uint8))
  (tmp_path / 'bands.tif').write_bytes(bands)
  (tmp_path / 'zero.png').symlink_to('/dev/zero')
  reasons['zero.png'] = 'is a device'
  paths = [tmp_path / name for name in ('good.png', *reasons)]
  found = dict(make_predictor().predict_each(paths))
  assert found.pop(0).labels.shape == (77, 123)
  assert len(found) == len(reasons)
  for index, error in found.items():
    assert re.search(reasons[paths[index].name], str(error)), paths[index]


def test_the_limit_of_pixels_is_that_of_the_predictor(pictures):
  path = pictures[0] / 'plain.png'
  small = make_predictor(max_pixels=77 * 123 - 1)
  with pytest.raises(
    UserError, match=r'123 x 77 pixels, more than 9470 .*\n.*raise'
  ):
    small.predict(path)
  # As the message says; its overlay reads the picture again.
  overlay = make_predictor(max_pixels=77 * 123).predict(path).overlay()
  assert overlay.shape == (77, 123, 3)


def test_mistakes_of_the_command_line_are_told(call_script, tmp_path):
  for flag, message in (
    ('--recursiv', 'unrecognized arguments: --recursiv'),
    ('--batch_size=0', '--batch_size is 0'),
    ('--max_pixels=-1', '--max_pixels is -1; give 1 or more'),
  ):
    with pytest.raises(UserError, match=message):
      call_script('predict.py', '--weights=x', '--out', tmp_path, 'y', flag)


def test_overwrite_replaces_links_and_what_they_lead_to_stays(
  written_run, call_script, tmp_path
):
  """One result that cannot be written keeps none from the others."""
  given, out = tmp_path / 'given', tmp_path / 'out'
  given.mkdir()
  out.mkdir()
  long = 'l' * 245
  for name in ('a', 'b', long):
    cv2.imwrite(f'{given}/{name}.png', np.zeros((40, 64, 3), np.uint8))
  write_video(given / 'clip.avi', 2)
  (tmp_path / 'mine').mkdir()
  theirs = [tmp_path / 'mine' / '000000.png', tmp_path / 'mine.png']
  for path in theirs:
    path.write_text('mine')
  for name, target in (
    ('a.png', theirs[1]),
    ('a_color.png', given / 'b.png'),
    ('classes.json', theirs[1]),
    ('predictions.json', tmp_path / 'nowhere'),
    ('clip', tmp_path / 'mine'),
    ('clip_color.mp4', theirs[1]),
  ):
    (out / name).symlink_to(target)
  (out / 'b_overlay.png').mkdir()
  pictures = {x.name: x.read_bytes() for x in given.iterdir()}
  with pytest.raises(UserError) as raised:
    call_script(
      *('predict.py', '--weights', written_run, '--out', out, '--overwrite'),
      *('--image_scale', 256, 64, '--save', 'masks', 'colors', 'overlays'),
      *('--', given),
    )
  told = (
    r'2 of 4 could not be .*\n.*/b\.png .*Is a directory.*\n.*name too long'
  )
  assert raised.match(f'(?s){told}')
  assert {x.name: x.read_bytes() for x in given.iterdir()} == pictures
  assert {path.read_text() for path in theirs} == {'mine'}
  assert os.listdir(tmp_path / 'mine') == ['000000.png']
  there = {x.name for x in out.iterdir()}
  assert {f'a{end}.png' for end in ENDS} | {'clip', 'b.png'} <= there
  assert not [x for x in out.iterdir() if x.is_symlink() or x.name[0] == '.']
  assert sorted(os.listdir(out / 'clip')) == ['000000.png', '000001.png']
  about = json.loads((out / 'predictions.json').read_text())
  assert len(about['predictions']) == len(about['failed']) == 2


def test_a_full_disk_ends_a_prediction(written_run, call_script, tmp_path):
  """In one line, with all that is written whole."""
  noise = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
  (tmp_path / 'given').mkdir()
  for name in range(9):
    cv2.imwrite(f'{tmp_path}/given/{name}.png', noise)
  with small_disk(tmp_path / 'disk', '96k') as disk:
    out = disk.folder / 'out'
    limit = contextlib.nullcontext() if disk.mounted else small_files(10_000)
    with limit, pytest.raises(UserError, match=disk.refusal):
      call_script(
        *('predict.py', '--weights', written_run, '--out', out),
        *('--image_scale', 256, 64, tmp_path / 'given'),
      )
    assert not [x for x in out.iterdir() if x.name.startswith('.')]
    for path in out.glob('*.png'):
      assert cv2.imread(str(path)).shape == noise.shape
