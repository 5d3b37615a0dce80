"""`predict.py` on pictures of all kinds and videos, with tiny networks."""

import json
import os
import signal
import threading
import time

import cv2
import jax
import numpy as np
import pytest
from data.pictures import claiming, saved, tiff
from evaluation import plain
from evaluation.drawn import smooth_picture, write_video
from evaluation.runs import OVERRIDES, STEP
from PIL import Image
from trouble import small_disk, small_files

from resnest_jax import from_checkpoint, load_checkpoint
from resnest_jax.data.preprocess import preprocess
from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.labels import ADE20K
from resnest_jax.prediction import files, sources, video
from resnest_jax.progress import evaluation_progress

ENDS = ('', '_color', '_overlay')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """A folder with files of all kinds, and what a viewer shows of each."""
  # All are of few sizes, as the network is compiled for each.
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
  """A folder of files that cannot be read, and what is said of each."""
  folder, photo = tmp_path_factory.mktemp('broken'), smooth_picture()
  bombs = claiming(60_000, 60_000)
  contents = bombs | {'bands': tiff(np.zeros((5, 7, 12), 'u1')), 'empty': b''}
  for kind in ('JPEG', 'PNG'):
    whole = saved(kind, Image.fromarray(photo))
    contents[f'cut {kind}'] = whole[: len(whole) // 2]
  for name, content in contents.items():
    (folder / f'{name}.jpg').write_bytes(content)
  (folder / 'device.jpg').symlink_to('/dev/zero')
  told = dict.fromkeys(bombs, ' pixels, more than 1000')
  told |= {'HDR': 'be decoded', 'bands': '12 bands', 'device': 'a device'}
  damaged = 'cannot be decoded: its '
  told |= dict.fromkeys(('cut JPEG', 'cut PNG', 'empty'), damaged)
  told = {f'{folder}/{name}.jpg': why for name, why in told.items()}
  return folder, dict(sorted(told.items()))


@pytest.fixture(scope='module')
def predicted(written_run, pictures, broken, run_script, tmp_path_factory):
  """The folder of predictions, the finished process and its record."""
  out = tmp_path_factory.mktemp('predicted') / 'out'
  flags = ('--weights', written_run, '--image_scale', 256, 64, '--out', out)
  words = (*flags, '--opacity', 0.25, broken[0], pictures[0])
  process = run_script('predict.py', *words, status=1)
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
  assert '2 pictures have 16 bits, of which the upper 8 are used' in said
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
    same = (found == scores.argmax(-1)).mean()
    assert same > (0.97 if lossy else 0.999), name
    colours = read(out / f'{name}_color.png')
    np.testing.assert_array_equal(colours, ADE20K.palette[found])
    if not lossy:
      mixed = picture * 0.75 + colours * 0.25
      assert np.abs(read(out / f'{name}_overlay.png') - mixed).max() <= 0.5


def test_broken_pictures_are_told_after_all_others(predicted, broken):
  error, *reasons = predicted[1].stderr.splitlines()
  assert error.startswith('error: 16 of 26 could not be read or written; rep')
  for (path, told), reason in zip(broken[1].items(), reasons, strict=True):
    assert path in reason
    assert told in reason


def test_predictions_say_how_they_were_made(written_run, predicted, broken):
  out, _, about = predicted
  origin = {'source': str(written_run), 'step': STEP}
  assert about['weights'].items() >= origin.items()
  assert about['protocol'] == {'name': 'whole', 'image_scale': [256, 64]}
  assert len(about['predictions']) == 10
  (clip,) = (x for x in about['predictions'] if 'frames' in x)
  assert (clip['frames'], clip['overlays']) == (6, 'clip_overlay.mp4')
  assert [x['source'] for x in about['failed']] == [*broken[1]]
  assert read_video(out / clip['overlays'])[1] == 12.5


def test_windows_are_as_large_as_the_crops_of_the_training(written_run):
  protocol = from_checkpoint(written_run, protocol='slide').protocol
  assert protocol.crop == OVERRIDES['data.crop_size']
  assert protocol.image_scale == OVERRIDES['data.image_scale']


def test_the_limit_of_pixels_is_that_of_the_predictor(pictures):
  path = pictures[0] / 'plain.png'
  with pytest.raises(UserError, match=r'123 x 77 pix.* 9470 .*\n.*raise'):
    plain.make_predictor(max_pixels=77 * 123 - 1).predict(path)
  # As the message says; its overlay reads the picture again.
  overlay = plain.make_predictor(max_pixels=77 * 123).predict(path).overlay()
  assert overlay.shape == (77, 123, 3)


def test_mistakes_of_the_command_line_are_told(call_script, tmp_path):
  for flag, message in (
    ('--recursiv', 'unrecognized arguments: --recursiv'),
    ('--batch_size=0', '--batch_size is 0'),
    ('--workdir=z', '--workdir: not allowed with argument --weights'),
    ('--max_pixels=-1', '--max_pixels is -1; give 1 or more'),
  ):
    with pytest.raises(UserError, match=message):
      call_script('predict.py', '--weights=x', '--out', tmp_path, 'y', flag)


@pytest.fixture
def command(call_script, written_run):
  """`command(out, 'x.png')`: predict.py in this process."""
  flags = ('--weights', written_run, '--image_scale', 256, 64, '--out')
  return lambda *words: call_script('predict.py', *flags, *words)


def test_links_are_replaced_and_what_they_lead_to_stays(command, tmp_path):
  given, mine, out = (tmp_path / name for name in ('given', 'mine', 'out'))
  # One result that cannot be written keeps none from the others.
  for folder in (given, mine, out / 'b_overlay.png'):
    folder.mkdir(parents=True)
  for name in ('a', 'b'):
    cv2.imwrite(f'{given}/{name}.png', np.zeros((40, 64, 3), np.uint8))
  write_video(given / 'clip.avi', 2)
  for name in ('000000.png', 'a.png'):
    (mine / name).write_text('mine')
  for name in ('a.png', 'classes.json', 'clip_color.mp4'):
    (out / name).symlink_to(mine / 'a.png')
  (out / 'a_color.png').symlink_to(given / 'b.png')
  (out / 'predictions.json').symlink_to('nowhere')
  (out / 'clip').symlink_to(mine)
  kept = {x: x.read_bytes() for x in tmp_path.glob('[gm]*/*')}
  flags = ['--overwrite', '--save', 'masks', 'colors', 'overlays', '--']
  told = r'1 of 3 could not be .*\n.*/b\.png .*Is a directory'
  with pytest.raises(UserError, match=told):
    command(out, *flags, given)
  assert {x: x.read_bytes() for x in tmp_path.glob('[gm]*/*')} == kept
  assert {f'a{end}.png' for end in ENDS} | {'b.png'} <= set(os.listdir(out))
  assert not [x for x in out.iterdir() if x.is_symlink() or x.name[0] == '.']
  assert sorted(os.listdir(out / 'clip')) == ['000000.png', '000001.png']
  about = json.loads((out / 'predictions.json').read_text())
  assert (len(about['predictions']), len(about['failed'])) == (2, 1)


def test_a_full_disk_ends_a_prediction(command, tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
  for name in range(9):
    cv2.imwrite(f'{tmp_path}/{name}.png', noise)
  with small_disk(tmp_path / 'disk', '96k') as disk:
    out = disk.folder / 'out'
    limit = small_files(2**40 if disk.mounted else 10_000)
    with limit, pytest.raises(UserError, match=disk.refusal):
      command(out, tmp_path)
    # All that is written is whole.
    assert not list(out.glob('.*'))
    assert {read(x).shape[:2] for x in out.glob('*.png')} <= {(60, 100)}


# --- Videos ------------------------------------------------------------------


@pytest.fixture(scope='module')
def predictor():
  return plain.make_predictor(batch_size=4)


def read_video(path):
  capture = cv2.VideoCapture(str(path))
  frames = [x[..., ::-1] for _, x in iter(capture.read, (False, None))]
  return frames, capture.get(cv2.CAP_PROP_FPS)


def predict(predictor, path, out, save=None):
  (source,) = sources.with_files([sources.Source(path)], save)
  with evaluation_progress() as progress:
    done = files.Done(out, progress)
    files.predict_video(predictor, source, done, 0.5)
    done.tasks = [(task.completed, task.total) for task in progress.tasks]
  return done


@pytest.mark.parametrize('batch_size', [4, 8])
def test_frames_keep_their_order_and_replace_earlier_ones(batch_size, tmp_path):
  predictor = plain.make_predictor(batch_size=batch_size)
  path, out = write_video(tmp_path / 'clip.avi'), tmp_path / 'out'
  (out / 'clip').mkdir(parents=True)
  for name in ('000000.png', '000010.png', 'notes.txt'):
    (out / 'clip' / name).write_text('of an earlier run')
  done = predict(predictor, path, out, sources.KINDS)
  assert (done.failed, done.tasks) == ({}, [(10, 10)])
  assert done.entries[path]['frames'] == 10
  expected = [predictor.predict(frame) for frame in read_video(path)[0]]
  names = [f'{i:06}.png' for i in range(10)]
  videos = ['clip_color.mp4', 'clip_overlay.mp4']
  assert sorted(os.listdir(out)) == ['clip', *videos]
  assert sorted(os.listdir(out / 'clip')) == [*names, 'notes.txt']
  masks = [cv2.imread(f'{out}/clip/{name}', -1) for name in names]
  np.testing.assert_array_equal(masks, [each.labels for each in expected])
  for name, way in zip(videos, ('colors', 'overlay'), strict=True):
    drawn = [getattr(each, way)() for each in expected]
    written, fps = read_video(out / name)
    assert fps == 15.0
    assert np.shape(written) == np.shape(drawn)
    for i, frame in enumerate(written):  # The codec changes pixels a little.
      distances = np.abs(np.subtract(drawn, frame, dtype=float))
      assert distances.mean((1, 2, 3)).argmin() == i


def test_what_was_read_of_a_video_that_is_cut_off_is_done(predictor, tmp_path):
  path = write_video(tmp_path / 'cut.avi', 40)
  os.truncate(path, path.stat().st_size // 2)
  there = len(read_video(path)[0])
  assert 10 < there < 30
  done = predict(predictor, path, tmp_path)
  assert done.entries[path]['frames'] == there
  told = f'cut.avi is cut off or damaged after {there} of 40 frames'
  assert told in done.failed[path]
  assert len(read_video(tmp_path / 'cut_overlay.mp4')[0]) == there


NO_VIDEOS = (
  ('cut.mp4', 2000, 'cannot be read as a video'),
  ('empty.mkv', 0, 'cannot be read as a video'),
  ('header.mkv', 600, 'has no frame that can be read'),
)


@pytest.mark.parametrize(('name', 'size', 'why'), NO_VIDEOS)
def test_no_video_is_told_and_not_written(name, size, why, predictor, tmp_path):
  path = write_video(tmp_path / name, 40, codec='mp4v')
  os.truncate(path, size)
  done = predict(predictor, path, tmp_path)
  assert why in done.failed[path]
  assert (done.entries, os.listdir(tmp_path)) == ({}, [name])


def test_stopping_leaves_nothing_half_written(predictor, tmp_path):
  path, out = write_video(tmp_path / 'long.avi', 600), tmp_path / 'out'
  out.mkdir()
  (out / 'long_overlay.mp4').write_bytes(b'of an earlier run')

  def stop():
    while not list(out.glob('.resnest-jax-*.mp4')):
      time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

  threading.Thread(target=stop, daemon=True).start()
  with pytest.raises(KeyboardInterrupt):
    predict(predictor, path, out, sources.KINDS)
  left = {path.name: path.read_bytes() for path in out.iterdir()}
  assert left == {'long_overlay.mp4': b'of an earlier run'}


def test_a_frame_is_no_more_than_a_few_batches_ahead(predictor):
  taken = []
  frames = (taken.append(i) or np.zeros((48, 64, 3), 'u1') for i in range(100))
  done = enumerate(predictor.predict_frames(frames))
  ahead = [len(taken) - number for number, _ in done]
  assert len(ahead) == 100
  assert max(ahead) <= 3 * 4


def test_a_turned_video_is_read_upright(tmp_path):
  path = write_video(tmp_path / 'phone.mp4', 2, codec='mp4v')
  content = bytearray(path.read_bytes())
  matrix = content.index(b'tkhd') + 44
  one = 1 << 16
  turned = np.array([0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30], '>i4')
  content[matrix : matrix + 36] = turned.tobytes()
  path.write_bytes(content)
  shapes = [frame.shape for frame in video.VideoReader(path).frames()]
  assert shapes == [(64, 48, 3)] * 2


def test_frames_a_second_are_measured_where_the_file_is_not_believed(tmp_path):
  slow = write_video(tmp_path / 'slow.mp4', 8, 12.5, 'mp4v')
  fast = video.VideoReader(write_video(tmp_path / 'fast.mp4', 8, 1000, 'mp4v'))
  assert video._measure_fps(slow) == pytest.approx(12.5)
  assert (video.VideoReader(slow).fps, video.VideoReader(slow).total) == (
    12.5,
    8,
  )
  assert (fast.fps, fast.total) == (pytest.approx(1000), 8)


def test_sizes_that_mp4_cannot_hold(predictor, tmp_path):
  # The last row of odd ones is left out; the masks have all.
  frames = [np.full((47, 63, 3), i, np.uint8) for i in (20, 200)]
  paths = {'masks': tmp_path / 'a', 'overlays': tmp_path / 'a.mp4'}
  with video.video_outputs(paths, 10) as write:
    for prediction in predictor.predict_frames(frames):
      write(prediction)
  assert read_video(tmp_path / 'a.mp4')[0][0].shape == (46, 62, 3)
  assert cv2.imread(f'{tmp_path}/a/000001.png').shape == (47, 63, 3)
  (thin,) = predictor.predict_frames([np.zeros((1, 9, 3), np.uint8)])
  refused = pytest.raises(UserError, match='a video of 9x1 pixels cannot be')
  with (
    refused,
    video.video_outputs({'overlays': tmp_path / 'b.mp4'}, 10) as out,
  ):
    out(thin)
  assert not (tmp_path / 'b.mp4').exists()


@pytest.mark.parametrize('target', ['pipe', '/dev/zero'])
def test_pipes_and_devices_are_no_videos(target, tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'a.mp4').symlink_to(target)
  with pytest.raises(UnreadableSample, match=r'a\.mp4 is no file'):
    video.VideoReader(tmp_path / 'a.mp4')


def test_frames_of_too_many_pixels_are_not_decoded(tmp_path):
  path = write_video(tmp_path / 'clip.avi', size=(122, 76))
  done = predict(plain.make_predictor(max_pixels=9271), path, tmp_path)
  assert '122 x 76 pixels, more than 9271 ' in done.failed[path]
  assert os.listdir(tmp_path) == ['clip.avi']
  assert video.VideoReader(path, 122 * 76).total == 10
