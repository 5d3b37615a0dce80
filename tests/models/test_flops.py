"""Counted operations against closed forms and the published models."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks import plain_layers
from resnest_jax.config import load_config
from resnest_jax.models import pyramid
from resnest_jax.models.convolution import convolve
from resnest_jax.models.flops import count_flops
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import variable_shapes


def test_convolution_and_product():
  x = jax.ShapeDtypeStruct((2, 8, 10, 6), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)
  # Two groups: each of the 4 outputs sees 3 of the 6 channels.
  counted = count_flops(lambda x, k: convolve(x, k, groups=2), x, kernel)
  assert counted == 2 * (2 * 8 * 10 * 4) * 9 * 3
  matrix = jax.ShapeDtypeStruct((6, 5), jnp.float32)
  counted = count_flops(jax.jit(lambda x, m: x @ m), x, matrix)
  assert counted == 2 * (2 * 8 * 10) * 6 * 5


@pytest.mark.parametrize(
  ('merge', 'expected'),
  [(plain_layers.convolve_merged, 273.6), (pyramid.convolve_merged, 235.1)],
)
def test_pspnet_row(merge, expected, monkeypatch):
  """mmsegmentation's model: 273.6 G multiply-adds at 512 x 512 with aux.

  On the pyramid's own bins it does without 38.7 of the bottleneck's.
  """
  model = create_segmentor(load_config('configs/ade20k_pspnet.py').model)
  images = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32)
  monkeypatch.setattr(pyramid, 'convolve_merged', merge)
  apply = partial(model.apply, train=False)
  counted = count_flops(apply, variable_shapes(model), images)
  assert counted / 2e9 == pytest.approx(expected, rel=0.005)
