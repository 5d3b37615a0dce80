"""Crops and policies of classifiers, against the authors' running code."""

import json
import math
import random
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from data.readers import data_config
from golden import reference
from numpy.testing import assert_allclose, assert_equal
from PIL import Image
from scipy import stats

from resnest_jax.data import crops, pipeline, policies, preprocess

DRAWS = 50_000
OPERATIONS = reference.load('imagenet_ops')
EVALUATION = reference.load('imagenet_eval_transform')
GLUON = reference.load('imagenet_gluon')
# The names of the authors, and ours.
NAMES = {'CutoutAbs': 'Cutout', 'Posterize2': 'Posterize'}
NAMES |= {f'Translate{x}abs': f'Translate{x}' for x in 'XY'}


def rows(jitter):
  given = (OPERATIONS['kinds'] == 'jitter') == jitter
  return np.flatnonzero(given & (OPERATIONS['names'] != '')).tolist()


@pytest.mark.parametrize('i', rows(jitter=False))
def test_operation_is_the_authors(i):
  name, (_, value, sign, place) = (
    OPERATIONS[x][i] for x in ('names', 'values')
  )
  name = NAMES.get(str(name), str(name))
  own = np.full(2, place if name == 'Cutout' else 0.75 - 0.25 * sign)
  picture = Image.fromarray(OPERATIONS['image'])
  result = policies.operate(picture, name, value, own)
  assert_equal(np.asarray(result), OPERATIONS['outputs'][i])
  assert_equal(np.asarray(picture), OPERATIONS['image'])  # Not changed.


OPTIONS = {'crop_size': (64, 64), 'policy': 'none', 'random_crop': 'encoding'}
OPTIONS |= {'interpolation': 'bicubic', 'flip_probability': 0.0}
OPTIONS |= {'color_jitter': 0.0, 'lighting': 0.0}
DRAW = crops.draw(np.random.default_rng(0))


def test_colours_change_as_torchvision_changes_them():
  """The crop is made to be the whole picture, of its own size."""
  image = OPERATIONS['image'][:, :48]
  changes = {'color_jitter': 0.4, 'crop_size': (48, 48)}
  kinds = ['brightness', 'contrast', 'saturation']
  for i in rows(jitter=True):
    which = kinds.index(OPERATIONS['names'][i])
    factor, output = OPERATIONS['values'][i][0], OPERATIONS['outputs'][i]
    enhanced = crops._ENHANCERS[which](Image.fromarray(OPERATIONS['image']))
    assert_equal(np.asarray(enhanced.enhance(factor)), output)
  # In the drawn order, each by its own factor.
  jitter, order = np.array([0.1, 0.6, 0.9]), np.array([2, 0, 1])
  draw = DRAW._replace(jitter=jitter, order=order, tries=np.ones((10, 2)))
  made = crops.augment(image, 3, draw, **OPTIONS | changes)
  expected = crops.augment(image, 3, draw, **OPTIONS | {'crop_size': (48, 48)})[
    'image'
  ]
  expected = Image.fromarray(expected)
  for which in order:
    factor = 0.6 + 0.8 * jitter[which]
    expected = crops._ENHANCERS[which](expected).enhance(factor)
  assert_equal(made['image'], np.asarray(expected))


def test_sub_policies_have_the_authors_values():
  theirs = json.loads(str(OPERATIONS['policies']))
  for ours, expected in zip(policies.AUTO_AUGMENT, theirs, strict=True):
    for (name, share, value), (theirs_name, *numbers) in zip(
      ours, expected, strict=True
    ):
      assert (name, share) == (NAMES.get(theirs_name, theirs_name), numbers[0])
      if name not in ('Equalize', 'AutoContrast', 'Invert'):
        assert value == pytest.approx(numbers[2], abs=1e-12)


@pytest.mark.parametrize('row', reference.load('imagenet_crop')['rows'])
def test_random_crop_is_that_of_pytorch_encoding(row):
  width, height, *box, failed, number = row[:8].astype(int).tolist()
  units = row[8 : 8 + number]
  tries, corner = (units, DRAW.corner) if failed else (units[:-2], units[-2:])
  found = crops.encoding_box(width, height, tries.reshape(-1, 2), corner)
  assert found == (None if failed else tuple(box))


