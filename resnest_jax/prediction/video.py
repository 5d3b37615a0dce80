"""Videos, frame by frame: read with OpenCV, written whole or not at all.

Files are mp4 with MPEG-4 part 2 video ("mp4v"), the codec that the builds of
OpenCV on PyPI can write. It stores even numbers of pixels: of odd ones the
last row or column is left out. Sound is not kept.
"""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from resnest_jax.drawing import write_image
from resnest_jax.errors import UnreadableSample, UserError
from resnest_jax.files import temporary_path
from resnest_jax.inference.predictor import Prediction

VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v')
# Frames a second beyond which a file is not believed; what mp4 can say; and
# what is taken where nothing is known.
_PLAUSIBLE_FPS = (0.1, 250)
_MAX_FPS = 1000
_FALLBACK_FPS = 25.0


class VideoReader:
  """A video's frames, once, in their order.

  Attributes:
    path: of the file.
    fps: frames a second.
    total: how many frames the file says it has; None if it does not.
    read: how many have been read.
  """

  def __init__(self, path: Path):
    """Opens the file.

    Raises:
      UnreadableSample: it cannot be read as a video.
    """
    self.path, self.read, self._seconds = path, 0, 0.0
    self._capture = _open(path)
    self.fps = self._capture.get(cv2.CAP_PROP_FPS)
    total = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
    if not _PLAUSIBLE_FPS[0] <= self.fps <= _PLAUSIBLE_FPS[1]:
      # What browsers record says 1000, the resolution of its clock.
      measured = _measure_fps(path)
      total = total / self.fps * measured if self.fps > 0 else 0
      self.fps = measured
    known = math.isfinite(total) and 1 <= total < 2**31
    self.total = round(total) if known else None

  def frames(self) -> Iterator[np.ndarray]:
    """Yields uint8 (H, W, 3) RGB, all of one size, turned upright."""
    shape = None
    while True:
      there, frame = self._capture.read()
      if not there or frame.shape != (shape or frame.shape):
        break
      shape = frame.shape
      self.read += 1
      self._seconds = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
      yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

  def check_end(self) -> None:
    """Raises `UnreadableSample` unless all frames have been read.

    A file's number of frames may be an estimate from its length in seconds. So
    frames are missing where that many and that much time are.
    """
    if not self.read:
      raise UnreadableSample(
        f'{self.path} has no frame that can be read: it is damaged or cut off'
      )
    if self.total is None:
      return
    allowed = max(1.0, 0.01 * self.total)
    last = self._seconds * self.fps
    missing = self.total - self.read
    if missing > allowed and self.total - 1 - last > allowed:
      raise UnreadableSample(
        f'{self.path} is cut off or damaged after {self.read} of {self.total} '
        'frames; these are done'
      )

  def close(self) -> None:
    """Closes the file."""
    self._capture.release()


def _open(path: Path) -> cv2.VideoCapture:
  # What FFmpeg prints of damaged files is said in our words.
  os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
  capture = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)
  if not capture.isOpened():
    raise UnreadableSample(
      f'{path} cannot be read as a video: it is damaged, cut off, none, or of '
      'a codec that OpenCV does not know'
    )
  return capture


def _measure_fps(path: Path) -> float:
  """Frames a second from the times of the first ones."""
  capture, times = _open(path), []
  while len(times) < 50 and capture.grab():
    times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
  capture.release()
  seconds = times[-1] - times[0] if times else 0
  fps = (len(times) - 1) / seconds if seconds > 0 else _FALLBACK_FPS
  return min(max(fps, _PLAUSIBLE_FPS[0]), _MAX_FPS)


class VideoWriter:
  """An mp4 file that takes its name once it is whole."""

  def __init__(self, path: Path, fps: float):
    """Writes nothing yet: the first frame says the size."""
    self.path, self._fps, self._written = path, fps, 0
    self._temporary = temporary_path(path)
    self._writer: cv2.VideoWriter | None = None

  def write(self, frame: np.ndarray) -> None:
    """Appends a frame, uint8 (H, W, 3) RGB.

    Raises:
      UserError: OpenCV cannot write frames of this size.
      OSError: it cannot write there.
    """
    if self._writer is None:
      height, width = frame.shape[:2]
      if min(height, width) < 2:
        raise UserError(
          f'{self.path}: a video of {width}x{height} pixels cannot be written; '
          'take --save masks'
        )
      self._temporary.parent.mkdir(parents=True, exist_ok=True)
      self._writer = cv2.VideoWriter(
        str(self._temporary.resolve()),
        cv2.CAP_FFMPEG,
        cv2.VideoWriter_fourcc(*'mp4v'),
        self._fps,
        (width, height),
      )
      if not self._writer.isOpened():
        raise OSError(f'OpenCV could not write {self.path}')
    self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    self._written += 1

  def finish(self) -> None:
    """Gives the file its name.

    Raises:
      OSError: it has not got all frames; OpenCV does not say why.
    """
    self._writer.release()
    capture = _open(self._temporary)
    there = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    capture.release()
    if there != self._written:
      raise OSError(
        f'{self.path} has got {there:.0f} of {self._written} frames'
      )
    self._temporary.replace(self.path)

  def discard(self) -> None:
    """Removes what has no name yet."""
    if self._writer is not None:
      self._writer.release()
    self._temporary.unlink(missing_ok=True)


class MaskFolder:
  """Index masks 000000.png, 000001.png, ... in a folder that appears whole."""

  def __init__(self, path: Path):
    self.path, self._written = path, 0
    self._temporary = temporary_path(path)

  def write(self, labels: np.ndarray) -> None:
    """Writes the next frame's, uint8 (H, W)."""
    self._temporary.mkdir(parents=True, exist_ok=True)
    write_image(self._temporary / f'{self._written:06}.png', labels)
    self._written += 1

  def finish(self) -> None:
    """Gives the folder its name; masks of an earlier run are replaced."""
    if self.path.is_dir():
      for old in self.path.glob('[0-9]' * 6 + '.png'):
        old.unlink()
      for new in sorted(self._temporary.iterdir()):
        new.replace(self.path / new.name)
      self._temporary.rmdir()
    else:
      self._temporary.rename(self.path)

  def discard(self) -> None:
    """Removes what has no name yet."""
    shutil.rmtree(self._temporary, ignore_errors=True)


class VideoOutputs:
  """What is written of a video; as a context, all of it or nothing."""

  def __init__(self, files: dict[str, Path], fps: float, opacity: float = 0.5):
    """Writes nothing yet.

    Args:
      files: 'masks' -> a folder, 'colors' and 'overlays' -> mp4 files, those
        that are wanted.
      fps: frames a second.
      opacity: of the colours in overlays.
    """
    self._opacity = opacity
    self._outputs = {
      kind: MaskFolder(path) if kind == 'masks' else VideoWriter(path, fps)
      for kind, path in files.items()
    }

  def __enter__(self) -> 'VideoOutputs':
    return self

  def write(self, prediction: Prediction) -> None:
    """Appends a frame to all."""
    for kind, output in self._outputs.items():
      if kind == 'masks':
        output.write(prediction.labels)
      elif kind == 'colors':
        output.write(prediction.colors())
      else:
        output.write(prediction.overlay(self._opacity))

  def finish(self) -> None:
    """Gives all their names."""
    for output in self._outputs.values():
      output.finish()

  def __exit__(self, *_) -> None:
    for output in self._outputs.values():
      output.discard()
