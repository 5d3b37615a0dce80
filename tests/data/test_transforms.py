"""Augmentation, drawn, on the host and on the device, against naive twins."""

import re

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.pictures import blocks
from data.refusals import refused
from golden import reference
from numpy.testing import assert_allclose, assert_array_equal, assert_equal
from PIL import Image, ImageOps
from scipy import stats

from resnest_jax.data import pipeline, preprocess, resize, transforms
from resnest_jax.data.transforms import (
  UNDISTORTED,
  augment,
  augment_encoding,
)
from resnest_jax.sharding import batch_sharding, make_mesh

distort = jax.jit(preprocess.photometric_distortion)


# ---- Twins, in plain NumPy and 8-bit OpenCV ---------------------------------


def origin_twin(label, offsets, crop_size):
  """The crop rule with loops and np.unique."""
  room = np.maximum(np.subtract(label.shape, crop_size), 0) + 1
  for failed in range(11):  # The last one is taken unseen.
    top, left = np.floor(offsets[failed] * room).astype(int).tolist()
    crop = label[top : top + crop_size[0], left : left + crop_size[1]]
    classes, counts = np.unique(crop[crop != 255], return_counts=True)
    if len(classes) > 1 and max(counts) / sum(counts) < 0.75:
      break
  return (top, left), failed


def scale_and_shift(image, factor=1.0, shift=0.0):
  """image * factor + shift in float32, clipped and truncated."""
  changed = image.astype(np.float32) * np.float32(factor) + np.float32(shift)
  return np.clip(changed, 0, 255).astype(np.uint8)


def in_hsv(image, channel, change):
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
  hsv[..., channel] = change(hsv[..., channel])
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def distorted(image, draw):
  """mmsegmentation's distortion of uint8 RGB, which rounds at each step."""
  brightness, contrast_first, saturation, hue, contrast_last = draw
  image = scale_and_shift(image, shift=brightness)
  image = scale_and_shift(image, contrast_first)
  # Even a factor of 1 and a shift of 0 round to 8-bit HSV and back.
  if saturation != 1:
    image = in_hsv(image, 1, lambda x: scale_and_shift(x, saturation))
  if hue != 0:
    image = in_hsv(image, 0, lambda x: (x.astype(int) + int(hue)) % 180)
  return scale_and_shift(image, contrast_last)


# Eight RGB pixels and what mmsegmentation 1.2.2 (OpenCV 4.13) makes of them for
# brightness, the first contrast, saturation, hue, and nearly all.
PIXELS = 'c81e280adc5a233cfa808080ffffff0000005a5514fa78f5'
NEARLY_ALL = (17.25, 1, 1.4, 11, 0.72)
DISTORTED = {
  'b3091300c7450e27e56b6b6beaeaea000000454000e563e0': (-20.5, 1, 1, 0, 1),
  'ff29360dff7b2f52ffafafafffffff0000007b741bffa4ff': (0, 1.37, 1, 0, 1),
  'c860675cdc8b7885fa808080ffffff0000005a5730faabf7': (0, 1, 0.61, 0, 1),
  'c81e7318dc0a2396fa808080ffffff0000005a3714c678fa': (0, 1, 1, -13, 1),
  '9c2e0000aa7d2b00b7686868b7b7b70c0c0c384d06b7408b': NEARLY_ALL,
}


@pytest.mark.parametrize(('expected', 'draw'), DISTORTED.items())
def test_twin_of_the_distortion_equals_stored_results(expected, draw):
  image = np.frombuffer(bytes.fromhex(PIXELS), np.uint8).reshape(2, 4, 3)
  assert distorted(image, draw).tobytes().hex() == expected


# One has exactly 3 of 4, the last 3 of 5.
@pytest.mark.parametrize(
  'pixels', [[], [3], [3, 7], [3, 7, 3, 3], [3, 7, 3, 3, 7]]
)
def test_is_diverse_counts_valid_pixels_only(pixels):
  label = np.array([[*pixels, *[255] * 9]], np.uint8)
  assert transforms.is_diverse(label, 0.75) == (len(pixels) in (2, 5))


