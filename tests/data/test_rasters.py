"""Images of named bands: every format gives its numbers, or one clear error."""

import io

import cv2
import numpy as np
import pytest
import tifffile
from data.fields import BANDS, CONTIGUOUS, write_fields
from data.refusals import refused, unreadable
from data.small_archives import encode
from numpy.testing import assert_allclose, assert_equal

from resnest_jax import bands
from resnest_jax.config import load_config
from resnest_jax.data import resize
from resnest_jax.data.datasets import open_data
from resnest_jax.data.doctor.examine import examine
from resnest_jax.data.doctor.rules import diagnose
from resnest_jax.data.pipeline import make_eval_iterator, make_train_iterator
from resnest_jax.data.preprocess import IMAGENET, Normalization, preprocess
from resnest_jax.data.preprocess import resize as resize_on_device
from resnest_jax.data.rasters import as_image, measure
from resnest_jax.inference.multiscale import taps

RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 2**16, (6, 8, 5), np.uint16)
LOW = np.uint8(WIDE[..., :3])


def written(write, *values, **options):
  write(file := io.BytesIO(), *values, **options)
  return file.getvalue()


def npy(pixels):
  return written(np.save, pixels)


def tif(pixels, **options):
  return written(tifffile.imwrite, pixels, **{**CONTIGUOUS, **options})


def planes(pixels):
  return tif(pixels.transpose(2, 0, 1), planarconfig='separate')


def pages(pixels):
  file = io.BytesIO()
  with tifffile.TiffWriter(file) as writer:
    for plane in pixels.transpose(2, 0, 1):
      writer.write(plane, contiguous=True, photometric='minisblack')
  return file.getvalue()


def read(folder, ending, content, number, most=10**6):
  (folder / f'x{ending}').write_bytes(content)
  how = Normalization(bands=tuple('abcdefghijklmnop'[:number]), dtype='')
  return as_image(folder / f'x{ending}', how, most)


@pytest.mark.parametrize(
  ('ending', 'content', 'expected'),
  [
    ('.npy', npy(WIDE), WIDE),
    ('.npy', npy(WIDE[..., 0]), WIDE[..., :1]),
    ('.npy', npy(WIDE.astype('>u2')), WIDE),
    ('.npy', npy(WIDE.view(np.int16)), np.float32(WIDE.view(np.int16))),
    ('.tif', tif(WIDE), WIDE),
    ('.TIF', tif(WIDE, compression='lzw', tile=(16, 16)), WIDE),
    ('.tif', tif(WIDE[..., 0], byteorder='>'), WIDE[..., :1]),
    ('.tif', tif(np.float64(WIDE), compression='zstd'), np.float32(WIDE)),
    ('.tiff', planes(WIDE), WIDE),
    ('.tif', pages(WIDE), WIDE),
    ('.tif', tif(0 * WIDE, compression='deflate'), 0 * WIDE),
    ('.png', encode(WIDE[..., 2::-1]), WIDE[..., :3]),
    ('.png', encode(WIDE[..., [2, 1, 0, 3]]), WIDE[..., :4]),
    ('.png', encode(WIDE[..., 0]), WIDE[..., :1]),
    ('.bmp', encode(LOW[..., ::-1], '.bmp'), LOW),
  ],
)  # fmt: skip
def test_every_format_gives_its_numbers(tmp_path, ending, content, expected):
  found = read(tmp_path, ending, content, expected.shape[2])
  assert_equal(found, expected)
  assert found.dtype == expected.dtype


NAN = np.where(WIDE[..., :2] > 2**15, np.nan, 1.0)


