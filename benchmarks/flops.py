"""Floating-point operations of a model, counted from its program."""

import math
from collections.abc import Callable
from typing import Any

import jax

from resnest_jax.models import implementations


def count_flops(function: Callable, *arguments: Any) -> int:
  """Counts operations in convolutions and matrix products, two a multiply-add.

  The function is traced, not run; shapes suffice as `arguments`.
  """
  # Winograd's multiplications would make the count depend on the platform.
  with implementations.use(wide='convolution'):
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      contracted = equation.params['dimension_numbers'][0][0]
      shape = equation.invars[0].aval.shape
      terms = math.prod(shape[axis] for axis in contracted)
      total += 2 * _values(equation) * terms
    elif equation.primitive.name == 'conv_general_dilated':
      kernel = equation.invars[1].aval.shape
      features = kernel[equation.params['dimension_numbers'].rhs_spec[0]]
      total += 2 * _values(equation) * math.prod(kernel) // features
    # Parameters hold inner programs: one for jit or scan, several for cond.
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          total += equation.params.get('length', 1) * _count(inner)
  return total


def _values(equation: Any) -> int:
  return math.prod(equation.outvars[0].aval.shape)