def test_crops_of_one_class_are_taken_if_none_is_too_large():
  label, offsets = np.zeros((64, 64), np.uint8), np.eye(11, 2) / 2
  what = label, label.shape, offsets, (32, 32), 1.0
  (rows, columns), _ = transforms.random_crop(*what)
  assert (rows.start, columns.start) == (16, 0)


def augment_twin(image, label, draw, image_scale, crop_size):
  """Resizes all of both, then crops, flips and pads."""
  ratio = 0.5 + 1.5 * draw.scale
  long, short = (int(edge * ratio) for edge in image_scale)
  scale = min(long / max(label.shape), short / min(label.shape))
  size = [int(side * scale + 0.5) for side in label.shape[::-1]]
  image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
  label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
  (top, left), failed = origin_twin(label, draw.crop_offsets, crop_size)
  found = {'photometric': draw.photometric}
  for key, array, value in (('image', image, 0), ('label', label, 255)):
    crop = array[top : top + crop_size[0], left : left + crop_size[1]]
    found[key] = np.full((*crop_size, *array.shape[2:]), value, np.uint8)
    flipped = crop[:, :: -1 if draw.flip else 1]
    found[key][: len(crop), : crop.shape[1]] = flipped
  return found | {'size': crop.shape[:2]}, failed


MMSEG = {'scale_range': (0.5, 2.0), 'cat_max_ratio': 0.75}
# The last column: whether crops are padded: none, or some of them.
AUGMENTED = [
  ((128, 256), (256, 128), (64, 128), {False}),  # As Cityscapes.
  ((64, 85), (256, 64), (64, 64), {False, True}),
  ((91, 47), (256, 64), (64, 64), {False, True}),
  ((90, 47), (256, 64), (200, 30), {False, True}),
]


@pytest.mark.parametrize(('shape', 'scale', 'crop_size', 'padded'), AUGMENTED)
def test_augment_equals_resizing_all_first(shape, scale, crop_size, padded):
  rng = np.random.default_rng(shape[0])
  is_padded, tries = set(), set()
  options = {'image_scale': scale, 'crop_size': crop_size}
  for _ in range(100):
    label = blocks(rng, *shape, 2, rng.integers(8, 90))
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    draw = transforms.draw_augmentation(rng)
    expected, failed = augment_twin(image, label, draw, **options)
    sample = augment(image, label, draw, **options, **MMSEG)
    assert_equal(sample, expected)
    assert sample['image'].flags.c_contiguous
    is_padded.add(expected['size'] != crop_size)
    tries.add(failed)
  # The cases cover the first try, later ones and the unseen last one.
  assert {0, 1, 2, 10} <= tries
  assert is_padded == padded


def given(scale, y, x, flip):
  return transforms.AugmentationDraw(
    scale, np.full((11, 2), (y, x)), bool(flip), np.float32(UNDISTORTED)
  )


@pytest.mark.parametrize('i', range(4))
def test_augment_encoding_equals_the_authors(i):
  golden = reference.load('encoding_augment_a')
  flip, long_edge, x, y = golden[f'draws{i}']
  base_size, crop = golden[f'sizes{i}'].tolist()
  (low, high), (_, most_x), (_, most_y) = golden[f'asked{i}']
  # The middle of what is drawn as these integers.
  low, high, most_x, most_y = low, high + 1, most_x + 1, most_y + 1
  draw = given(
    (long_edge - low + 0.5) / (high - low),
    (y + 0.5) / most_y,
    (x + 0.5) / most_x,
    flip,
  )
  label = golden[f'mask{i}'] - np.uint8(1)  # 0 becomes 255, which is ignored.
  options = {'image_scale': (base_size,) * 2, 'crop_size': (crop, crop)}
  options['scale_range'] = (0.5, 2.0)
  image = golden[f'image{i}']
  sample = augment_encoding(image, label, draw, **options)
  assert_equal(sample['image'], golden[f'out{i}'])
  assert_equal(sample['label'], golden[f'target{i}'].astype(np.uint8))
  assert sample['size'].tolist() == [crop, crop]


