"""What augmentation is held against, in plain NumPy and 8-bit OpenCV."""

import cv2
import numpy as np


def blocks(rng, height, width, num_classes, cell, ignored=0.05):
  """A label of square cells with random classes and some ignored pixels."""
  cells = rng.integers(
    0, num_classes, (-(-height // cell), -(-width // cell)), dtype=np.uint8
  )
  label = cells.repeat(cell, 0).repeat(cell, 1)[:height, :width].copy()
  label[rng.random((height, width)) < ignored] = 255
  return label


def origin_twin(label, offsets, crop_size, cat_max_ratio):
  """The crop rule with loops and np.unique."""

  def origin(u):
    room = np.maximum(np.subtract(label.shape, crop_size), 0) + 1
    return tuple(np.floor(u * room).astype(int).tolist())

  tries = iter(offsets)
  top, left = origin(next(tries))
  refused = 0
  for _ in range(10):
    crop = label[top : top + crop_size[0], left : left + crop_size[1]]
    classes, counts = np.unique(crop[crop != 255], return_counts=True)
    if len(classes) > 1 and max(counts) / sum(counts) < cat_max_ratio:
      break
    refused += 1
    top, left = origin(next(tries))
  return (top, left), refused


def scale_and_shift(image, factor=1.0, shift=0.0):
  """image * factor + shift in float32, clipped and truncated."""
  changed = image.astype(np.float32) * np.float32(factor) + np.float32(shift)
  return np.clip(changed, 0, 255).astype(np.uint8)


def in_hsv(image, channel, change):
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
  hsv[..., channel] = change(hsv[..., channel])
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def photometric_distortion(image, draw):
  """mmsegmentation's, on uint8 (H, W, 3) RGB, rounding after each step.

  A drawn value that changes nothing, such as a hue shift of 0, still rounds the
  image to 8-bit HSV and back.
  """
  if draw.brightness is not None:
    image = scale_and_shift(image, shift=draw.brightness)
  if draw.contrast_first is not None:
    image = scale_and_shift(image, factor=draw.contrast_first)
  if draw.saturation is not None:
    image = in_hsv(image, 1, lambda x: scale_and_shift(x, draw.saturation))
  if draw.hue is not None:
    image = in_hsv(image, 0, lambda x: (x.astype(int) + draw.hue) % 180)
  if draw.contrast_last is not None:
    image = scale_and_shift(image, factor=draw.contrast_last)
  return image
