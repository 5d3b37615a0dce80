"""Device preprocessing: OpenCV's 8-bit arithmetic, normalisation, mask."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.twins import photometric_distortion
from numpy.testing import assert_allclose, assert_array_equal

from resnest_jax.data import preprocess, resize, transforms
from resnest_jax.sharding import batch_sharding, make_mesh

IDENTITY = np.float32([[0, 1, 1, 0, 1]])

distort = jax.jit(preprocess.photometric_distortion)


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
  host = map(photometric_distortion, images, drawn)
  host = np.stack(list(host)).astype(float)
  parameters = np.stack([draw.parameters() for draw in drawn])
  result = np.asarray(distort(images.astype(np.float32), parameters))
  difference = np.abs(result - host)
  assert np.abs(images - host).mean() > 10  # There is something to get right.
  assert difference.mean() < 0.5
  assert np.percentile(difference, 99) <= 3
  assert difference.mean(axis=(1, 2, 3)).max() < 1

  linear = [d.saturation is None and d.hue is None for d in drawn]
  assert sum(linear) > 5
  assert_array_equal(result[linear], host[linear])


@pytest.mark.parametrize('hue', [-18, -5, 9, 17])
def test_hue_of_saturated_pixels_turns_by_two_degrees_a_unit(hue):
  """Red, green and blue turned by less than 60 degrees, by hand."""
  images = np.float32(np.diag([240, 240, 240])).reshape(1, 1, 3, 3)
  parameters = np.float32([[0, 1, 1, hue, 1]])
  other = round(240 * abs(hue) / 30)
  expected = images[0, 0].copy()
  for i in range(3):
    expected[i, (i + (1 if hue > 0 else -1)) % 3] = other
  assert_allclose(distort(images, parameters)[0, 0], expected)


def test_identity_returns_every_colour_unchanged():
  levels = np.arange(0, 256, 5, dtype=np.float32)
  colours = np.stack(np.meshgrid(levels, levels, levels), -1)
  images = colours.reshape(1, 52, 52 * 52, 3)
  assert_array_equal(distort(images, IDENTITY), images)


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
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
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
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
  size = np.full((count, 2), 7, np.int32)
  parameters = np.repeat(np.float32([[9, 1.1, 0.8, 5, 1]]), count, 0)
  parameters[:, 0] += np.arange(count)
  apply = jax.jit(preprocess.preprocess)
  sharded = jax.device_put((images, size, parameters), sharding)
  result = apply(*sharded)
  assert result.sharding.is_equivalent_to(sharding, 4)
  assert_array_equal(result, apply(images, size, parameters))
  text = apply.lower(*sharded).compile().as_text()
  for word in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
    assert word not in text


@pytest.mark.parametrize(
  'sizes',
  [  # Height and width before and after.
    [((40, 50), (20, 25)), ((33, 47), (33, 47)), ((1, 1), (40, 31))],
    [((40, 50), (70, 88)), ((7, 33), (3, 80)), ((39, 50), (1, 1))],
  ],
)
def test_resizing_equals_opencv(sizes):
  rng = np.random.default_rng(2)
  images = rng.integers(0, 256, (3, 40, 50, 3), np.uint8)
  canvas = np.max([after for _, after in sizes], 0)
  tables = [np.zeros((3, n, 4), np.int32) for n in canvas]
  expected = np.zeros((3, *canvas, 3), np.uint8)
  for i, ((h, w), after) in enumerate(sizes):
    for axis, length in enumerate((h, w)):
      tables[axis][i, : after[axis]] = resize.bilinear_taps(
        length, after[axis], axis
      )
    expected[i, : after[0], : after[1]] = cv2.resize(
      images[i, :h, :w], after[::-1], interpolation=cv2.INTER_LINEAR
    )
  assert_array_equal(jax.jit(preprocess.resize)(images, *tables), expected)
