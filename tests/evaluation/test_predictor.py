"""Prediction from Python: what goes in, what comes out, what is compiled."""

import cv2
import jax
import numpy as np
import pytest
from evaluation.plain import (
  CLASSES,
  Upsampler,
  fitted,
  multiscale_scores,
  network,
  resized,
  softmax,
  variables,
)
from PIL import Image

import resnest_jax as rj
from resnest_jax.data.classes import label_set
from resnest_jax.errors import UserError
from resnest_jax.evaluation.inputs import as_rgb
from resnest_jax.evaluation.predictor import Prediction, Predictor
from resnest_jax.evaluation.protocols import Protocol, choose_protocol
from resnest_jax.runtime import count_compilations

LABELS = label_set(CLASSES, tuple('abcdefg'), None)
# Of one bucket, but for the last.
SIZES = ((50, 60), (40, 64), (64, 33), (30, 100))


def predictor(protocol=None, batch_size=None):
  protocol = protocol or Protocol(image_scale=(128, 64))
  return Predictor(
    Upsampler(), variables(), LABELS, protocol, batch_size=batch_size
  )


@pytest.fixture(scope='module')
def model():
  return predictor()


def picture(size, seed=0):
  """Smooth, so that classes do not change from pixel to pixel."""
  rng = np.random.default_rng(seed)
  return cv2.resize(rng.integers(0, 256, (4, 5, 3), np.uint8), size[::-1])


def plain_scores(image):
  size = fitted(*image.shape[:2], 128, 64)
  return resized(network(cv2.resize(image, size[::-1])), image.shape[:2])


def test_labels_are_those_of_the_plain_way(model):
  for seed, size in enumerate(SIZES):
    image = picture(size, seed)
    prediction = model.predict(image)
    expected = plain_scores(image).argmax(-1)
    assert prediction.labels.dtype == np.uint8
    np.testing.assert_array_equal(prediction.labels, expected)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(prediction.image, image)
    assert prediction.probabilities is None


def test_a_list_of_all_kinds_keeps_its_order(model, tmp_path):
  images = [picture(size, seed) for seed, size in enumerate(SIZES * 2)]
  path = tmp_path / 'image.png'
  cv2.imwrite(str(path), images[1][..., ::-1])
  given = list(images)
  given[1], given[3] = path, Image.fromarray(images[3])
  given[4] = images[4][..., ::-1].copy()[..., ::-1]  # Not contiguous.
  predictions = model.predict(given)
  assert len(predictions) == len(images)
  for prediction, image in zip(predictions, images, strict=True):
    expected = plain_scores(image).argmax(-1)
    np.testing.assert_array_equal(prediction.labels, expected)
    np.testing.assert_array_equal(prediction.image, image)
  assert model.predict([]) == []


def test_sizes_of_a_bucket_are_compiled_once():
  shapes = []
  model = predictor(Protocol(image_scale=(128, 128)))
  model.on_compile = lambda *shape: shapes.append(shape)
  with count_compilations() as compiled:
    model.predict(picture((50, 51)))
    assert shapes == [(128, 128)]
    assert compiled
    compiled.clear()
    for size in ((64, 64), (33, 33), (60, 61)):
      model.predict(picture(size))
    model.predict([picture((50, 50)), picture((64, 63))])
    assert compiled == []
    assert shapes == [(128, 128)]
    model.predict(picture((50, 70)))  # Other labels, the same network.
    assert compiled
    assert shapes == [(128, 128)]


def test_probabilities_of_all_classes(model):
  images = [picture(size, seed) for seed, size in enumerate(SIZES[:2])]
  for image, found in zip(
    images, model.predict(images, probabilities=True), strict=True
  ):
    assert found.probabilities.dtype == np.float32
    np.testing.assert_allclose(
      found.probabilities, softmax(plain_scores(image)), atol=2e-5
    )
    labels = found.probabilities.argmax(-1)
    np.testing.assert_array_equal(found.labels, labels)


def test_probabilities_of_several_scales_are_their_mean():
  protocol = Protocol('ms_flip_1x', scales=(0.5, 1.0), flip=True)
  image = picture((40, 50), 3)
  found = predictor(protocol).predict(image, probabilities=True)
  expected = multiscale_scores(image, (0.5, 1.0), (False, True), None)
  np.testing.assert_allclose(found.probabilities, expected, atol=2e-5)
  np.testing.assert_array_equal(found.labels, expected.argmax(-1))


def test_colours_and_overlay():
  labels = np.array([[0, 1], [2, 0]], np.uint8)
  palette = np.array([(200, 0, 0), (0, 100, 0), (0, 0, 50)], np.uint8)
  image = np.full((2, 2, 3), 100, np.uint8)
  found = Prediction(labels, ('a', 'b', 'c'), palette, image)
  assert found.colors().tolist() == [
    [[200, 0, 0], [0, 100, 0]],
    [[0, 0, 50], [200, 0, 0]],
  ]
  assert found.overlay()[0].tolist() == [[150, 50, 50], [50, 100, 50]]
  assert found.overlay(0.25)[1].tolist() == [[75, 75, 88], [125, 75, 75]]
  np.testing.assert_array_equal(found.overlay(0), image)
  wide = Prediction(
    labels.repeat(40, 1), ('a', 'b', 'c'), palette, image.repeat(40, 1)
  )
  with_names = wide.overlay(1, legend=True)
  np.testing.assert_array_equal(with_names[:2], wide.colors())
  assert with_names.shape[0] > 20
  with pytest.raises(UserError, match=r'opacity is 1\.5; it must be from 0'):
    found.overlay(1.5)


