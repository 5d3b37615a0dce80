"""`predict.py` on pictures of all kinds, with a tiny network."""

import contextlib
import functools
import json
import os
import re

import cv2
import jax
import numpy as np
import pytest
from data.pictures import claiming, saved, tiff
from evaluation import plain
from evaluation.drawn import smooth_picture, write_video
from evaluation.plain import make_predictor
from evaluation.runs import OVERRIDES, STEP
from PIL import Image
from trouble import small_disk, small_files

from resnest_jax import from_checkpoint, load_checkpoint
from resnest_jax.data.preprocess import preprocess
from resnest_jax.errors import UserError
from resnest_jax.labels import ADE20K

ENDS = ('', '_color', '_overlay')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """A folder with files of all kinds, and what a viewer shows of each.

  All are of few sizes, as the network is compiled for each.
  """
  folder = tmp_path_factory.mktemp('pictures')
  rgb = smooth_picture(77, 123)
  grey = np.repeat(rgb[..., :1], 3, -1)
  photo = Image.fromarray(rgb)
  jpeg = {'quality': 100, 'subsampling': 0}
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation: to be turned by 90 degrees.
  photo.save(folder / 'plain.png')
  photo.transpose(Image.FLIP_LEFT_RIGHT).save(folder / 'plain.bmp')
  photo.save(folder / 'turned.JPG', exif=exif, **jpeg)
  photo.convert('CMYK').save(folder / 'cmyk.jpeg', **jpeg)
  Image.fromarray(grey[..., 0]).save(folder / 'grey.webp', lossless=True)
  # With opacities.
  Image.fromarray(np.dstack([rgb, grey[..., 0]])).save(folder / 'rgba.png')
  deep = rgb.astype(np.uint16) * 256 + 77
  cv2.imwrite(f'{folder}/16bit.png', deep[..., ::-1])  # OpenCV takes BGR.
  cv2.imwrite(f'{folder}/16grey.tif', deep[..., 0])
  Image.fromarray(rgb[:1, :1]).save(folder / 'pixel.png')
  (folder / 'notes.txt').write_text('no picture')
  write_video(folder / 'clip.avi', 6, 12.5, size=(122, 76))
  shown = dict.fromkeys(('plain.png', 'cmyk', 'rgba', '16bit'), rgb)
  shown |= {'grey': grey, '16grey': grey, 'pixel': rgb[:1, :1]}
  shown |= {'plain.bmp': rgb[:, ::-1], 'turned': np.rot90(rgb, -1)}
  return folder, shown