def encoding_twin(image, label, draw, image_scale, crop_size):
  """Mirrors, resizes and pads all of both in Pillow, then crops."""
  low, high = image_scale[0] // 2, image_scale[0] * 2
  long_edge = low + np.floor(draw.scale * (high - low + 1))
  sides = np.array(label.shape) * long_edge / max(label.shape)
  height, width = np.maximum(np.floor(sides + 0.5).astype(int), 1).tolist()
  room = np.maximum(np.subtract((height, width), crop_size), 0)
  top, left = np.floor(draw.crop_offsets[0] * (room + 1)).astype(int).tolist()
  box = left, top, left + crop_size[1], top + crop_size[0]
  margin = np.maximum(np.subtract(crop_size, (height, width)), 0)[::-1]
  found = []
  for array, way, fill in ((image, 'BILINEAR', 0), (label, 'NEAREST', 255)):
    picture = Image.fromarray(array)
    picture = ImageOps.mirror(picture) if draw.flip else picture
    picture = picture.resize((width, height), Image.Resampling[way])
    picture = ImageOps.expand(picture, (0, 0, *margin.tolist()), fill)
    found.append(np.array(picture.crop(box)))
  return found


# A row of pixels has less than half a pixel of height where it is reduced.
@pytest.mark.parametrize('shape', [(128, 256), (91, 47), (64, 64), (1, 160)])
def test_augment_encoding_equals_pillow(shape):
  rng = np.random.default_rng(shape[0])
  label = blocks(rng, *shape, 5, 8)
  image = rng.integers(0, 256, (*shape, 3), np.uint8)
  options = {'image_scale': (70, 70), 'crop_size': (64, 56)}
  for draw in draws(40):
    sample = augment_encoding(
      image, label, draw, scale_range=(0.5, 2.0), **options
    )
    expected = encoding_twin(image, label, draw, **options)
    assert_equal([sample['image'], sample['label']], expected)
    assert sample['image'].flags.c_contiguous


REFUSED = [
  ((2, 3, 4), (2, 3), r"'x': the image is uint8 \(2, 3, 4\).*\(H, W, 3\)"),
  ((2, 3, 3), (2, 3, 1), r'the label is uint8 \(2, 3, 1\); .*uint8 \(H, W\)'),
  ((2, 3, 3), (3, 2), 'is 3x2 pixels but its label is 2x3'),
]


@pytest.mark.parametrize(('image', 'label', 'message'), REFUSED)
def test_samples_of_another_kind_are_refused_by_name(image, label, message):
  arrays = (np.zeros(shape, np.uint8) for shape in (image, label))
  refused(message, transforms.check_sizes, *arrays, 'x')


# ---- The first 10000 draws of a run ------------------------------------------


def draws(count, **options):
  """Those of the first positions of a run."""
  key = pipeline.sample_key(1)
  rngs = (pipeline.sample_rng(key, i) for i in range(count))
  return [transforms.draw_augmentation(rng, **options) for rng in rngs]


def uniform_p(values, low, high):
  return stats.kstest(values, 'uniform', args=(low, high - low)).pvalue


def binomial_p(count, probability):
  return stats.binomtest(count, 10_000, probability).pvalue


@pytest.fixture(scope='module')
def ten_thousand():
  return draws(10_000)


def test_distribution_of_scale_flip_and_offsets(ten_thousand):
  assert uniform_p([d.scale for d in ten_thousand], 0.0, 1.0) > 1e-3
  assert binomial_p(sum(d.flip for d in ten_thousand), 0.5) > 1e-3
  offsets = np.array([d.crop_offsets for d in ten_thousand])
  for values in offsets[:, (0, 4, 10)].reshape(10_000, 6).T:
    assert uniform_p(values, 0.0, 1.0) > 1e-3


def test_draws_of_neighbours_are_independent(ten_thousand):
  """Within a sample, and from each position to the next."""
  drawn = [[d.scale, *d.crop_offsets.flat, d.flip] for d in ten_thousand]
  following = np.concatenate([drawn[:-1], drawn[1:]], axis=1)
  correlation = np.corrcoef(following, rowvar=False)
  # Of 1128 correlations, each normal with a deviation of 0.01.
  assert np.abs(correlation[np.triu_indices(48, 1)]).max() < 0.05