def test_every_kind_of_picture_becomes_rgb(tmp_path):
  image = picture((6, 7), 1)
  pillow = Image.fromarray(image)
  grey = image[..., 0]
  repeated = np.repeat(grey[..., None], 3, -1)
  deep = grey.astype(np.uint16) * 256 + 99
  half = np.full(grey.shape, 128, np.uint8)
  turned = pillow.copy()
  turned.getexif()[0x0112] = 6
  for given, expected in (
    (image, image),
    (image[:, ::-1], image[:, ::-1]),
    (grey, repeated),
    (grey[..., None], repeated),
    (jax.numpy.asarray(image), image),
    (pillow, image),
    (Image.fromarray(grey), repeated),
    (Image.fromarray(deep), repeated),
    (Image.fromarray(np.dstack([image, half])), image),
    (turned, np.rot90(image, -1)),
    (image[:1, :1], image[:1, :1]),
  ):
    found = as_rgb(given)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)
  cmyk = np.zeros((2, 2, 4), np.uint8)
  cmyk[..., 0] = 255  # Cyan.
  assert as_rgb(Image.fromarray(cmyk, 'CMYK'))[0, 0].tolist() == [0, 255, 255]


BYTES = np.zeros((8, 9, 3), np.uint8)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (BYTES / 255, r'float64 \(8, 9, 3\) is no image.*\(image \* 255\)'),
    (BYTES.astype(np.uint16), r'uint16 .*\(image >> 8\)\.astype'),
    (BYTES.astype(np.int64), r'int64 .* convert it to uint8'),
    (np.zeros((8, 9, 4), np.uint8), r'leave the transparency out: image\[\.'),
    (np.zeros((3, 8, 9), np.uint8), r'image\.transpose\(1, 2, 0\)'),
    (np.zeros((2, 8, 9, 3), np.uint8), r'for several give a list'),
    (np.zeros((0, 9, 3), np.uint8), r'it is empty'),
    (np.zeros(5, np.uint8), r'uint8 \(5,\) is no image; accepted is uint8'),
    (Image.new('RGB', (0, 3)), r'empty: it has 0x3'),
    (Image.new('F', (2, 2)), r'floats \(mode F\)'),
    ({'image': 1}, r'cannot be of type dict; accepted are arrays'),
    ('nowhere/a.jpg', r'nowhere/a\.jpg: No such file'),
  ],
)
def test_what_is_no_picture_is_told(model, given, message):
  with pytest.raises(UserError, match=message):
    model.predict(given)
  with pytest.raises(UserError, match=message) as error:
    model.predict([BYTES, given])
  if not isinstance(given, str):
    assert str(error.value).startswith('image 1 of the list: ')


def test_each_goes_on_after_what_cannot_be_read(model, tmp_path):
  (tmp_path / 'bad.jpg').write_bytes(b'abc')
  images = [picture((50, 60)), tmp_path / 'bad.jpg', picture((30, 100))]
  found = dict(model.predict_each(images))
  assert sorted(found) == [0, 1, 2]
  assert 'bad.jpg cannot be read as a picture' in str(found[1])
  assert found[2].labels.shape == (30, 100)
  assert list(model.predict_each([])) == []


def test_batch_size_is_per_device_and_a_multiple_of_them():
  assert predictor().batch_size == len(jax.devices())
  assert predictor(batch_size=5).batch_size == 8
  with pytest.raises(UserError, match='batch_size is 0'):
    predictor(batch_size=0)


def choose(name, **given):
  return choose_protocol(
    name, image_scale=(512, 128), crop=(96, 90), given=given
  )


def test_protocols_take_what_is_given_and_defaults():
  assert choose('whole', slide_crop=None).describe() == {
    'name': 'whole',
    'image_scale': [512, 128],
  }
  assert choose('slide', image_scale=[300, 200]).describe() == {
    'name': 'slide',
    'image_scale': [300, 200],
    'crop': [96, 90],
    'stride': [64, 60],
  }
  assert choose('slide', slide_crop=(30, 30), slide_stride=(9, 8)).stride == (
    9,
    8,
  )
  assert choose('ms_flip_1x', scales=[1, 2], flip=False).describe() == {
    'name': 'ms_flip_1x',
    'scales': [1.0, 2.0],
    'flip': False,
  }


@pytest.mark.parametrize(
  ('name', 'given', 'message'),
  [
    ('hole', {}, "no protocol 'hole'; accepted are whole, slide"),
    ('whole', {'slide_crop': (9, 9)}, "crop means nothing in .* 'whole'"),
    ('ms_flip_1x', {'image_scale': (9, 9)}, 'image_scale means nothing'),
    ('slide', {'slide_stride': (97, 9)}, r'\(97, 9\) is longer than the win'),
    ('slide', {'slide_crop': (0, 9)}, r'crop is \(0, 9\); it must be two'),
    ('whole', {'image_scale': (9,)}, r'image_scale is \(9,\)'),
    ('ms_flip_0x', {'scales': [1, 0]}, r'scales are \(1\.0, 0\.0\)'),
  ],
)
def test_protocols_refuse_what_cannot_be_meant(name, given, message):
  with pytest.raises(UserError, match=message):
    choose(name, **given)


def test_the_names_are_public():
  assert rj.Predictor is Predictor
  assert rj.Prediction is Prediction
  assert {'from_checkpoint', 'Predictor'} <= set(rj.__all__)
