"""The backbone: true sizes in a padded canvas, dilation."""

import numpy as np
import pytest
from golden.reference import TINY, evaluate, relative_error, variables_of

from resnest_jax.models.layers import zero_outside
from resnest_jax.models.segmentor import create_backbone

pytestmark = pytest.mark.usefixtures('float64')

SIZES = np.array([(41, 57), (33, 64), (1, 1)])


@pytest.mark.parametrize(
  'config',
  [
    {'output_stride': 8, 'dilation_rule': 'mmseg'},
    {'output_stride': 16, 'dilation_rule': 'official', 'radix': 1},
    {'output_stride': 8, 'dilation_rule': 'timm', 'groups': 2},
    {'output_stride': 32, 'backbone': 'resnest50_fast_2s2x40d', 'width': 16},
  ],
  ids=['mmseg_8', 'official_16', 'timm_8', 'avd_first_32'],
)
def test_features_in_a_padded_canvas_are_those_of_the_image_alone(config):
  model = create_backbone(TINY | {'stage_sizes': (1, 1, 1, 1)} | config)
  variables = variables_of(model)
  images = np.random.default_rng(1).standard_normal((3, 48, 64, 3))
  images = zero_outside(images, SIZES)
  features, sizes = evaluate(model, variables, images, SIZES)
  for index, (height, width) in enumerate(SIZES):
    image = images[index : index + 1, :height, :width]
    alone, none = evaluate(model, variables, image)
    assert none == [None] * 4
    for padded, size, expected in zip(features, sizes, alone, strict=True):
      rows, columns = size[index]
      assert (rows, columns) == expected.shape[1:3]
      error = relative_error(padded[index, :rows, :columns], expected[0])
      assert error < 1e-9
      outside = padded[index].at[:rows, :columns].set(0)
      assert not outside.any()


def features_of(rule, output_stride):
  model = create_backbone(
    TINY | {'output_stride': output_stride, 'dilation_rule': rule}
  )
  images = np.random.default_rng(2).standard_normal((2, 48, 64, 3))
  return evaluate(model, variables_of(model), images)[0]


@pytest.mark.parametrize(
  ('output_stride', 'equal', 'limit'), [(32, 4, 0), (8, 2, 1e-13)]
)
def test_dilation_rules_differ_in_dilated_stages(output_stride, equal, limit):
  expected = features_of('mmseg', output_stride)
  for rule in ('official', 'timm'):
    features = features_of(rule, output_stride)
    errors = [*map(relative_error, features, expected)]
    assert max(errors[:equal]) <= limit
    assert all(error > 1e-3 for error in errors[equal:])