def test_lighting_is_that_of_both():
  golden = reference.load('imagenet_crop')
  for alpha, rgb in zip(
    golden['lighting_alpha'], golden['lighting_rgb'], strict=True
  ):
    assert_allclose(crops.shift(alpha), rgb, atol=1e-9)
  # MXNet has the same numbers for grey levels, to four digits.
  shift = crops.shift(GLUON['lighting_alpha'])
  assert_allclose(255 * shift, GLUON['lighting_rgb'], rtol=1e-4)
  # On the device.
  image = np.full((1, 2, 2, 3), 100, np.uint8)
  size = np.full((1, 2), 2)
  inputs = preprocess.preprocess(image, size, shift=jnp.array([shift]))
  mean, std = (np.array(x) / 255 for x in (preprocess.MEAN, preprocess.STD))
  assert_allclose(inputs[0, 1, 0], (100 / 255 + shift - mean) / std, rtol=1e-5)


def blocky(seed, height, width):
  rng = np.random.default_rng(seed)
  shape = height // 8 + 1, width // 8 + 1, 3
  coarse = rng.integers(0, 256, shape).repeat(8, 0).repeat(8, 1)
  coarse = 3 * coarse[:height, :width]
  fine = rng.integers(0, 256, (height, width, 3))
  return ((coarse + fine) // 4).astype(np.uint8)


@pytest.mark.parametrize('size', [224, 256, 320, 416])
@pytest.mark.parametrize('seed', [20, 21, 22])
def test_evaluation_crop_is_the_authors(seed, size):
  image = blocky(*EVALUATION[f'image_{seed}'])
  for rule, golden, name in (
    ('encoding', EVALUATION, 'verify'),
    ('gluon', *((GLUON, 'gluon') if size < 320 else (EVALUATION, 'verify'))),
  ):
    crop = crops.center_crop(image, size, rule)
    *_, crc = golden[f'{name}_{seed}_{size}_stat']
    assert_equal(crop[::31, ::29], golden[f'{name}_{seed}_{size}'])
    assert zlib.crc32(np.ascontiguousarray(crop)) == crc
  box = crops.center_box(*image.shape[1::-1], size)
  assert_allclose(box, EVALUATION[f'box_{seed}_{size}'][0], rtol=1e-12)


# ---- Distributions ---------------------------------------------------------


def resized_twin(width, height):
  """As torchvision documents RandomResizedCrop: a size, or too large a one."""
  area = width * height * random.uniform(0.08, 1)
  ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
  return round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))


def encoding_twin(width, height):
  """Of the area is drawn what the height may be, uniformly."""
  area, ratio = width * height, random.uniform(3 / 4, 4 / 3)
  most = min(height, round(math.sqrt(area / ratio)), round(width / ratio))
  h = round(random.uniform(math.sqrt(area / ratio / 10), most))
  w = round(h * ratio)
  return (w, h) if area / 10 <= w * h else (width + 1, h)


def drawn_by(twin, width, height):
  for w, h in (twin(width, height) for _ in range(10)):
    if 0 < w <= width and 0 < h <= height:
      x, y = random.randint(0, width - w), random.randint(0, height - h)
      return x, y, x + w, y + h
  return None


@pytest.mark.parametrize('rule', ['resized', 'encoding'])
def test_boxes_are_distributed_as_those_of_a_twin(rule):
  random.seed(3)
  rng = np.random.default_rng(5)
  find = getattr(crops, f'{rule}_box')
  twin = {'resized': resized_twin, 'encoding': encoding_twin}[rule]
  size = 500, 375
  ours = (find(*size, rng.random((10, 2)), rng.random(2)) for _ in range(DRAWS))
  theirs = (drawn_by(twin, *size) for _ in range(DRAWS))
  facts = []
  for boxes in (ours, theirs):
    left, top, right, bottom = np.array([x for x in boxes if x]).T
    width, height = right - left, bottom - top
    room = np.maximum(500 - width, 1), np.maximum(375 - height, 1)
    parts = left / room[0], top / room[1]
    facts.append((width * height, width / height, *parts))
  for ours, theirs in zip(*facts, strict=True):
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


def test_whole_middle_is_taken_where_no_crop_is_found():
  vain = np.zeros((10, 2)), np.zeros(2)
  assert crops.resized_box(1000, 30, *vain) == (480, 0, 520, 30)
  assert crops.resized_box(30, 1000, *vain) == (0, 480, 30, 520)
  assert crops.center_box(1000, 20, 224)[:2] == (491, 1)