@pytest.mark.parametrize(
  ('ending', 'content', 'said'),
  [
    ('.npy', npy(WIDE), r'\(6, 8, 5\).*width, 2\).*data.bands names a, b'),
    ('.tif', tif(WIDE), r'\(6, 8, 5\); .*width, 2\)'),
    ('.npy', npy(WIDE)[:-9], 'cannot be decoded'),
    ('.npy', npy(np.array([None, None])), 'cannot be decoded'),
    ('.npy', npy(WIDE[0, 0]), r'\(5,\)'),
    ('.npy', npy(WIDE[:2]), r'\(2, 8, 5\).*bands come first: .*moveaxis'),
    ('.npy', written(np.savez, WIDE), 'cannot be decoded'),
    ('.tif', bytes(500), 'cannot be decoded'),
    ('.npy', npy(NAN), r'has values that are NaN .*255 \(ignored\)'),
    ('.npy', npy(np.zeros((4, 4, 2), bool)), 'is bool .* whole numbers'),
    ('.npy', npy(np.zeros((1001, 1000, 2), np.uint8)), '1000 x 1001 pixels'),
    ('.tif', tif(WIDE[..., :2])[:300], 'cannot be decoded .*imagecodecs'),
    ('.tif', b'II*\0 no picture', 'cannot be decoded .*imagecodecs'),
    ('.tif', tif(np.zeros((1001, 1000), np.uint8)), '1000 x 1001 pixels'),
    ('.png', encode(np.uint8(WIDE[..., 0])), r'\(6, 8, 1\)'),
    ('.png', encode(WIDE[..., :4])[:90], 'cannot be decoded'),
  ],
)  # fmt: skip
def test_what_is_no_image_of_these_bands_is_refused(
  tmp_path, ending, content, said
):
  unreadable('(?s)' + said, read, tmp_path, ending, content, 2)


def split_of(root, names=BANDS, split='train'):
  overrides = {'data.data_dir': str(root), 'data.bands': ','.join(names)}
  overrides |= {'data.crop_size': (32, 32), 'data.image_scale': (48, 48)}
  config = load_config('configs/folder.py:mini', overrides)
  return config, open_data(config.data, split)


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_bands_are_measured_over_the_training_split(tmp_path, dtype):
  _, split = split_of(write_fields(tmp_path, dtype=dtype))
  found = measure(split)
  pixels = np.concatenate([x['image'].reshape(-1, 4) for x in split])
  mean, std = pixels.mean(0), pixels.std(0)
  if dtype == np.uint8:  # The colours are those of all pictures.
    mean[1:], std[1:] = IMAGENET.mean, IMAGENET.std
  assert_allclose(found.mean, mean, rtol=1e-9)
  assert_allclose(found.std, std, rtol=1e-9)
  assert (found.bands, found.dtype) == (BANDS, np.dtype(dtype).name)
  assert Normalization.of(found.described()) == found


def test_images_of_another_type_are_an_error(tmp_path):
  _, split = split_of(write_fields(tmp_path))
  path = tmp_path / 'images/train/3.tif'
  tifffile.imwrite(path, np.uint8(tifffile.imread(path)), **CONTIGUOUS)
  refused(r'uint16 \(.*0\.tif.*, uint8 \(.*3\.tif', measure, split)
  _, other = split_of(tmp_path, BANDS[:3])
  refused(r'tif is uint16 \(.*, 4\).*width, 3\)', measure, other)
  split.normalization = Normalization(bands=BANDS, dtype='uint16')
  refused(r'3\.tif is of uint8, and the net.* uint16', split.__getitem__, 3)
  config, split = split_of(tmp_path)
  (found,) = diagnose(examine(config, [split]))
  assert found.rule.name == 'image_depth'
  assert 'uint8; the network takes uint16' in found.finding.what


@pytest.mark.parametrize('names', [BANDS, ('nir',)])
def test_batches_have_the_type_and_the_bands(tmp_path, names):
  config, split = split_of(write_fields(tmp_path, names), names)
  options = {'seed': 0, 'batch_size': 8, 'total_steps': 1}
  (batch,) = make_train_iterator(config.data, split, **options)
  assert batch['image'].shape == (8, 32, 32, len(names))
  assert batch['image'].dtype == np.uint16
  batches = make_eval_iterator(config.data, split, batch_size=3, bucket=16)
  batch = next(batches)
  image = split[batch['index'][0]]['image']
  assert_equal(batch['image'][0], resize.resize_image(image, (48, 48)))


