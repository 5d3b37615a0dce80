"""A small network, batches, and every protocol done the plain way.

That is one image at a time, without padding, tiles or matrices, following
mmsegmentation's own steps.
"""

import math
import re
import types

import cv2
import jax
import numpy as np
from golden import reference

from resnest_jax import Predictor, sharding
from resnest_jax.data import preprocess
from resnest_jax.data.own.classes import label_set
from resnest_jax.inference import steps
from resnest_jax.inference.protocols import Protocol
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import import_state_dict

CLASSES = 7
NAMES = tuple('abcdefg')
# A network that is smaller yet, without an auxiliary head.
TINY = reference.TINY | {'stem_width': 4, 'width': 4, 'aux_channels': None}
CANVAS, LABEL_CANVAS = (64, 96), (80, 64)
# Height and width of the network's input and of the original: enlarged,
# shrunk, mixed, one pixel, and the whole canvas.
SIZES = [(33, 96), (64, 57), (41, 70), (1, 1), (64, 96)]
LABEL_SIZES = [(80, 31), (20, 19), (29, 64), (5, 3), (80, 64)]


class Upsampler:
  """Stands in for a network: logits at stride 8 are a picture's colours."""

  def __init__(self, num_classes=CLASSES):
    self.num_classes = num_classes

  def apply(self, variables, images, train, size):
    assert train is False
    small = images[:, ::8, ::8] @ variables['kernel'][:, : self.num_classes]
    return types.SimpleNamespace(logits=small)


def random_batch(seed, sizes, label_sizes, label_canvas=LABEL_CANVAS):
  rng = np.random.default_rng(seed)
  count = len(sizes)
  batch = {
    'image': np.zeros((count, *CANVAS, 3), np.uint8),
    'size': np.array(sizes, np.int32),
    'label': np.full((count, *label_canvas), 255, np.uint8),
    'label_size': np.array(label_sizes, np.int32),
    'index': np.arange(count, dtype=np.int32),
    'name': [f'image_{i}' for i in range(count)],
  }
  for i, ((h, w), (hl, wl)) in enumerate(zip(sizes, label_sizes, strict=True)):
    batch['image'][i, :h, :w] = rng.integers(0, 256, (h, w, 3))
    label = rng.integers(0, CLASSES, (hl, wl))
    label[rng.random((hl, wl)) < 0.2] = 255
    batch['label'][i, :hl, :wl] = label
  return batch


def batch_of(seed, indices):
  """Those of `SIZES`."""
  return random_batch(seed, SIZES[indices], LABEL_SIZES[indices])


def make_step(model=None, **options):
  return steps.make_eval_step(model or Upsampler(), CLASSES, **options)


def fill_slot(batch, slot):
  """Turns a slot into the filler that the pipeline uses."""
  batch['image'][slot] = 0
  batch['size'][slot] = batch['label_size'][slot] = 1
  batch['label'][slot] = 255
  batch['index'][slot] = -1
  batch['name'][slot] = ''


def golden_model(row):
  """mmsegmentation's network of depth 14, one block a stage, and weights."""
  shapes = {
    name: shape
    for name, shape in reference.manifest(f'mmseg/{row}').items()
    if not re.search(r'layer\d\.[1-9]', name)
  }
  config = {'stage_sizes': (1, 1, 1, 1), 'head': row.partition('_')[2]}
  model = create_segmentor(reference.CONFIG | config)
  return model, import_state_dict(model, reference.filled(shapes))


def variables():
  kernel = np.random.default_rng(5).standard_normal((3, CLASSES))
  return {'kernel': kernel.astype(np.float32)}


def resized(x, size):
  """Bilinear with half-pixel centres, (h, w, C) -> (*size, C), in NumPy."""
  for axis, new in enumerate(size):
    length = x.shape[axis]
    at = np.clip((np.arange(new) + 0.5) * length / new - 0.5, 0, length - 1)
    low = np.floor(at).astype(int)
    weight = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    high = np.minimum(low + 1, length - 1)
    x = x.take(low, axis) * (1 - weight) + x.take(high, axis) * weight
  return x


def softmax(logits):
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def network(image):
  """Logits of one uint8 image (h, w, 3), at its own size."""
  normalised = (image[::8, ::8] - np.array(preprocess.MEAN)) / preprocess.STD
  return resized(normalised @ variables()['kernel'], image.shape[:2])


def slide_scores(image, label_size, crop, stride):
  """Logits at the original size, mean over windows."""
  height, width = image.shape[:2]
  total = np.zeros((height, width, CLASSES))
  count = np.zeros((height, width, 1))
  grid = [
    max(n - c + s - 1, 0) // s + 1
    for n, c, s in zip((height, width), crop, stride, strict=True)
  ]
  for row, column in np.ndindex(*grid):
    bottom = min(row * stride[0] + crop[0], height)
    right = min(column * stride[1] + crop[1], width)
    top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
    window = slice(top, bottom), slice(left, right)
    total[window] += network(image[window])
    count[window] += 1
  return resized(total / count, label_size)


def fitted(height, width, long, short):
  """The size of an image that keeps its ratio within two edges."""
  scale = min(long / max(height, width), short / min(height, width))
  return math.floor(height * scale + 0.5), math.floor(width * scale + 0.5)


def multiscale_scores(image, scales, flips, image_scale):
  """Mean probabilities at the original size; `image_scale` None for 1.x."""
  height, width = image.shape[:2]
  total = 0
  for ratio in scales:
    if image_scale is None:
      edges = [math.floor(n * ratio + 0.5) for n in (height, width)]
    else:
      edges = [math.floor(n * ratio) for n in image_scale]
    size = fitted(height, width, max(edges), min(edges))
    scaled = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    for flip in flips:
      step = -1 if flip else 1
      logits = network(scaled[:, ::step])[:, ::step]
      total += softmax(resized(logits, (height, width)))
  return total / (len(scales) * len(flips))


def make_predictor(model=None, protocol=None, **options):
  return Predictor(
    model or Upsampler(),
    variables(),
    label_set(CLASSES, NAMES, None),
    protocol or Protocol(image_scale=(128, 64)),
    **options,
  )


def make_mesh(devices):
  return sharding.make_mesh(devices=jax.devices()[:devices])
