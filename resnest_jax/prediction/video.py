"""Reads and writes videos with OpenCV, frame by frame and without sound."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np

from resnest_jax.data.images import MAX_PIXELS, check_pixels
from resnest_jax.drawing import write_image
from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.files import plain_name, whole_file, work_folder
from resnest_jax.inference.predictions import Prediction

VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v')
_PLAUSIBLE_FPS = (0.1, 250)  # A file is believed; others are measured.
_MAX_FPS = 1000  # Written at most.
_FALLBACK_FPS = 25.0  # For files without times.
Write = Callable[[np.ndarray], None]


class VideoReader:
  """Reads a video's frames once, in order; `UnreadableSample` if it is none.

  Attributes:
    fps: frames per second.
    total: number of frames by the file's header, or None.
    read: number of frames read so far.
  """

  def __init__(self, path: Path, max_pixels: int = MAX_PIXELS):
    self.path, self.read, self._seconds = path, 0, 0.0
    self._capture = _open(path)
    sides = cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH
    size = [round(self._capture.get(side)) for side in sides]
    check_pixels(*size, max_pixels, path)
    self.fps = self._capture.get(cv2.CAP_PROP_FPS)
    total = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
    if not _PLAUSIBLE_FPS[0] <= self.fps <= _PLAUSIBLE_FPS[1]:
      # Recordings of browsers give 1000, the resolution of their clock.
      measured = _measure_fps(path)
      # The number is the duration times the wrong rate, where it is estimated.
      total = total / self.fps * measured if self.fps > 0 else 0
      self.fps = measured
    known = math.isfinite(total) and 1 <= total < 2**31
    self.total = round(total) if known else None

  def frames(self) -> Iterator[np.ndarray]:
    """Yields uint8 (H, W, 3) RGB, all of one size, turned upright."""
    shape = None
    while True:
      # A change of size ends the video, as a written one has a single size.
      there, frame = self._capture.read()
      if not there or frame.shape != (shape or frame.shape):
        break
      shape = frame.shape
      self.read += 1
      self._seconds = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
      yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

  def check_end(self) -> None:
    """Raises `UnreadableSample` unless all frames have been read."""
    if not self.read:
      raise UnreadableSample(
        f'{self.path} has no frame that can be read: it is damaged or cut off'
      )
    if self.total is None:
      return
    # The header's number may be an estimate from the duration: both the count
    # and the time have to fall short, by more than a frame or 1 %.
    allowed = max(1.0, 0.01 * self.total)
    last = self._seconds * self.fps
    missing = self.total - self.read
    if missing > allowed and self.total - 1 - last > allowed:
      raise UnreadableSample(
        f'{self.path} is cut off or damaged after {self.read} of {self.total} '
        'frames; these are done'
      )

  def close(self) -> None:
    self._capture.release()


def _open(path: Path) -> cv2.VideoCapture:
  if not path.is_file():  # A pipe might never come.
    raise UnreadableSample(f'{path} is no file, or leads to none')
  # AV_LOG_QUIET: our errors name damaged files.
  os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
  with plain_name(path) as name:
    capture = cv2.VideoCapture(str(name), cv2.CAP_FFMPEG)
  if not capture.isOpened():
    raise UnreadableSample(
      f'{path} cannot be read as a video: it is damaged, cut off, no video, or '
      'has a codec that OpenCV does not know'
    )
  return capture


def _measure_fps(path: Path) -> float:
  """Frames per second from the times of the first 50 frames."""
  # A second capture: frames cannot be put back.
  capture, times = _open(path), []
  while len(times) < 50 and capture.grab():
    times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
  capture.release()
  seconds = times[-1] - times[0] if times else 0
  fps = (len(times) - 1) / seconds if seconds > 0 else _FALLBACK_FPS
  return min(max(fps, _PLAUSIBLE_FPS[0]), _MAX_FPS)


@contextlib.contextmanager
def video_file(path: Path, fps: float) -> Iterator[Write]:
  """An mp4 file of frames, uint8 (H, W, 3) RGB.

  `UserError` if OpenCV cannot write such a size, `OSError` if to this place, or
  if frames are missing at the end.
  """
  writer, written = None, 0

  def write(frame: np.ndarray) -> None:
    nonlocal writer, written
    if writer is None:
      height, width = frame.shape[:2]
      # The codec drops the last row or column of an odd size; 1 leaves none.
      if min(height, width) < 2:
        raise UserError(
          f'{path}: a video of {width}x{height} pixels cannot be written; '
          'use --save masks'
        )
      # MPEG-4 part 2: OpenCV's packages on PyPI have no encoder for H.264.
      how = cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*'mp4v'), fps
      with plain_name(temporary) as name:
        writer = cv2.VideoWriter(str(name), *how, (width, height))
      if not writer.isOpened():
        raise OSError(f'OpenCV could not write {path}')
    writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    written += 1

  with whole_file(path) as temporary:
    try:
      yield write
    finally:
      if writer:
        writer.release()
    # OpenCV's `write` tells nothing, even on a full disk.
    capture = _open(temporary)
    there = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    capture.release()
    if there != written:
      raise OSError(f'{path} has only {there:.0f} of {written} frames')


@contextlib.contextmanager
def mask_folder(path: Path) -> Iterator[Write]:
  """Masks 000000.png, 000001.png, ..., each uint8 (H, W)."""
  numbers = itertools.count()
  with work_folder(path) as temporary:
    yield lambda labels: write_image(
      temporary / f'{next(numbers):06}.png', labels
    )
    if path.is_symlink():
      path.unlink()  # What it leads to is not ours.
    # Masks of a longer earlier video go; other files are the user's.
    if path.is_dir():
      for old in path.glob('[0-9]' * 6 + '.png'):
        old.unlink()
      for new in sorted(temporary.iterdir()):
        new.replace(path / new.name)
    else:
      temporary.rename(path)


def drawn(
  prediction: Prediction, kind: str, opacity: float, legend: bool = False
) -> np.ndarray:
  """What is written of 'masks', 'colors', 'overlays' or 'confidence'."""
  if kind == 'overlays':
    return prediction.overlay(opacity, legend)
  if kind == 'confidence':  # 255 is 1.
    return np.uint8(np.rint(255 * prediction.probabilities))
  return prediction.labels if kind == 'masks' else prediction.colors()


@contextlib.contextmanager
def video_outputs(
  files: Mapping[str, Path], fps: float, opacity: float = 0.5
) -> Iterator[Callable[[Prediction], None]]:
  """A function that writes a frame's prediction to all outputs of a video.

  `files` are some of 'masks' -> folder, 'colors' and 'overlays' -> mp4 file.
  They get their names at the end, unless an error is raised.
  """
  with contextlib.ExitStack() as stack:
    writes = {
      kind: stack.enter_context(
        mask_folder(path) if kind == 'masks' else video_file(path, fps)
      )
      for kind, path in files.items()
    }

    def write(prediction: Prediction) -> None:
      for kind, write_one in writes.items():
        write_one(drawn(prediction, kind, opacity))

    yield write
