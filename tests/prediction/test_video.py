"""Videos in and out, with tiny files written by OpenCV."""

import os
import signal
import struct
import threading
import time

import cv2
import numpy as np
import pytest
from evaluation.drawn import write_video
from evaluation.plain import make_predictor

from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.inference.protocols import Protocol
from resnest_jax.prediction.files import Done, predict_video
from resnest_jax.prediction.sources import KINDS, Source, output_files
from resnest_jax.prediction.video import VideoOutputs, VideoReader, _measure_fps
from resnest_jax.progress import evaluation_progress

PROTOCOL = Protocol(image_scale=(64, 48))


@pytest.fixture(scope='module')
def predictor():
  return make_predictor(protocol=PROTOCOL, batch_size=4)


def read_video(path):
  """All frames as RGB, and frames a second."""
  capture = cv2.VideoCapture(str(path))
  frames = [x[..., ::-1] for _, x in iter(capture.read, (False, None))]
  return frames, capture.get(cv2.CAP_PROP_FPS)


def predict(predictor, path, out, save=None):
  """What `predict_video` did."""
  source, done = Source(path), Done()
  (files,) = output_files([source], save)
  with evaluation_progress() as progress:
    predict_video(predictor, source, files, out, done, progress, 0.5)
    done.tasks = [(task.completed, task.total) for task in progress.tasks]
  return done


@pytest.mark.parametrize('batch_size', [4, 8])
def test_frames_keep_their_order(batch_size, tmp_path):
  predictor = make_predictor(protocol=PROTOCOL, batch_size=batch_size)
  path, out = write_video(tmp_path / 'clip.avi'), tmp_path / 'out'
  done = predict(predictor, path, out, KINDS)
  assert (done.failed, done.frames, done.tasks) == ({}, {path: 10}, [(10, 10)])
  expected = [predictor.predict(frame) for frame in read_video(path)[0]]
  masks = sorted((out / 'clip').iterdir())
  assert [path.name for path in masks] == [f'{i:06}.png' for i in range(10)]
  masks = [cv2.imread(str(path), -1) for path in masks]
  np.testing.assert_array_equal(masks, [each.labels for each in expected])
  for name, drawn in (
    ('clip_color.mp4', [each.colors() for each in expected]),
    ('clip_overlay.mp4', [each.overlay() for each in expected]),
  ):
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
  assert done.frames == {path: there}
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
  assert (done.files, os.listdir(tmp_path)) == ({}, [name])


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
    predict(predictor, path, out, KINDS)
  left = {path.name: path.read_bytes() for path in out.iterdir()}
  assert left == {'long_overlay.mp4': b'of an earlier run'}


def test_masks_of_an_earlier_run_are_replaced(predictor, tmp_path):
  path, folder = write_video(tmp_path / 'clip.avi', 2), tmp_path / 'clip'
  folder.mkdir()
  for name in ('000000.png', '000009.png', 'notes.txt'):
    (folder / name).write_text('old')
  predict(predictor, path, tmp_path, ['masks'])
  left = sorted(os.listdir(folder))
  assert left == ['000000.png', '000001.png', 'notes.txt']
  assert cv2.imread(f'{folder}/000000.png').shape == (48, 64, 3)
  assert sorted(os.listdir(tmp_path)) == ['clip', 'clip.avi']


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
  turned = struct.pack('>9i', 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
  content[matrix : matrix + 36] = turned
  path.write_bytes(content)
  shapes = [frame.shape for frame in VideoReader(path).frames()]
  assert shapes == [(64, 48, 3)] * 2


def test_frames_a_second_are_measured_where_the_file_is_not_believed(tmp_path):
  slow = write_video(tmp_path / 'slow.mp4', 8, 12.5, 'mp4v')
  fast = VideoReader(write_video(tmp_path / 'fast.mp4', 8, 1000, 'mp4v'))
  assert _measure_fps(slow) == pytest.approx(12.5)
  assert (VideoReader(slow).fps, VideoReader(slow).total) == (12.5, 8)
  assert (fast.fps, fast.total) == (pytest.approx(1000), 8)


def test_sizes_that_mp4_cannot_hold(predictor, tmp_path):
  """The last row of odd ones is left out; the masks have all."""
  frames = [np.full((47, 63, 3), i, np.uint8) for i in (20, 200)]
  files = {'masks': tmp_path / 'a', 'overlays': tmp_path / 'a.mp4'}
  with VideoOutputs(files, 10) as outputs:
    for prediction in predictor.predict_frames(frames):
      outputs.write(prediction)
    outputs.finish()
  assert read_video(tmp_path / 'a.mp4')[0][0].shape == (46, 62, 3)
  assert cv2.imread(f'{tmp_path}/a/000001.png').shape == (47, 63, 3)
  (thin,) = predictor.predict_frames([np.zeros((1, 9, 3), np.uint8)])
  path, refused = (
    tmp_path / 'b.mp4',
    pytest.raises(UserError, match='of 9x1 pix'),
  )
  with VideoOutputs({'overlays': path}, 10) as outputs, refused:
    outputs.write(thin)
  assert not path.exists()


@pytest.mark.parametrize('target', ['pipe', '/dev/zero'])
def test_pipes_and_devices_are_no_videos(target, tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'a.mp4').symlink_to(target)
  with pytest.raises(UnreadableSample, match=r'a\.mp4 is no file'):
    VideoReader(tmp_path / 'a.mp4')


def test_frames_of_too_many_pixels_are_not_decoded(tmp_path):
  path = write_video(tmp_path / 'clip.avi', size=(122, 76))
  small = make_predictor(protocol=PROTOCOL, max_pixels=122 * 76 - 1)
  done = predict(small, path, tmp_path / 'out')
  assert '122 x 76 pixels, more than 9271 ' in done.failed[path]
  assert not (tmp_path / 'out').exists()
  assert VideoReader(path, 122 * 76).total == 10
