"""`predict.py` on pictures of all kinds, with a tiny network."""

import json

import cv2
import jax
import numpy as np
import pytest
from golden import reference
from PIL import Image

from resnest_jax import from_checkpoint, load_checkpoint
from resnest_jax.checkpoints import store
from resnest_jax.checkpoints.state import TrainState
from resnest_jax.config import load_config
from resnest_jax.data.device import preprocess
from resnest_jax.data.labels import ADE20K
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import variable_shapes

OVERRIDES = {
  'model.stem_width': 8,
  'model.width': 8,
  'model.head_channels': 16,
  'model.aux_channels': 8,
}


ENDS = ('', '_color', '_overlay')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run's folder with one checkpoint, of random weights."""
  path = tmp_path_factory.mktemp('run')
  config = load_config('configs/ade20k_pspnet.py:mini', OVERRIDES)
  shapes = variable_shapes(create_segmentor(config.model))
  state = TrainState(
    step=np.int32(3),
    **reference.filled_variables(shapes),
    opt_state={'momentum': np.zeros(1)},
  )
  about = {'config': config.to_dict(), 'classes': list(ADE20K.classes)}
  with store.open_checkpoints(path) as manager:
    store.save(manager, state, about)
  return path


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
  photo.quantize(64).save(folder / 'colour table.png')
  Image.fromarray(grey[..., 0]).save(folder / 'grey.webp', lossless=True)
  half = np.full(rgb.shape[:2], 128, np.uint8)
  Image.fromarray(np.dstack([rgb, half])).save(folder / 'rgba.png')
  # OpenCV takes BGR.
  deep = rgb[..., ::-1].astype(np.uint16) * 256 + 77
  cv2.imwrite(str(folder / '16bit.png'), deep)
  cv2.imwrite(str(folder / '16grey.tif'), deep[..., 2])
  Image.fromarray(rgb[:1, :1]).save(folder / 'pixel.png')
  (folder / 'notes.txt').write_text('no picture')
  clip = cv2.VideoWriter(
    str(folder / 'clip.avi'),
    cv2.CAP_FFMPEG,
    cv2.VideoWriter_fourcc(*'MJPG'),
    12.5,
    (122, 76),
  )
  for shift in range(6):
    clip.write(np.roll(rgb, 9 * shift, 1)[:76, :122, ::-1].copy())
  clip.release()
  return folder, {
    'plain.png': rgb,
    'plain.bmp': rgb[:, ::-1],
    'turned': np.rot90(rgb, -1),
    'cmyk': rgb,
    'colour table': np.asarray(photo.quantize(64).convert('RGB')),
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
  for suffix in ('.jpg', '.png'):
    encoded = cv2.imencode(suffix, picture)[1].tobytes()
    path = folder / f'cut_off{suffix}'
    path.write_bytes(encoded[: len(encoded) // 2])
  (folder / 'empty.png').touch()
  return folder


@pytest.fixture(scope='module')
def predicted(workdir, pictures, broken, run_script, tmp_path_factory):
  """The folder of predictions, the finished process and its command."""
  out = tmp_path_factory.mktemp('predicted') / 'out'
  command = ('predict.py', '--weights', workdir, '--out', out)
  command += ('--image_scale', 256, 64, '--opacity', 0.25)
  command += (broken, pictures[0])
  return out, run_script(*command, status=1), command


def test_predicts_pictures_of_all_kinds(workdir, pictures, predicted):
  out, process, _ = predicted
  expected = pictures[1]
  files = {path.name for path in out.iterdir()}
  assert files == {
    *('classes.json', 'predictions.json'),
    *('clip_color.mp4', 'clip_overlay.mp4'),
    *(f'{name}{end}.png' for name in expected for end in ENDS),
  }
  said = ' '.join(process.stdout.split())
  assert (
    f'{len(expected)} pictures and 1 video of 6 frames predicted in' in said
  )
  assert f'images/s, compiling included), written to {out}' in said
  assert process.stdout.count('compiling for images of up to ') == 1

  model, variables, _ = load_checkpoint(workdir)
  apply = jax.jit(lambda v, x: model.apply(v, x, train=False).logits)
  for name, picture in expected.items():
    height, width = picture.shape[:2]
    factor = min(256 / max(width, height), 64 / min(width, height))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    image = cv2.resize(picture, size)[None]
    images = preprocess(image, np.asarray([size[::-1]]))
    logits = apply(variables, images)
    classes = logits.shape[-1]
    for shape in (size[::-1], (height, width)):
      shape = (1, *shape, classes)
      logits = jax.image.resize(logits, shape, 'linear', antialias=False)
    label_map = np.asarray(logits.argmax(-1)[0])
    found = cv2.imread(str(out / f'{name}.png'), cv2.IMREAD_UNCHANGED)
    assert found.shape == (height, width), name
    # JPEG's pixels are a little off, CMYK's more.
    lossy = name in ('turned', 'cmyk')
    assert (found == label_map).mean() > (0.97 if lossy else 0.999), name
    colours = cv2.imread(str(out / f'{name}_color.png'))[..., ::-1]
    np.testing.assert_array_equal(colours, ADE20K.palette[found])
    overlay = cv2.imread(str(out / f'{name}_overlay.png'))[..., ::-1]
    if not lossy:
      mixed = picture * 0.75 + colours * 0.25
      assert np.abs(overlay - mixed).max() <= 0.5


def test_broken_pictures_are_told_after_all_others(predicted, broken):
  _, process, _ = predicted
  names = ('cut_off.jpg', 'cut_off.png', 'empty.png')
  error, *reasons = process.stderr.splitlines()
  assert error.startswith('error: 3 of 14 could not be read')
  for name, reason in zip(names, reasons, strict=True):
    assert f'{broken / name} cannot be read as a picture: it is da' in reason


def test_python_predicts_what_the_command_does(workdir, pictures, predicted):
  out, _, _ = predicted
  model = from_checkpoint(workdir, image_scale=(256, 64))
  assert model.classes == ADE20K.classes
  prediction = model.predict(pictures[0] / 'plain.png')
  mask = cv2.imread(str(out / 'plain.png.png'), cv2.IMREAD_UNCHANGED)
  assert (prediction.labels == mask).mean() > 0.999
  overlay = cv2.imread(str(out / 'plain.png_overlay.png'))[..., ::-1]
  differs = (prediction.overlay(0.25) != overlay).any(-1)
  assert not differs[prediction.labels == mask].any()


def test_predictions_say_how_they_were_made(workdir, predicted, broken):
  out, _, _ = predicted
  about = json.loads((out / 'predictions.json').read_text())
  assert about['weights']['source'] == str(workdir)
  assert about['weights']['step'] == 3
  assert about['model']['head'] == 'pspnet'
  assert about['protocol'] == {'name': 'whole', 'image_scale': [256, 64]}
  assert about['versions']['jax'] == jax.__version__
  of_name = {x['source']: x for x in about['predictions']}
  assert len(of_name) == 11
  (clip,) = (x for name, x in of_name.items() if name.endswith('clip.avi'))
  assert clip['frames'] == 6
  assert clip['overlays'] == 'clip_overlay.mp4'
  assert 'masks' not in clip
  assert [x['source'] for x in about['failed']] == [
    str(broken / name) for name in ('cut_off.jpg', 'cut_off.png', 'empty.png')
  ]
  clip = cv2.VideoCapture(str(out / 'clip_overlay.mp4'))
  assert clip.get(cv2.CAP_PROP_FPS) == 12.5
  assert clip.get(cv2.CAP_PROP_FRAME_COUNT) == 6


def test_windows_are_as_large_as_the_crops_of_the_training(workdir):
  protocol = from_checkpoint(workdir, protocol='slide').protocol
  config = load_config('configs/ade20k_pspnet.py:mini')
  assert protocol.crop == config.data.crop_size
  assert protocol.image_scale == config.data.image_scale


def test_predict_tells_mistakes_of_the_command_line(run_script, tmp_path):
  command = ('predict.py', '--weights', 'resnest', '--out', tmp_path)
  for flag, message in (
    ('--outt', 'unrecognized arguments: --outt'),
    ('--batch_size=0', '--batch_size is 0'),
    ('--protocol=hole', "argument --protocol: invalid choice: 'hole'"),
    ('--save=mask', "argument --save: invalid choice: 'mask'"),
  ):
    stderr = run_script(*command, tmp_path, flag, status=1).stderr
    assert stderr.startswith(f'error: {message}')
