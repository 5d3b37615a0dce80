"""A small network, batches, and every protocol done the plain way."""

# That is one image at a time, without padding, tiles or matrices, following
# mmsegmentation's own steps.

import itertools
import math
import re
import types

import cv2
import jax
import numpy as np
from golden import reference
from scipy import ndimage
from scipy.special import softmax

from resnest_jax import Predictor, sharding
from resnest_jax.data import preprocess
from resnest_jax.data.own.classes import label_set
from resnest_jax.inference import protocols, steps
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import import_state_dict

CLASSES = 7
NAMES = tuple('abcdefg')
# A network that is smaller yet, without an auxiliary head.
TINY = reference.TINY | {'stem_width': 4, 'width': 4, 'aux_channels': None}
CANVASES = (64, 96), (80, 64)
# Height and width of the network's input and of the original: enlarged,
# shrunk, mixed, one pixel, and the whole canvas.
SIZES = [(33, 96), (64, 57), (41, 70), (1, 1), (64, 96)]
LABEL_SIZES = [(80, 31), (20, 19), (29, 64), (5, 3), (80, 64)]
VARIABLES = {'kernel': np.random.default_rng(5).standard_normal((3, 7), 'f4')}


def upsampled(variables, images, train, size):
  # Stands in for a network: logits at stride 8 are a picture's colours.
  assert train is False
  return types.SimpleNamespace(logits=images[:, ::8, ::8] @ variables['kernel'])


def upsampler(align_corners=False):
  head = types.SimpleNamespace(align_corners=align_corners)
  return types.SimpleNamespace(apply=upsampled, decode_head=head)


UPSAMPLER = upsampler()


class Split(list):
  labels = label_set(CLASSES, NAMES, None)


def padded(arrays, canvas, value):
  # uint8 (N, *canvas, ...): the arrays, padded at the bottom and right.
  shape = (len(arrays), *canvas, *arrays[0].shape[2:])
  batch = np.full(shape, value, np.uint8)
  for row, array in zip(batch, arrays, strict=True):
    row[: array.shape[0], : array.shape[1]] = array
  return batch


def batch_of(sizes=SIZES, label_sizes=LABEL_SIZES, canvases=CANVASES):
  rng, classes = np.random.default_rng(0), [*range(CLASSES), 255]
  images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
  labels = [rng.choice(classes, size) for size in label_sizes]
  return {
    'image': padded(images, canvases[0], 0),
    'size': np.array(sizes, np.int32),
    'label': padded(labels, canvases[1], 255),
    'label_size': np.array(label_sizes, np.int32),
    'index': np.arange(len(sizes), dtype=np.int32),
    'name': [f'image_{i}' for i in range(len(sizes))],
  }


def noise(number, low=(20, 20), high=(64, 64), seed=0):
  # A split of random pictures of sizes between two, both included.
  rng, split = np.random.default_rng(seed), Split()
  drawn = rng.integers(low, np.add(high, 1), (number, 2)).tolist()
  for i, size in enumerate([low, high, *drawn][:number]):
    label = rng.integers(0, CLASSES, size, np.uint8)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    split.append({'image': image, 'label': label, 'name': f'image_{i}'})
  return split


def make_step(**options):
  return steps.make_eval_step(UPSAMPLER, CLASSES, **options)


def fill_slot(batch, slot):
  # With what the pipeline fills it.
  batch['image'][slot], batch['name'][slot] = 0, ''
  batch['label'][slot], batch['index'][slot] = 255, -1
  batch['size'][slot] = batch['label_size'][slot] = 1


def golden_model(row):
  # mmsegmentation's network of depth 14, one block a stage, and weights.
  shapes = reference.manifest(f'mmseg/{row}').items()
  shapes = {k: x for k, x in shapes if not re.search(r'layer\d\.[1-9]', k)}
  config = {'stage_sizes': (1, 1, 1, 1), 'head': row.partition('_')[2]}
  model = create_segmentor(reference.CONFIG | config)
  return model, import_state_dict(model, reference.filled(shapes))


def resized(x, size):
  # Bilinear with half-pixel centres, (h, w, C) -> (*size, C).
  zoom = *np.divide(size, x.shape[:2]), 1
  return ndimage.zoom(x, zoom, order=1, mode='nearest', grid_mode=True)