def test_the_device_resizes_other_types_alike():
  image = RNG.random((1, 30, 40, 3)).astype(np.float32)
  tables = taps(np.array([[30, 40]]), np.array([[17, 53]]), (17, 53), False)
  found = resize_on_device(image, *tables)[0]
  expected = cv2.resize(image[0], (53, 17))
  assert_allclose(found, expected, atol=1e-3)


MIXED = Normalization((50.0, *IMAGENET.mean), (7.0, *IMAGENET.std), bands=BANDS)
SIZE = np.array([[9, 9]])
DRAW = np.array([[20, 1.3, 0.7, 11, 1], [0, 1, 1, 0, 1.4]], np.float32)


@pytest.mark.parametrize('photometric', [None, DRAW])
def test_colours_of_8_bits_are_seen_as_those_of_rgb(photometric):
  image = RNG.integers(0, 256, (2, 9, 9, 4), np.uint8)
  size = np.array([[9, 9], [5, 9]])
  found = preprocess(image, size, photometric, normalization=MIXED)
  expected = preprocess(image[..., 1:], size, photometric)
  found, expected = np.asarray(found), np.asarray(expected)
  assert_equal(found[..., :3], expected)
  assert_allclose(found[0, ..., 3], (image[0, ..., 0] - 50.0) / 7, rtol=1e-6)
  assert not found[1, 5:].any()


def test_distortion_keeps_the_digits_of_16_bits():
  image = RNG.integers(0, 2**16, (1, 9, 9, 4), np.uint16)
  deep = Normalization(*(4 * (x,) for x in (3e4, 2e4)), 'RGB', BANDS, 'uint16')
  still = np.array([[0, 1, 1, 0, 1]], np.float32)

  def seen(draw):
    return np.asarray(preprocess(image, SIZE, draw, normalization=deep))

  plain = seen(None)
  assert_equal(seen(still), plain)
  found = seen(DRAW[:1])
  assert_equal(found[..., 3], plain[..., 3])
  assert np.abs(found[..., :3] - plain[..., :3]).max() > 0.3


def test_what_is_shown_is_red_green_and_blue():
  image = RNG.integers(0, 256, (9, 9, 4), np.uint8)
  assert_equal(bands.shown(image, BANDS), image[..., 1:])
  assert_equal(bands.shown(image, tuple('abcd')), image[..., :3])
  assert_equal(bands.shown(image[..., :1], ('a',)), image[..., [0, 0, 0]])
  # Other depths by the percentiles of each band: 2 % are black, 2 % white.
  ramp = np.arange(10_000, dtype=np.float32).reshape(100, 100, 1)
  found = bands.shown(7 * ramp, ('a',))[..., 0]
  assert [(found == x).mean().round(2) for x in (0, 255)] == [0.02, 0.02]


def test_predicted_arrays_have_the_bands_and_the_type():
  image = RNG.integers(0, 256, (9, 9, 4), np.uint8)
  assert_equal(as_image(image, MIXED), image)
  refused(r'width, 4\)(.|\n)*names nir, red', as_image, image[..., :3], MIXED)
  refused('takes uint8', as_image, image.astype(np.uint16), MIXED)


CONFIGS = [
  ('data.bands', 'a,a', 'up to 16 names'),
  ('data.bands', 'a,' * 16 + 'b', 'up to 16 names'),
  ('data.augmentation', 'encoding', 'mmseg with data.bands'),
  ('data.name', 'ade20k', 'left out, as data.name is not folder'),
  ('model.in_channels', '5', 'must be 2, as data.bands has'),
]


def test_keys_that_do_not_fit_are_refused():
  given = {'data.bands': 'a, b', 'data.image_scale': (64, 64)}
  given |= {'data.cat_max_ratio': 1.0}
  config = load_config('configs/folder.py', given)
  assert (*config.data.bands, config.model.in_channels) == ('a', 'b', 2)
  for key, value, said in CONFIGS:
    refused(said, load_config, 'configs/folder.py', given | {key: value})
