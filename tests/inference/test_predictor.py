"""Prediction from Python: what goes in, what comes out, what is compiled."""

import io

import cv2
import jax
import numpy as np
import pytest
from evaluation import plain
from evaluation.drawn import smooth_picture
from PIL import Image
from scipy.special import softmax

from resnest_jax import Prediction
from resnest_jax.data.pictures import as_rgb
from resnest_jax.errors import UserError
from resnest_jax.inference.protocols import Protocol, choose_protocol
from resnest_jax.runtime import count_compilations

# All fit one bucket but the last of each four.
SIZES = ((50, 60), (40, 64), (64, 33), (30, 100)) * 2
PICTURES = [smooth_picture(*size, i) for i, size in enumerate(SIZES)]


@pytest.fixture(scope='module')
def model():
  return plain.make_predictor()


def plain_scores(image):
  size = plain.fitted(*image.shape[:2], 128, 64)
  logits = plain.network(cv2.resize(image, size[::-1]))
  return plain.resized(logits, image.shape[:2])


def test_labels_are_those_of_the_plain_way_in_the_order_given(model, tmp_path):
  cv2.imwrite(f'{tmp_path}/image.png', PICTURES[1][..., ::-1])
  given = list(PICTURES)
  given[1], given[3] = tmp_path / 'image.png', Image.fromarray(PICTURES[3])
  given[4] = PICTURES[4][..., ::-1].copy()[..., ::-1]  # Not contiguous.
  found = model.predict(given) + [model.predict(x) for x in PICTURES[:4]]
  for prediction, image in zip(found, PICTURES + PICTURES[:4], strict=True):
    expected = plain_scores(image).argmax(-1)
    np.testing.assert_array_equal(prediction.labels, expected)
    np.testing.assert_array_equal(prediction.image, image)
    assert prediction.labels.dtype == np.uint8
    assert len(np.unique(expected)) > 1
  assert model.predict([]) == []


def test_sizes_of_a_bucket_are_compiled_once():
  model = plain.make_predictor(Protocol(image_scale=(128, 128)))
  with count_compilations() as compiled:
    model.predict(smooth_picture(50, 51))
    assert compiled
    compiled.clear()
    model.predict(smooth_picture(60, 61))
    model.predict([smooth_picture(50, 50), smooth_picture(64, 63)])
    assert compiled == []


def test_probabilities_of_all_classes_and_their_mean_over_scales(model):
  given, scales = PICTURES[:2], (0.5, 1.0)
  scaled = plain.make_predictor(Protocol('ms_flip_1x', scales=scales))
  for predictor, expected in (
    (model, [softmax(plain_scores(image), -1) for image in given]),
    (scaled, [plain.multiscale_scores(x, scales, None) for x in given]),
  ):
    found = predictor.predict(given, probabilities=True)
    for picture, scores in zip(found, expected, strict=True):
      np.testing.assert_allclose(picture.probabilities, scores, atol=2e-5)
      np.testing.assert_array_equal(picture.labels, scores.argmax(-1))


PALETTE = np.array([(200, 0, 0), (0, 100, 20), (0, 0, 50)], np.uint8)


def test_colours_and_overlay():
  labels = np.array([[0, 1], [2, 0]], np.uint8)
  image = np.full((2, 2, 3), 100, np.uint8)
  found = Prediction(labels, ('a', 'b', 'c'), PALETTE, image)
  assert found.overlay()[0].tolist() == [[150, 50, 50], [50, 100, 60]]
  with_names = found.overlay(1, legend=True)
  np.testing.assert_array_equal(with_names[:2], found.colors())
  assert with_names.shape[0] > 20
  with pytest.raises(UserError, match=r'opacity is 1\.5; it must be from 0'):
    found.overlay(1.5)


FITTED = {(9, 6): (9, 6), (1000, 2000): (512, 1024), (5000, 1): (1024, 1)}


@pytest.mark.parametrize(('size', 'shown'), FITTED.items())
def test_notebooks_show_the_overlay(size, shown, tmp_path):
  path, labels = tmp_path / 'a.png', np.ones(size[::-1], np.uint8)
  Image.new('RGB', size, (100, 100, 100)).save(path)
  found = Prediction(labels, ('a', 'wall'), PALETTE[:2], path)
  pictures = [Image.open(io.BytesIO(found._repr_png_()))]
  path.unlink()  # Leaves the colours.
  pictures.append(Image.open(io.BytesIO(found._repr_png_())))
  assert [x.size for x in pictures] == [shown, shown]
  colours = [picture.getpixel((0, 0)) for picture in pictures]
  assert colours == [(50, 100, 60), (0, 100, 20)]
  told = f'<Prediction: {size[0]}x{size[1]} pixels, 1 class: wall>'
  assert repr(found) == told


