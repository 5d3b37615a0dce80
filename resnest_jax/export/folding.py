"""Folds the constants of a program before it is converted to ONNX.

`jax2onnx` translates operation by operation. Slices of weights, matrices of
resizes and the arithmetic of normalisations would all become nodes, and every
constant of a channel an array as large as the picture. Folding inlines nested
functions, computes constants, leaves broadcasting to the operations, does what
is repeated once, and multiplies the gain of a normalisation into the kernel
before it, and a mask into what it masks.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnest_jax.export.program import Program
from resnest_jax.jax_private import Literal, Tracer

# Operations that call a function, and the parameter that holds it. 'remat2' is
# the name of `jax.checkpoint`.
NESTED = {
  'jit': 'jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'remat2': 'jaxpr',
}
# Both JAX's primitives and ONNX's operators repeat lengths of 1 here.
ELEMENTWISE = ('add', 'sub', 'mul', 'div', 'max', 'min')
ELEMENTWISE += ('and', 'eq', 'ge', 'lt')

MANY = 2**14  # Values of larger constants are not compared.


def _stack(equation: Any, *arrays: Any) -> Any:
  axis = equation.params['axis']
  return lax.concatenate([lax.expand_dims(x, [axis]) for x in arrays], axis)


def _rem(equation: Any, x: Any, y: Any) -> Any:
  if jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
    return None
  return lax.sub(x, lax.mul(lax.div(x, y), y))


def _gather(equation: Any, x: Any, start: Any) -> Any:
  # At a place that is known, as by `x[:, 0]`: a part of an axis.
  if isinstance(start, Tracer) or np.shape(start) != (1,):
    return None
  numbers = equation.params['dimension_numbers']
  (axis,), start = numbers.start_index_map, int(start[0])
  length, whole = equation.params['slice_sizes'][axis], x.shape[axis]
  if not (isinstance(length, int) and isinstance(whole, int)):  # Symbolic.
    x = lax.slice_in_dim(x, start, start + length, axis=axis)
  elif length < whole:
    sizes = start, length, whole - start - length
    x = lax.split(x, [n for n in sizes if n], axis=axis)[start > 0]
  return lax.squeeze(x, numbers.collapsed_slice_dims)


def _product(equation: Any, x: Any, kernel: Any) -> Any:
  # MatMul instead of Einsum, which is slower and has no form of 8 bits.
  (axes, contracted), batch = equation.params['dimension_numbers']
  if isinstance(kernel, Tracer) or batch != ((), ()) or axes != (x.ndim - 1,):
    return None
  kernel = np.moveaxis(kernel, contracted[0], 0)
  found = jnp.matmul(x, kernel.reshape(len(kernel), -1))
  return lax.reshape(found, (*x.shape[:-1], *kernel.shape[1:]))


def _relu(equation: Any, x: Any, least: Any) -> Any:
  if isinstance(least, Tracer) or np.any(least):
    return None
  return jax.nn.relu(x)


# Operations by others that jax2onnx translates, or translates better; None
# where it translates the operation itself.
REWRITTEN = {'gather': _gather, 'rem': _rem, 'stack': _stack}
REWRITTEN |= {'dot_general': _product, 'max': _relu}


class _Broadcast(NamedTuple):
  # Put off. `value` has the result's rank, with length 1 where it is repeated.
  value: Any
  equation: Any
  operand: Any


def folded(program: Program) -> Program:
  """Returns the same program with its constants computed."""

  def run(*inputs: jax.Array) -> tuple[jax.Array, ...]:
    # Tracers of jax2onnx, to which the equations are then bound.
    shaped = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    closed = jax.make_jaxpr(program)(*shaped)
    folder = _Folder()
    outputs = folder.run(closed.jaxpr, closed.consts, inputs)
    return tuple(map(folder.whole, outputs))

  return run


class _Folder:
  """Evaluates jaxprs: known arrays at once, tracers by their own trace."""

  def __init__(self):
    # By the id of the result, which is kept alive: Python would reuse its id.
    self.convolutions: dict[int, tuple[Any, Any, list[Any]]] = {}
    # Operations and their inputs, kept likewise -> results. Each layer computes
    # the mask of true sizes again.
    self.done: dict[tuple[Any, ...], tuple[list[Any], list[Any]]] = {}

  def run(
    self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]
  ) -> list[Any]:
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
      if isinstance(variable, Literal):
        return np.asarray(variable.val, variable.aval.dtype)
      return values[variable]

    for equation in jaxpr.eqns:
      inputs = [read(variable) for variable in equation.invars]
      outputs = self.apply(equation, inputs)
      values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]

  def apply(self, equation: Any, inputs: list[Any]) -> list[Any]:
    name = equation.primitive.name
    if name in NESTED:
      inner = equation.params[NESTED[name]]
      return self.run(
        getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ()), inputs
      )
    # What is computed of weights is not kept: it is large.
    if not any(isinstance(x, Tracer | _Broadcast) for x in inputs):
      return self.applied(name, equation, inputs)
    key = name, repr(equation.params), *map(_identity, inputs)
    if key not in self.done:
      self.done[key] = inputs, self.applied(name, equation, inputs)
    return self.done[key][1]

  def applied(self, name: str, equation: Any, inputs: list[Any]) -> list[Any]:
    # Further inputs are lengths that are data; such a broadcast stays.
    if name == 'broadcast_in_dim' and len(inputs) == 1:
      return [_later(equation, self.whole(inputs[0]))]
    # Together the operands may have the result's shape without broadcasts.
    if name in ELEMENTWISE and _span(equation, inputs):
      inputs = [*map(_compact, inputs)]
      if name == 'mul' and (scaled := self.scaled(*inputs)) is not None:
        return [scaled]
    if name == 'select_n' and (chosen := _always(inputs)) is not None:
      return [chosen]
    if name == 'select_n' and _masks(inputs):
      # Else the mask would be repeated for each channel.
      mask = lax.convert_element_type(inputs[0].value, inputs[2].dtype)
      return [lax.mul_p.bind(inputs[2], mask)]
    inputs = [self.whole(x) for x in inputs]
    # A split into one part is the identity.
    if name == 'split' and len(equation.outvars) == 1:
      return inputs
    traced = any(isinstance(x, Tracer) for x in inputs)
    rewrite = REWRITTEN.get(name) if traced else None
    other = rewrite and rewrite(equation, *inputs)
    outputs = _bind(equation, inputs) if other is None else [other]
    if _has_channels_of_kernel(equation, inputs):
      self.convolutions[id(outputs[0])] = outputs[0], equation, inputs
    return outputs

  def whole(self, value: Any) -> Any:
    """Carries out a broadcast that was put off."""
    if isinstance(value, _Broadcast):
      return _bind(value.equation, [value.operand])[0]
    return value

  def scaled(self, result: Any, gain: Any) -> Any:
    """A convolution with `gain` in its kernel; None if that is impossible."""
    if id(result) not in self.convolutions or isinstance(gain, Tracer):
      return None
    _, equation, (x, kernel) = self.convolutions[id(result)]
    gain = np.asarray(gain)
    # The gain must vary along the last axis only, which is the kernel's last.
    if gain.size != gain.shape[-1] or gain.shape[-1] != kernel.shape[-1]:
      return None
    # The unscaled one is dropped as dead code unless something else reads it.
    scaled = [x, np.asarray(kernel) * gain.reshape(-1)]
    return self.applied(equation.primitive.name, equation, scaled)[0]


def _has_channels_of_kernel(equation: Any, inputs: Sequence[Any]) -> bool:
  # A constant kernel (..., out). A 1x1 convolution may be a matrix product.
  if len(inputs) < 2 or isinstance(inputs[1], Tracer):
    return False
  numbers = equation.params.get('dimension_numbers')
  if equation.primitive.name == 'conv_general_dilated':
    last = np.ndim(inputs[1]) - 1
    return numbers.rhs_spec[0] == last and numbers.out_spec[1] == last
  if equation.primitive.name == 'dot_general':
    (_, contracted), batch = numbers
    return batch == ((), ()) and contracted == (0,) and np.ndim(inputs[1]) == 2
  return False


def _identity(value: Any) -> Any:
  if isinstance(value, _Broadcast):
    return _identity(value.value), str(value.equation.params['shape'])
  if isinstance(value, np.ndarray) and value.size <= MANY:
    return value.shape, str(value.dtype), value.tobytes()
  return id(value)


def _later(equation: Any, operand: Any) -> Any:
  shape = equation.params['shape']
  compact = [1] * len(shape)
  for axis, place in enumerate(equation.params['broadcast_dimensions']):
    compact[place] = operand.shape[axis]
  if isinstance(operand, Tracer):
    return _Broadcast(lax.reshape(operand, compact), equation, operand)
  return _Broadcast(np.asarray(operand).reshape(compact), equation, operand)


def _compact(value: Any) -> Any:
  return value.value if isinstance(value, _Broadcast) else value


def _span(equation: Any, inputs: Sequence[Any]) -> bool:
  shapes = [np.shape(_compact(x)) for x in inputs]
  shape = equation.outvars[0].aval.shape
  # The literals of an equation are scalars.
  shapes = [x for x in shapes if len(x) == len(shape)]
  return all(any(x[i] == n for x in shapes) for i, n in enumerate(shape))


def _masks(inputs: Sequence[Any]) -> bool:
  """Whether a broadcast mask chooses between an array of floats and zeros."""
  which, zeros, x, *more = inputs
  zeros = _compact(zeros)
  return (
    isinstance(which, _Broadcast)
    and isinstance(x, Tracer)
    and jnp.issubdtype(x.dtype, jnp.floating)
    and not (more or isinstance(zeros, Tracer) or np.any(zeros))
  )


def _bind(equation: Any, inputs: Sequence[Any]) -> list[Any]:
  # Constants may be broadcast to the symbolic batch, which is unknown.
  lengths = [n for out in equation.outvars for n in out.aval.shape]
  known = all(isinstance(n, int) for n in lengths) and not any(
    isinstance(x, Tracer) for x in inputs
  )
  # Without the context JAX would trace constants into the enclosing program.
  with jax.ensure_compile_time_eval() if known else contextlib.nullcontext():
    found = equation.primitive.bind(*inputs, **equation.params)
  found = list(found) if equation.primitive.multiple_results else [found]
  return [np.asarray(x) for x in found] if known else found


def _always(inputs: Sequence[Any]) -> Any:
  """The operand that a constant predicate chooses everywhere, or None."""
  which = _compact(inputs[0])
  if isinstance(which, Tracer) or len(np.unique(which)) > 1:
    return None
  return inputs[1 + int(np.ravel(which)[0])]