@pytest.fixture(scope='module')
def broken(tmp_path_factory):
  """Three files that are no pictures, whatever their names say."""
  folder = tmp_path_factory.mktemp('broken')
  photo = Image.fromarray(smooth_picture())
  for form in ('JPEG', 'PNG'):
    whole = saved(form, photo)
    (folder / f'cut_off.{form}').write_bytes(whole[: len(whole) // 2])
  (folder / 'empty.png').touch()
  names = ('cut_off.JPEG', 'cut_off.PNG', 'empty.png')
  return [f'{folder}/{name}' for name in names]


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


def read(path):
  return np.asarray(Image.open(path))


def test_predicts_pictures_of_all_kinds(written_run, pictures, predicted):
  (out, process, _), (_, expected) = predicted, pictures
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
    found = read(out / f'{name}.png')
    assert found.shape == (height, width), name
    # JPEG's pixels are a little off, CMYK's more.
    lossy = name in ('turned', 'cmyk')
    same = found == scores.argmax(-1)
    assert same.mean() > (0.97 if lossy else 0.999), name
    colours = read(out / f'{name}_color.png')
    np.testing.assert_array_equal(colours, ADE20K.palette[found])
    if not lossy:
      mixed = picture * 0.75 + colours * 0.25
      assert np.abs(read(out / f'{name}_overlay.png') - mixed).max() <= 0.5


def test_broken_pictures_are_told_after_all_others(predicted, broken):
  error, *reasons = predicted[1].stderr.splitlines()
  assert error.startswith('error: 3 of 13 could not be read or written; rep')
  for path, reason in zip(broken, reasons, strict=True):
    assert f'{path} cannot be read as a picture: it is da' in reason


def test_predictions_say_how_they_were_made(written_run, predicted, broken):
  out, _, about = predicted
  origin = {'source': str(written_run), 'step': STEP}
  assert about['weights'].items() >= origin.items()
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
  files = claiming(60_000, 60_000)
  reasons = dict.fromkeys(files, r'is \d+ x \d+ pixels, more than 2684')
  reasons |= {'HDR': 'cannot be read as a picture', 'bands': 'has 12 bands'}
  files['bands'] = tiff(np.zeros((5, 7, 12), np.uint8))
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  (tmp_path / 'zero').symlink_to('/dev/zero')
  reasons['zero'] = 'is a device'
  paths = [pictures[0] / 'plain.png', *map(tmp_path.joinpath, reasons)]
  found = dict(make_predictor().predict_each(paths))
  assert found[0].labels.shape == (77, 123)
  for index, (name, reason) in enumerate(reasons.items(), 1):
    assert re.search(reason, str(found[index])), name


def test_the_limit_of_pixels_is_that_of_the_predictor(pictures):
  path = pictures[0] / 'plain.png'
  told = r'123 x 77 pixels, more than 9470 .*\n.*raise'
  with pytest.raises(UserError, match=told):
    make_predictor(max_pixels=77 * 123 - 1).predict(path)
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


@pytest.fixture
def predict(call_script, written_run):
  """`predict(out, 'x.png')`: predict.py in this process."""
  flags = ('--weights', written_run, '--image_scale', 256, 64, '--out')
  return functools.partial(call_script, 'predict.py', *flags)


def test_overwrite_replaces_links_and_what_they_lead_to_stays(
  predict, tmp_path
):
  """One result that cannot be written keeps none from the others."""
  given, mine, out = (tmp_path / name for name in ('given', 'mine', 'out'))
  for folder in (given, mine, out / 'b_overlay.png'):
    folder.mkdir(parents=True)
  for name in ('a', 'b', 'l' * 245):
    cv2.imwrite(f'{given}/{name}.png', np.zeros((40, 64, 3), np.uint8))
  write_video(given / 'clip.avi', 2)
  for name in ('000000.png', 'a.png'):
    (mine / name).write_text('mine')
  for name, target in {
    'a.png': 'mine/a.png',
    'a_color.png': 'given/b.png',
    'classes.json': 'mine/a.png',
    'predictions.json': 'nowhere',
    'clip': 'mine',
    'clip_color.mp4': 'mine/a.png',
  }.items():
    (out / name).symlink_to(tmp_path / target)
  kept = {x: x.read_bytes() for x in (*given.iterdir(), *mine.iterdir())}
  told = r'2 of 4 could .*\n.*/b\.png .*Is a directory.*\n.*name too long'
  with pytest.raises(UserError, match=told):
    predict(
      out, '--overwrite', '--save', 'masks', 'colors', 'overlays', '--', given
    )
  assert {
    x: x.read_bytes() for x in (*given.iterdir(), *mine.iterdir())
  } == kept
  there = {x.name for x in out.iterdir()}
  assert {f'a{end}.png' for end in ENDS} | {'clip', 'b.png'} <= there
  assert not [x for x in out.iterdir() if x.is_symlink() or x.name[0] == '.']
  assert sorted(os.listdir(out / 'clip')) == ['000000.png', '000001.png']
  about = json.loads((out / 'predictions.json').read_text())
  assert len(about['predictions']) == len(about['failed']) == 2


def test_a_full_disk_ends_a_prediction(predict, tmp_path):
  """In one line, with all that is written whole."""
  noise = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
  given = tmp_path / 'given'
  given.mkdir()
  for name in range(9):
    cv2.imwrite(f'{given}/{name}.png', noise)
  with small_disk(tmp_path / 'disk', '96k') as disk:
    out = disk.folder / 'out'
    limit = contextlib.nullcontext() if disk.mounted else small_files(10_000)
    with limit, pytest.raises(UserError, match=disk.refusal):
      predict(out, given)
    assert not list(out.glob('.*'))
    assert {read(x).shape[:2] for x in out.glob('*.png')} <= {(60, 100)}