def test_every_kind_of_picture_becomes_rgb():
  image = smooth_picture(6, 7, 1)
  turned = Image.fromarray(image)
  turned.getexif()[0x0112] = 6
  grey, repeated = image[..., 0], np.repeat(image[..., :1], 3, -1)
  cyan = Image.new('CMYK', (2, 2), (255, 0, 0, 0))
  for given, expected in (
    (image[:, ::-1], image[:, ::-1]),
    (grey, repeated),
    (grey[..., None], repeated),
    (jax.numpy.asarray(image), image),
    (Image.fromarray(image), image),
    (Image.fromarray(grey.astype(np.uint16) * 256 + 99), repeated),
    (Image.fromarray(np.dstack([image, grey // 2])), image),
    (turned, np.rot90(image, -1)),
    (cyan, np.full((2, 2, 3), (0, 255, 255))),
  ):
    found = as_rgb(given)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


BYTES = np.zeros((8, 9, 3), np.uint8)


def test_what_is_no_picture_is_told(model):
  for given, message in (
    (BYTES / 255, r'float64 \(8, 9, 3\) is not an image.*\(image \* 255\)'),
    (BYTES.astype(np.uint16), r'uint16 .*\(image >> 8\)\.astype'),
    (BYTES.astype(np.int64), r'int64 .* convert it to uint8'),
    (np.zeros((8, 9, 4), np.uint8), r'drop the transparency: image\[\.'),
    (np.zeros((3, 8, 9), np.uint8), r'image\.transpose\(1, 2, 0\)'),
    (np.zeros((2, 8, 9, 3), np.uint8), r'for several images give a list'),
    (np.zeros((0, 9, 3), np.uint8), r'it is empty'),
    (np.zeros(5, np.uint8), r'uint8 \(5,\) is not an image; accepted: uint8'),
    (Image.new('RGB', (0, 3)), r'empty: it has 0x3'),
    (Image.new('F', (2, 2)), r'float32 .* floats from 0 to 1 by'),
    (Image.new('I', (2, 2), -1), r'int32 .* convert it to uint8'),
    ({'image': 1}, r'cannot be of type dict; accepted are arrays'),
    ('nowhere/a.jpg', r'nowhere/a\.jpg cannot be read .No such file'),
  ):
    with pytest.raises(UserError, match=f'^(?!image 1).*{message}'):
      model.predict(given)
    numbered = '' if isinstance(given, str) else 'image 1 of the list: .*'
    with pytest.raises(UserError, match=f'^{numbered}{message}'):
      model.predict([BYTES, given])


def test_each_goes_on_after_what_cannot_be_read(model, tmp_path):
  (tmp_path / 'bad.jpg').write_bytes(b'abc')
  images = [PICTURES[0], tmp_path / 'bad.jpg', PICTURES[3]]
  found = dict(model.predict_each(images))
  assert sorted(found) == [0, 1, 2]
  assert 'bad.jpg cannot be decoded' in str(found[1])
  assert found[2].labels.shape == (30, 100)


def test_pictures_are_not_enlarged_without_bounds():
  huge = plain.make_predictor(Protocol('ms_flip_1x', scales=(1.0, 100.0)))
  told = '^the image would be resized to 20000 x 10000 .* larger max_p'
  with pytest.raises(UserError, match=told):
    huge.predict(np.zeros((100, 200, 3), np.uint8))


def test_batch_size_is_per_device_and_a_multiple_of_them(model):
  assert model.batch_size == len(jax.devices())
  assert plain.make_predictor(batch_size=5).batch_size == 8
  with pytest.raises(UserError, match='batch_size is 0'):
    plain.make_predictor(batch_size=0)


def test_protocols_take_what_is_given_and_defaults():
  defaults = {'image_scale': (512, 128), 'crop': (96, 90)}

  def described(name, given):
    return choose_protocol(name, **defaults, given=given).describe()

  slide = {'image_scale': [300, 200], 'crop': [96, 90], 'stride': [64, 60]}
  found = described('slide', {'image_scale': [300, 200]})
  assert found == {'name': 'slide'} | slide
  found = described('ms_flip_1x', {'scales': [1, 2], 'flip': False})
  assert (found['scales'], found['flip']) == ([1.0, 2.0], False)
  for name, given, message in (
    ('hole', {}, "no protocol 'hole'; accepted are whole, slide"),
    ('whole', {'slide_crop': (9, 9)}, r'^slide_crop means .*--protocol slide'),
    ('slide', {'flip': False}, r'^flip means nothing .*--protocol ms_flip_0x'),
    ('ms_flip_1x', {'image_scale': (9, 9)}, r'^image_scale .*whole, slide, ms'),
    ('slide', {'slide_stride': (97, 9)}, r'\(97, 9\) is longer than the win'),
    ('slide', {'slide_crop': (0, 9)}, r'crop is \(0, 9\); it must be two'),
    ('whole', {'image_scale': (65537, 9)}, r'image_scale is .* 1 to 65536\.'),
    ('ms_flip_0x', {'scales': [1, 0]}, r'scales are \(1\.0, 0\.0\)'),
    ('ms_flip_1x', {'scales': [1e9]}, r'scales are .* at most 100'),
  ):
    with pytest.raises(UserError, match=message):
      described(name, given)