def network(image):
  # Logits of one uint8 image (h, w, 3), at its own size.
  normalised = (image[::8, ::8] - np.array(preprocess.MEAN)) / preprocess.STD
  return resized(normalised @ VARIABLES['kernel'], image.shape[:2])


def slide_scores(image, label_size, crop, stride):
  # Logits at the original size, mean over windows.
  total, count = np.zeros((*image.shape[:2], CLASSES)), 0 * image[..., :1]
  grid = itertools.product(*map(range, (0, 0), image.shape, stride))
  # The last ones are moved back to the border.
  last = np.maximum(np.subtract(image.shape[:2], crop), 0)
  for top, left in {tuple(np.minimum(start, last)) for start in grid}:
    window = np.s_[top : top + crop[0], left : left + crop[1]]
    total[window] += network(image[window])
    count[window] += 1
  return resized(total / count, label_size)


def fitted(height, width, long, short):
  # The size of an image that keeps its ratio within two edges.
  scale = min(long / max(height, width), short / min(height, width))
  return int(height * scale + 0.5), int(width * scale + 0.5)


def multiscale_scores(image, scales, image_scale):
  # Mean probabilities at the original size; `image_scale` None for 1.x.
  size, found = image.shape[:2], []
  for ratio in scales:
    edges = np.multiply(image_scale or size, ratio)
    edges = np.floor(edges if image_scale else edges + 0.5)
    scaled = cv2.resize(image, fitted(*size, max(edges), min(edges))[::-1])
    for step in (1, -1):
      logits = network(scaled[:, ::step])[:, ::step]
      found.append(softmax(resized(logits, size), -1))
  return np.mean(found, 0)


def aligned(x, size):
  # Bilinear with aligned corners, (h, w, C) -> (*size, C).
  for axis, new in enumerate(size):
    last = x.shape[axis] - 1
    place = np.arange(new) * last / max(new - 1, 1)
    low = np.floor(place).astype(int)
    weight = (place - low).reshape(-1, *(2 - axis) * [1])
    high = x.take(np.minimum(low + 1, last), axis)
    x = x.take(low, axis) * (1 - weight) + high * weight
  return x


def encoding_scores(image, protocol, upsample=resized, gain=1.0):
  # PyTorch-Encoding's steps: sums of exponentials at the original size.
  mean, std = np.array(preprocess.MEAN), np.array(preprocess.STD)
  (crop, _), (stride, _), total = protocol.crop, protocol.stride, 0

  def black(*size):
    return np.zeros((*size, 3)) - mean / std

  def look(window):
    both = window, window[:, ::-1]
    both = [
      x[::8, ::8] @ (gain * np.float64(VARIABLES['kernel'])) for x in both
    ]
    both = [upsample(x, (crop, crop)) for x in both]
    # Of a range beyond e ** 11,000.
    return np.exp(np.longdouble(both[0] + both[1][:, ::-1]))

  for scale in protocol.scales:
    long, size = math.ceil(protocol.image_scale[0] * scale), image.shape[:2]
    size = [int(length * long / max(size) + 0.5) for length in size]
    height, width = (max(length, crop) for length in size)
    scaled = black(height, width)
    scaled[: size[0], : size[1]] = aligned((image - mean) / std, size)
    found = np.zeros((height, width, CLASSES), np.longdouble)
    count = np.zeros((height, width, 1))
    grid = [-(-(length - crop) // stride) + 1 for length in (height, width)]
    for top, left in stride * np.array([*np.ndindex(*grid)]):
      inside = np.s_[top : top + crop, left : left + crop]
      rows, columns = count[inside].shape[:2]
      window = black(crop, crop)
      window[:rows, :columns] = scaled[inside]
      found[inside] += look(window)[:rows, :columns]
      count[inside] += 1
    total += aligned((found / count)[: size[0], : size[1]], image.shape[:2])
  return total


def make_predictor(protocol=None, **options):
  protocol = protocol or protocols.Protocol(image_scale=(128, 64))
  return Predictor(UPSAMPLER, VARIABLES, Split.labels, protocol, **options)


def make_mesh(devices):
  return sharding.make_mesh(devices=jax.devices()[:devices])
