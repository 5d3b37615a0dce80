"""Programs stay the same when what is constant is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from resnest_jax.export.folding import folded


# Names of what is left of a program of floats (b, 5, 6, 2).
def operations(program):
  (batch,) = jax.export.symbolic_shape('b')
  spec = jax.ShapeDtypeStruct((batch, 5, 6, 2), jnp.float32)
  (call,) = jax.make_jaxpr(jax.jit(program))(spec).jaxpr.eqns
  jaxpr = call.params['jaxpr'].jaxpr
  used, names = set(jaxpr.outvars), []
  for equation in reversed(jaxpr.eqns):
    if used & set(equation.outvars):  # Dead ones are left out.
      used |= {x for x in equation.invars if not hasattr(x, 'val')}
      names.append(equation.primitive.name)
  return names[::-1]


def conv(x):
  kernel = jnp.arange(3 * 3 * 2 * 4.0).reshape(3, 3, 2, 4)
  names = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
  return lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', **names)


def masked(x):
  return jnp.where(x[..., :1] > 0, x, 0)


CONV, GAINS = 'conv_general_dilated', jnp.array([1.0, 2, 3, 4])
MASKED = ['split', 'gt', 'convert_element_type', 'mul', 'mul', 'add']
PICKED = ['split', 'squeeze', 'split', 'squeeze', 'sub']
# With what is left of those that lose something.
PROGRAMS = {
  # A gain goes into the kernel, a shift stays.
  'gain': (lambda x: conv(x) * GAINS + 5 * jnp.arange(4.0), [CONV, 'add']),
  # The result is used before the gain as well.
  'both': (lambda x: conv(x) * GAINS + conv(x),),
  # The gain is of rows: no channel's.
  'rows': (lambda x: conv(x) * jnp.arange(5.0)[:, None, None], [CONV, 'mul']),
  # A product whose last axis is not the kernel's.
  'turned': (lambda x: jnp.einsum('bhwc,ih->biwc', x, jnp.ones((2, 5))) * 3,),
  'padded': (lambda x: jnp.pad(x, ((0, 0), (7, 0), (1, 6), (0, 0))),),
  'nested': (lambda x: jax.checkpoint(conv)(x) * GAINS, [CONV]),
  # As a whole, which is ONNX's Relu.
  'relu': (jax.nn.relu, ['custom_jvp_call']),
  # Data as sizes are: one mask for all channels and of both uses.
  'masked': (lambda x: masked(x) + masked(x) * 2, MASKED),
  'picked': (lambda x: x[:, :, 2] - x[:, :, 5], PICKED),
  'stacked': (lambda x: jnp.stack([x, 2 * x], 2),),
  'divided': (lambda x: (x * 9).astype(int) % 4 + (x * 9).astype(int) // 4,),
  'chosen': (lambda x: jnp.where(jnp.ones((5, 6, 2), bool), x, 0) + 1, ['add']),
}


@pytest.mark.parametrize('name', PROGRAMS)
def test_results_stay_the_same(name):
  compute, *left = PROGRAMS[name]
  program = folded(lambda x: (compute(x),))
  x = np.random.default_rng(0).standard_normal((3, 5, 6, 2), np.float32)
  found = jax.jit(program)(x)[0]
  np.testing.assert_allclose(found, compute(x), rtol=1e-5, atol=1e-4)
  assert left in ([], [operations(program)])