def test_long_edges_and_corners_are_equally_likely_integers(ten_thousand):
  edges = [
    transforms.long_edge_at(d.scale, 520, (0.5, 2.0)) for d in ten_thousand
  ]
  label = np.zeros((60, 72), np.uint8)  # Corners from 0 to 20 and to 32.
  crops = [label.shape, (40, 40), 1.0]
  windows = [
    transforms.random_crop(label, crops[0], d.crop_offsets, *crops[1:])[0]
    for d in ten_thousand
  ]
  tops, lefts = np.array([[part.start for part in x] for x in windows]).T
  for values, low, high in ((edges, 260, 1040), (tops, 0, 20), (lefts, 0, 32)):
    counts = np.bincount(np.array(values) - low)
    assert len(counts) == high - low + 1
    assert stats.chisquare(counts).pvalue > 1e-3
  # Each corner as often as any other: neither coordinate tells of the other.
  assert stats.chisquare(np.bincount(tops * 33 + lefts)).pvalue > 1e-3


def test_distribution_of_photometric_draws(ten_thousand):
  drawn = np.array([d.photometric for d in ten_thousand])
  applied = drawn != UNDISTORTED
  # Brightness, one contrast, saturation, the other contrast.
  for i, share in (0, 0.5), (1, 0.25), (2, 0.5), (4, 0.25):
    values = drawn[applied[:, i], i]
    assert binomial_p(len(values), share) > 1e-3
    assert uniform_p(values, *((0.5, 1.5) if i else (-32, 32))) > 1e-3
  hues = drawn[applied[:, 3], 3].astype(int)  # -18 to 17, without 0.
  assert binomial_p(len(hues), 0.5 * 35 / 36) > 1e-3
  counts = np.delete(np.bincount(hues + 18, minlength=36), 18)
  assert len(counts) == 35
  assert stats.chisquare(counts).pvalue > 1e-3
  assert not applied[:, (1, 4)].all(1).any()
  # Brightness and saturation are drawn independently of each other.
  pairs = applied[:, (0, 2)].all(1)
  assert binomial_p(pairs.sum(), 0.25) > 1e-3


def test_an_option_leaves_the_other_draws_as_they_were():
  options = {'photometric': False, 'flip_probability': 0.0}
  plain, others = draws(20), draws(20, **options)
  for a, b in zip(plain, others, strict=True):
    assert_equal(a.crop_offsets, b.crop_offsets)
    assert (b.scale, b.flip, *b.photometric) == (a.scale, 0, *UNDISTORTED)
  assert any(a.flip for a in plain)


# ---- On the device ----------------------------------------------------------


