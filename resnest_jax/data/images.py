"""Decoding pictures."""

import cv2
import numpy as np


def decode_image(encoded: bytes, flags: int) -> np.ndarray | None:
  """The pixels of an encoded picture, or None if it is not a whole one.

  Unlike reading a file by its path, in which OpenCV fills what is missing of a
  truncated JPEG with grey.

  Args:
    encoded: PNG, JPEG or another format that OpenCV knows.
    flags: of `cv2.imdecode`, `cv2.IMREAD_COLOR_RGB` for instance.
  """
  if not encoded:  # For which OpenCV raises.
    return None
  return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
