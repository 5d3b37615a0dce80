"""`predict.py` on pictures of all kinds, with a tiny network."""

import cv2
import jax
import numpy as np
import pytest
from golden import reference
from PIL import Image

from resnest_jax import load_checkpoint
from resnest_jax.config import load_config
from resnest_jax.data.device import preprocess
from resnest_jax.data.labels import ADE20K
from resnest_jax.errors import UserError
from resnest_jax.evaluation.pictures import (
  check_output,
  find_pictures,
  output_names,
)
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.training import checkpoints
from resnest_jax.training.step import TrainState
from resnest_jax.weights.state_dict import variable_shapes

OVERRIDES = {
  'model.stem_width': 8,
  'model.width': 8,
  'model.head_channels': 16,
  'model.aux_channels': 8,
}


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
  with checkpoints.open_checkpoints(path) as manager:
    checkpoints.save(manager, state, about)
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
  command += ('--image_scale', 256, 64, broken, pictures[0])
  return out, run_script(*command, status=1), command


def test_predicts_pictures_of_all_kinds(workdir, pictures, predicted):
  out, process, _ = predicted
  expected = pictures[1]
  files = {path.name for path in out.iterdir()}
  assert files == {'classes.json'}.union(
    *({f'{name}.png', f'{name}_overlay.png'} for name in expected)
  )
  assert f'{len(expected)} predictions in {out}' in process.stdout
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
    overlay = cv2.imread(str(out / f'{name}_overlay.png'))
    assert overlay.shape == picture.shape


def test_broken_pictures_are_told_after_all_others(predicted, broken):
  _, process, _ = predicted
  names = ('cut_off.jpg', 'cut_off.png', 'empty.png')
  error, *reasons = process.stderr.splitlines()
  assert error.startswith('error: 3 of 13 pictures could not be read')
  for name, reason in zip(names, reasons, strict=True):
    assert f'{broken / name} cannot be read as a picture: it is da' in reason


def test_predict_overwrites_nothing_unasked(predicted, pictures, tmp_path):
  out, _, _ = predicted
  paths = find_pictures([pictures[0]])
  with pytest.raises(UserError, match=r'is not empty; add --overwrite'):
    check_output(out, paths, overwrite=False)
  check_output(out, paths, overwrite=True)
  with pytest.raises(UserError, match='is the folder of the pictures'):
    check_output(pictures[0], paths, overwrite=True)
  with pytest.raises(UserError, match='is a file'):
    check_output(paths[0], paths, overwrite=True)
  check_output(tmp_path, paths, overwrite=False)


def test_pictures_of_the_same_name(tmp_path):
  first, second = tmp_path / 'first', tmp_path / 'second'
  for folder in (first, second):
    folder.mkdir()
    for name in ('a.jpg', 'a.png', 'b.jpg'):
      (folder / name).touch()
  # Given by the folder and by its name: once.
  paths = find_pictures([first, first / 'b.jpg', first / '..' / 'first'])
  assert output_names(paths) == ['a.jpg', 'a.png', 'b']
  with pytest.raises(UserError) as error:
    output_names(find_pictures([first / 'b.jpg', second]))
  assert (
    f'{first / "b.jpg"} and {second / "b.jpg"} would both be written to '
    'b.jpg.png'
  ) in str(error.value)
  paths = [first / 'b.jpg', first / 'b_overlay.jpg']
  with pytest.raises(UserError, match='both be written to b_overlay'):
    output_names(paths)
  with pytest.raises(UserError, match='there is no picture in'):
    find_pictures([tmp_path])


def test_predict_tells_mistakes_of_the_command_line(run_script, tmp_path):
  command = ('predict.py', '--weights', 'resnest', '--out', tmp_path)
  for flag, message in (
    ('--outt', 'unrecognized arguments: --outt'),
    ('--batch_size=0', '--batch_size is 0'),
  ):
    stderr = run_script(*command, tmp_path, flag, status=1).stderr
    assert stderr.startswith(f'error: {message}')