def count_operations(policy, monkeypatch):
  """How often each operation is applied, and each sign."""
  counts, signs = dict.fromkeys(policies.RANGES, 0), [0, 0]

  def operate(picture, name, value, own):
    counts[name] += 1
    signs[int(own[0] > 0.5)] += 1
    return picture

  monkeypatch.setattr(policies, 'operate', operate)
  rng = np.random.default_rng(9)
  for _ in range(DRAWS):
    policies.POLICIES[policy](None, crops.draw(rng).policy)
  return counts, signs


def test_operations_come_as_often_as_they_should(monkeypatch):
  counts, signs = count_operations('randaugment', monkeypatch)
  # Two of 16, of which half are left out.
  found = [*counts.values(), 2 * DRAWS - sum(counts.values())]
  expected = [*16 * [DRAWS / 16], DRAWS]
  assert stats.chisquare(found, expected).pvalue > 1e-3
  assert stats.chisquare(signs).pvalue > 1e-3

  counts, _ = count_operations('autoaugment', monkeypatch)
  shares = dict.fromkeys(counts, 0.0)
  for name, share, _ in (x for pair in policies.AUTO_AUGMENT for x in pair):
    shares[name] += share / 25
  for name, share in shares.items():
    # An operation that stands twice in a sub-policy comes in pairs.
    sigma = math.sqrt(2 * DRAWS * max(share, 1e-9))
    assert abs(counts[name] - DRAWS * share) < 4 * sigma, name


# ---- Batches ---------------------------------------------------------------


class Shapes:
  """A split of pictures of various sizes, whose class is their grey level."""

  def __len__(self):
    return 7

  def __getitem__(self, index):
    image = np.full((20 + index, 30, 3), 30 * index, np.uint8)
    image[:, 15:] += 1  # The right half.
    return {'image': image, 'label': index, 'name': f'{index}.JPEG'}

  def location(self, index):
    return f'{index}.JPEG'


def configured(**changes):
  values = {'augmentation': 'imagenet', 'image_scale': (24, 24)}
  values |= OPTIONS | {'crop_size': (16, 16), 'center_crop': 'gluon'}
  return data_config(**values | {'lighting': 0.1} | changes)


def train(start=0, **changes):
  steps = {'seed': 4, 'batch_size': 4, 'start_step': start, 'total_steps': 9}
  with pipeline.make_train_iterator(
    configured(**changes), Shapes(), **steps
  ) as x:
    return list(x)


def test_training_batches_are_functions_of_seed_and_step():
  batches = train()
  types = {key: (x.shape, x.dtype.name) for key, x in batches[0].items()}
  assert types == {
    **{'image': ((4, 16, 16, 3), 'uint8'), 'label': ((4,), 'int32')},
    **{'size': ((4, 2), 'int32'), 'shift': ((4, 3), 'float32')},
  }
  assert (batches[0]['size'] == 16).all()
  for batch in batches:
    assert_equal(batch['image'][:, 0, 0, 0] // 30, batch['label'])
  for a, b in zip(batches[5:], train(5), strict=True):
    for key in types:
      assert_equal(a[key], b[key])
  shifts = np.concatenate([x['shift'] for x in batches])
  assert len(np.unique(shifts)) == 9 * 4 * 3


def test_half_of_the_pictures_are_mirrored():
  images = np.concatenate([x['image'] for x in train(flip_probability=0.5)])
  mirrored = images[:, 8, 0, 0] > images[:, 8, 15, 0]
  plain = images[:, 8, 0, 0] < images[:, 8, 15, 0]
  assert 5 < mirrored.sum() < 31
  assert (mirrored | plain).mean() > 0.5  # Few crops lie in one half.
  assert not any(
    (x['image'][:, 8, 0, 0] > x['image'][:, 8, 15, 0]).any() for x in train()
  )


def test_evaluation_batches_hold_the_crops_in_order():
  options = {'batch_size': 4, 'bucket': 64}
  split = Shapes()
  with pipeline.make_eval_iterator(configured(), split, **options) as batches:
    batches = list(batches)
  assert [x['image'].shape for x in batches] == 2 * [(4, 24, 24, 3)]
  assert [x['label'].tolist() for x in batches] == [[0, 1, 2, 3], [4, 5, 6, -1]]
  assert batches[1]['label'].dtype == np.int32
  assert batches[1]['index'].tolist() == [4, 5, 6, -1]
  assert (batches[0]['size'] == 24).all()
  expected = crops.center_crop(split[5]['image'], 24, 'gluon')
  assert_equal(batches[1]['image'][1], expected)
