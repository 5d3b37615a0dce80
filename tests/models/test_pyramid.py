"""Convolutions over upsampled maps against those over the concatenation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.reference import TINY, filled_variables, quick_jit, relative_error

from benchmarks import plain_layers
from resnest_jax.models import pyramid
from resnest_jax.models.layers import zero_outside
from resnest_jax.models.pyramid import convolve_merged, upsampled
from resnest_jax.models.segmentor import create_segmentor

pytestmark = pytest.mark.gpu

# True sizes inside a canvas of 6 x 8.
SIZES = np.array([[6, 7], [4, 8]])
CHANNELS = 24


def features(size):
  """The last stage's, zero outside."""
  x = np.random.default_rng(0).standard_normal((2, 6, 8, CHANNELS))
  return zero_outside(x, size)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('size', [None, SIZES], ids=['canvas', 'sizes'])
@pytest.mark.parametrize('name', ['pspnet', 'deeplabv3'])
def test_heads_and_their_gradients_are_those_of_the_concatenation(
  name, size, train, monkeypatch
):
  with jax.enable_x64(True):
    head = create_segmentor(TINY | {'head': name}).decode_head
    x = features(size)

    def apply(variables, x, size):
      y, changed = head.apply(
        variables,
        [None, None, None, x],
        train=train,
        sizes=[None, None, None, size],
        rngs={'dropout': jax.random.key(0)},
        mutable=['batch_stats'],
      )
      return y, changed

    shapes = jax.eval_shape(
      lambda: head.init(
        jax.random.key(0), [None] * 3 + [x], train=False, sizes=[None] * 4
      )
    )
    variables = filled_variables(shapes)
    direction = np.random.default_rng(1).standard_normal((2, 6, 8, 7))

    def both(params, x, size):
      def loss(params, x):
        y, changed = apply(variables | {'params': params}, x, size)
        return jnp.sum(y * direction), (y, changed)

      return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    found = []
    for merge in (convolve_merged, plain_layers.convolve_merged):
      monkeypatch.setattr(pyramid, 'convolve_merged', merge)
      # A function of its own, so that it is traced.
      run = quick_jit(partial(both))
      found.append(run(variables['params'], x, size))
    leaves = [jax.tree.leaves_with_path(results) for results in found]
    assert len(leaves[0]) > 10
    for (path, ours), (_, expected) in zip(*leaves, strict=True):
      assert relative_error(ours, expected) < 1e-10, path


def test_any_odd_kernel_and_canvas_smaller_than_it():
  rng = np.random.default_rng(2)
  with jax.enable_x64(True):
    for kernel, canvas in ((5, (7, 3)), (3, (1, 1)), (1, (4, 5))):
      p = rng.standard_normal((2, 2, 3, 4))
      x = rng.standard_normal((2, *canvas, 5))
      inputs = [upsampled(jnp.asarray(p), canvas, None), jnp.asarray(x)]
      weights = jnp.asarray(rng.standard_normal((kernel, kernel, 9, 6)))
      ours = convolve_merged(inputs, weights)
      expected = plain_layers.convolve_merged(inputs, weights)
      assert ours.shape == (2, *canvas, 6)
      assert relative_error(ours, expected) < 1e-12


def test_bfloat16_is_not_rounded_more_than_in_the_concatenation():
  """PSPNet's bottleneck; errors against float64, relative to the result."""
  rng = np.random.default_rng(3)
  channels, canvas, features = 32, (24, 32), 64
  with jax.enable_x64(True):
    x = jnp.asarray(rng.standard_normal((2, *canvas, 4 * channels)))
    levels = [
      jnp.asarray(rng.standard_normal((2, bins, bins, channels)))
      for bins in (1, 2, 3, 6)
    ]
    # What both are given: values that bfloat16 holds, as nn.relu leaves them.
    x, *levels = [
      jnp.maximum(v, 0).astype(jnp.bfloat16).astype(jnp.float64)
      for v in (x, *levels)
    ]
    kernel = rng.standard_normal((3, 3, 8 * channels, features))
    kernel = kernel.astype(np.float32) / np.sqrt(9 * 8 * channels)

    def run(dtype, merge):
      inputs = [
        x.astype(dtype),
        *(upsampled(p.astype(dtype), canvas, None) for p in levels),
      ]
      return merge(inputs, jnp.asarray(kernel, dtype))

    exact = run(jnp.float64, plain_layers.convolve_merged)
    errors = []
    for merge in (convolve_merged, plain_layers.convolve_merged):
      y = run(jnp.bfloat16, merge).astype(jnp.float64)
      errors.append(float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)))
  assert 2**-12 < errors[0] <= errors[1] < 2**-7
