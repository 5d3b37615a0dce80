"""Pictures and videos to predict."""

import cv2
import numpy as np


def smooth_picture(height=90, width=120, seed=0):
  # RGB, uint8 (height, width, 3), that a JPEG file keeps as it is, nearly.
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
  return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def write_video(path, frames=10, fps=15.0, codec='MJPG', size=(64, 48)):
  # Frames of large random patches; `size` is width and height.
  code = cv2.VideoWriter_fourcc(*codec)
  writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, fps, size)
  for i in range(frames):
    small = np.random.default_rng(i).integers(0, 256, (3, 4, 3), np.uint8)
    writer.write(cv2.resize(small, size, interpolation=cv2.INTER_NEAREST))
  writer.release()
  return path
