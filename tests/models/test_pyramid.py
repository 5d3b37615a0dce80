"""Convolutions over upsampled maps against those over the concatenation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import TINY, relative_error, variables_of

from benchmarks import plain_layers
from resnest_jax.models import pyramid
from resnest_jax.models.layers import zero_outside
from resnest_jax.models.pyramid import convolve_merged, upsampled
from resnest_jax.models.segmentor import create_segmentor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('float64')]

MERGES = convolve_merged, plain_layers.convolve_merged
# True sizes inside a canvas of 6 x 8.
SIZES = np.array([[6, 7], [4, 8]])


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('size', [None, SIZES], ids=['canvas', 'sizes'])
@pytest.mark.parametrize('name', ['pspnet', 'deeplabv3'])
def test_heads_and_their_gradients_are_those_of_the_concatenation(
  name, size, train, monkeypatch
):
  model = create_segmentor(TINY | {'head': name})
  variables = {k: v['decode_head'] for k, v in variables_of(model).items()}
  rng = np.random.default_rng(0)
  x = zero_outside(rng.standard_normal((2, 6, 8, 256)), size)
  direction = jnp.asarray(rng.standard_normal((2, 6, 8, 7)))

  def apply(params, x):
    return model.decode_head.apply(
      variables | {'params': params},
      [None, None, None, x],
      train=train,
      sizes=[None, None, None, size],
      rngs={'dropout': jax.random.key(0)},
      mutable=['batch_stats'],
    )

  results = []
  for merge in MERGES:
    monkeypatch.setattr(pyramid, 'convolve_merged', merge)
    # A function of its own, so that it is traced.
    traced = jax.jit(lambda *x: apply(*x))
    y, back, changed = jax.vjp(traced, variables['params'], x, has_aux=True)
    results.append((y, changed, back(direction)))
  leaves = map(jax.tree.leaves_with_path, results)
  for (path, ours), (_, expected) in zip(*leaves, strict=True):
    assert relative_error(ours, expected) < 1e-10, path


@pytest.mark.parametrize(
  ('kernel', 'canvas'), [(5, (7, 3)), (3, (1, 1)), (1, (4, 5))]
)
def test_any_odd_kernel_and_canvas_smaller_than_it(kernel, canvas):
  rng = np.random.default_rng(2)
  p, x, weights = (
    jnp.asarray(rng.standard_normal(shape))
    for shape in ((2, 2, 3, 4), (2, *canvas, 5), (kernel, kernel, 9, 6))
  )
  inputs = [upsampled(p, canvas, None), x]
  ours, expected = (merge(inputs, weights) for merge in MERGES)
  assert ours.shape == (2, *canvas, 6)
  assert relative_error(ours, expected) < 1e-12


def test_bfloat16_is_not_rounded_more_than_in_the_concatenation():
  """PSPNet's bottleneck; errors against float64, relative to the result."""
  rng = np.random.default_rng(3)
  shapes = [(24, 32, 128)] + [(bins, bins, 32) for bins in (1, 2, 3, 6)]
  # What both are given: values that bfloat16 holds, as nn.relu leaves them.
  x, *levels = (
    jnp.maximum(rng.standard_normal((2, *shape)), 0).astype(jnp.bfloat16)
    for shape in shapes
  )
  kernel = np.float32(rng.standard_normal((3, 3, 256, 64)) / 48)

  def run(dtype, merge):
    wide = [upsampled(p.astype(dtype), (24, 32), None) for p in levels]
    y = merge([x.astype(dtype), *wide], jnp.asarray(kernel, dtype))
    return y.astype(jnp.float64)

  exact = run(jnp.float64, plain_layers.convolve_merged)
  ours, plain = (
    jnp.linalg.norm(run(jnp.bfloat16, merge) - exact) / jnp.linalg.norm(exact)
    for merge in MERGES
  )
  assert 2**-12 < ours <= plain < 2**-7
