"""Computes what does not depend on the input before a program is converted.

`jax2onnx` translates operation by operation. Slices of weights, the matrices
of resizes and the arithmetic of normalisations would all become nodes, and
every channel's constant an array as large as the picture. Here nested
functions are inlined, what is constant is computed, broadcasting is left to
the operations, and the gain of a normalisation goes into the kernel of the
convolution before it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from resnest_jax.export.program import Program
from resnest_jax.jax_private import Literal, Tracer

# Operations that stand for a function, and the parameter that holds it.
NESTED = {
  'jit': 'jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'remat2': 'jaxpr',
}
# Operations that bring their operands to a common shape by themselves.
ELEMENTWISE = ('add', 'sub', 'mul', 'div', 'max', 'min')


class _Broadcast(NamedTuple):
  """A value that is to be repeated along the axes where its length is 1."""

  value: Any
  equation: Any
  operand: Any


def folded(program: Program) -> Program:
  """The same program, with all that is constant computed."""

  def run(images: jax.Array) -> tuple[jax.Array, ...]:
    shaped = jax.ShapeDtypeStruct(images.shape, images.dtype)
    closed = jax.make_jaxpr(program)(shaped)
    folder = _Folder()
    outputs = folder.run(closed.jaxpr, closed.consts, [images])
    return tuple(map(folder.whole, outputs))

  return run


class _Folder:
  """Runs jaxprs: arrays at once, tracers by what traces them."""

  def __init__(self):
    # Of a convolution's result, by its id: the equation and its operands.
    # The results are kept, too, so that no other gets the same id.
    self.convolutions: dict[int, tuple[Any, Any, list[Any]]] = {}

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
    """The results of one equation."""
    name = equation.primitive.name
    if name in NESTED:
      inner = equation.params[NESTED[name]]
      return self.run(
        getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ()), inputs
      )
    if name == 'broadcast_in_dim' and len(inputs) == 1:
      return [_later(equation, self.whole(inputs[0]))]
    if name in ELEMENTWISE and _one_is_whole(equation, inputs):
      inputs = [x.value if isinstance(x, _Broadcast) else x for x in inputs]
      if name == 'mul':
        scaled = self.scaled(*inputs)
        if scaled is not None:
          return [scaled]
    if name == 'select_n' and (chosen := _always(inputs)) is not None:
      return [chosen]
    inputs = [self.whole(x) for x in inputs]
    if name == 'split' and len(equation.outvars) == 1:
      return inputs
    outputs = _bind(equation, inputs)
    if _has_channels_of_kernel(equation, inputs):
      self.convolutions[id(outputs[0])] = outputs[0], equation, inputs
    return outputs

  def whole(self, value: Any) -> Any:
    """Carries out a broadcast that was put off."""
    if isinstance(value, _Broadcast):
      return _bind(value.equation, [value.operand])[0]
    return value

  def scaled(self, result: Any, gain: Any) -> Any:
    """A convolution times a constant a channel, as one; None: it is not."""
    if id(result) not in self.convolutions or isinstance(gain, Tracer):
      return None
    _, equation, (x, kernel) = self.convolutions[id(result)]
    gain = np.asarray(gain)
    if gain.size != gain.shape[-1] or gain.shape[-1] != kernel.shape[-1]:
      return None
    return _bind(equation, [x, np.asarray(kernel) * gain.reshape(-1)])[0]


def _has_channels_of_kernel(equation: Any, inputs: Sequence[Any]) -> bool:
  """Whether it is a convolution with a constant kernel (..., out).

  Or the product that a 1x1 convolution is. The result's last axis is `out`.
  """
  if len(inputs) < 2 or isinstance(inputs[1], Tracer):
    return False
  numbers = equation.params.get('dimension_numbers')
  if equation.primitive.name == 'conv_general_dilated':
    last = np.ndim(inputs[1]) - 1
    return numbers.rhs_spec[0] == last and numbers.out_spec[1] == last
  if equation.primitive.name == 'dot_general':
    contracting, batch = numbers
    return (
      batch == ((), ()) and contracting[1] == (0,) and np.ndim(inputs[1]) == 2
    )
  return False


def _later(equation: Any, operand: Any) -> Any:
  """A broadcast that is only carried out if it has to be."""
  shape = equation.params['shape']
  compact = [1] * len(shape)
  for axis, place in enumerate(equation.params['broadcast_dimensions']):
    compact[place] = operand.shape[axis]
  if isinstance(operand, Tracer):
    value = operand
    if tuple(compact) != operand.shape:
      value = lax.reshape(operand, compact)
  else:
    value = np.asarray(operand).reshape(compact)
  return _Broadcast(value, equation, operand)


def _one_is_whole(equation: Any, inputs: Sequence[Any]) -> bool:
  """Whether an operand has the shape of the result by itself."""
  shape = equation.outvars[0].aval.shape
  return any(
    not isinstance(x, _Broadcast) and np.shape(x) == shape for x in inputs
  )


def _bind(equation: Any, inputs: Sequence[Any]) -> list[Any]:
  """Carries out an operation, now if all operands are known."""
  lengths = [n for out in equation.outvars for n in out.aval.shape]
  known = all(isinstance(n, int) for n in lengths) and not any(
    isinstance(x, Tracer) for x in inputs
  )
  if known:
    with jax.ensure_compile_time_eval():
      found = equation.primitive.bind(*inputs, **equation.params)
  else:
    found = equation.primitive.bind(*inputs, **equation.params)
  found = list(found) if equation.primitive.multiple_results else [found]
  return [np.asarray(x) for x in found] if known else found


def _always(inputs: Sequence[Any]) -> Any:
  """What a constant predicate chooses everywhere; None: it depends."""
  which = inputs[0].value if isinstance(inputs[0], _Broadcast) else inputs[0]
  if isinstance(which, Tracer) or len(np.unique(which)) > 1:
    return None
  return inputs[1 + int(np.ravel(which)[0])]