def noise(*shape):
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def natural_images(rng, count, height, width):
  """Noise on many scales, as photographs have it, grey to colourful."""
  images = np.zeros((count, height, width, 3), np.float32)
  for i, image in enumerate(images):
    for size in (2, 4, 8, 16, 32):
      grid = (height // size + 2, width // size + 2)
      grey, colour = (rng.normal(size=(*grid, n)) for n in (1, 3))
      noise = np.float32(grey + colour * (0.2 + 0.8 * i / count))
      image += size * cv2.resize(noise, (width, height))
    image *= 60 / image.std()
    image += rng.uniform(90, 160)
  return np.clip(images, 0, 255).astype(np.uint8)


def test_distortion_is_near_the_8_bit_host_pipeline():
  rng = np.random.default_rng(0)
  images = natural_images(rng, 48, 64, 96)
  drawn = [transforms.draw_photometric(rng) for _ in images]
  host = np.stack(list(map(distorted, images, drawn))).astype(float)
  result = np.asarray(distort(images.astype(np.float32), np.stack(drawn)))
  difference = np.abs(result - host)
  assert np.abs(images - host).mean() > 10  # There is something to get right.
  assert difference.mean() < 0.5
  assert np.percentile(difference, 99) <= 3
  assert difference.mean(axis=(1, 2, 3)).max() < 1

  linear = [(saturation, hue) == (1, 0) for _, _, saturation, hue, _ in drawn]
  assert sum(linear) > 5
  assert_equal(result[linear], host[linear])


@pytest.mark.parametrize('hue', [-18, -5, 9, 17])
def test_hue_of_saturated_pixels_turns_by_two_degrees_a_unit(hue):
  """Red, green and blue turned by less than 60 degrees, by hand."""
  images = np.float32(np.diag([240, 240, 240])).reshape(1, 1, 3, 3)
  turned = np.roll(images, 1 if hue > 0 else -1, -1)
  found = distort(images, np.float32([[0, 1, 1, hue, 1]]))
  assert_allclose(found, images + turned * round(240 * abs(hue) / 30) / 240)


def test_identity_returns_every_colour_unchanged():
  colours = np.mgrid[:256:5, :256:5, :256:5].T
  images = colours.reshape(1, 52, -1, 3).astype(np.float32)
  assert_equal(distort(images, np.float32([[0, 1, 1, 0, 1]])), images)


def test_preprocess_normalises_and_blanks_the_padding():
  images = np.full((2, 4, 5, 3), 120, np.uint8)
  size = np.int32([[4, 5], [2, 3]])
  brighter = np.float32([[10, 1, 1, 0, 1]] * 2)
  result = np.asarray(jax.jit(preprocess.preprocess)(images, size, brighter))
  assert result.dtype == np.float32
  pixel = [6.325 / 58.395, 13.72 / 57.12, 26.47 / 57.375]
  assert_allclose(result[0], np.tile(pixel, (4, 5, 1)), rtol=1e-6)
  assert_allclose(result[1, :2, :3], result[0, :2, :3])
  assert (result[1, 2:] == 0).all()
  assert (result[1, :, 3:] == 0).all()


def test_preprocess_dtypes():
  images = noise(1, 8, 8, 3)
  size = np.int32([[8, 8]])
  photometric = np.float32([[3.5, 1.25, 0.75, 7, 1]])
  half = preprocess.preprocess(images, size, photometric, dtype=jnp.bfloat16)
  single = preprocess.preprocess(images, size, photometric)
  with jax.enable_x64(True):
    double = preprocess.preprocess(images, size, dtype=jnp.float64)
    assert double.dtype == jnp.float64
    expected = (images - np.array(preprocess.MEAN)) / np.array(preprocess.STD)
    assert_allclose(double, expected, rtol=1e-13)
    double = preprocess.preprocess(images, size, photometric, dtype=jnp.float64)
    assert_allclose(double, single, atol=1.01 / 57)
  assert half.dtype == jnp.bfloat16
  # Rounded once, at the end.
  assert_array_equal(half, single.astype(jnp.bfloat16))


def test_a_sharded_batch_needs_no_communication():
  sharding = batch_sharding(make_mesh())
  count = 2 * jax.device_count()
  images = noise(count, 8, 8, 3)
  size = np.full((count, 2), 7, np.int32)
  parameters = np.repeat(np.float32([[9, 1.1, 0.8, 5, 1]]), count, 0)
  parameters[:, 0] += np.arange(count)
  apply = jax.jit(preprocess.preprocess)
  sharded = jax.device_put((images, size, parameters), sharding)
  result = apply(*sharded)
  assert result.sharding.is_equivalent_to(sharding, 4)
  assert_array_equal(result, apply(images, size, parameters))
  text = apply.lower(*sharded).compile().as_text()
  assert not re.findall('all-(gather|reduce|to-all)|collective-permute', text)


# Height and width before and after.
SIZES = [
  [((40, 50), (20, 25)), ((33, 47), (33, 47)), ((1, 1), (40, 31))],
  [((40, 50), (70, 88)), ((7, 33), (3, 80)), ((39, 50), (1, 1))],
]


@pytest.mark.parametrize('sizes', SIZES)
def test_resizing_equals_opencv(sizes):
  images = noise(3, 40, 50, 3)
  canvas = np.max([after for _, after in sizes], 0)
  tables = [np.zeros((3, n, 4), np.int32) for n in canvas]
  expected = np.zeros((3, *canvas, 3), np.uint8)
  for i, ((h, w), after) in enumerate(sizes):
    for axis, what in enumerate(zip((h, w), after, strict=True)):
      tables[axis][i, : after[axis]] = resize.bilinear_taps(*what, axis)
    resized = resize.resize_image(images[i, :h, :w], after)  # By OpenCV.
    expected[i, : after[0], : after[1]] = resized
  assert_equal(jax.jit(preprocess.resize)(images, *tables), expected)
