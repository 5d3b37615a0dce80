"""ONNX by jax2onnx, run by onnxruntime."""

import importlib
import logging
import pkgutil
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import jax2onnx
import jax2onnx.plugins.jax.lax as lax_plugins
import numpy as np
import onnx
import onnxruntime
from jax import export
from jax2onnx.plugins import plugin_system

from resnest_jax.errors import UserError
from resnest_jax.export.checks import INSTALL_JAX2ONNX, JAX2ONNX, Runner
from resnest_jax.export.folding import folded
from resnest_jax.export.program import Program

# The first in which all operations that jax2onnx writes are defined.
OPSET = 18
OUTPUTS = ('labels', 'probabilities')


def write_onnx(
  path: Path, program: Program, size: tuple[int, int], probabilities: bool
) -> None:
  """Writes a program of pictures of one size, for any number of them.

  Input `images`, outputs `OUTPUTS`, the second if it is asked for.

  Raises:
    UserError: jax2onnx cannot do it.
  """
  _import_plugins()
  # It says of each value without a type that it has none.
  logging.getLogger('onnx_ir').setLevel(logging.ERROR)
  (batch,) = export.symbolic_shape('b')
  # What is wrong with the network itself is not to be blamed on jax2onnx.
  jax.eval_shape(program, jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8))
  try:
    model = jax2onnx.to_onnx(
      folded(program),
      inputs=[jax.ShapeDtypeStruct(('b', *size, 3), jnp.uint8)],
      model_name='resnest_jax',
      opset=OPSET,
      input_names=['images'],
      output_names=list(OUTPUTS[: 1 + probabilities]),
    )
  except Exception as error:  # Of many kinds: it depends on versions.
    first_line = str(error).strip().partition('\n')[0]
    installed, remedy = version('jax2onnx'), ''
    if installed != JAX2ONNX:
      remedy = f' Version {JAX2ONNX} is tried: {INSTALL_JAX2ONNX}.'
    raise UserError(
      f'jax2onnx {installed} cannot translate the network '
      f'({type(error).__name__}: {first_line}).{remedy} Without it: leave '
      'the format out by --formats.'
    ) from error
  onnx.save(model, path)
  onnx.checker.check_model(path)


def read_onnx(path: Path) -> Runner:
  """The model in a file, on the CPU."""
  session = onnxruntime.InferenceSession(
    path, providers=['CPUExecutionProvider']
  )

  def run(images: np.ndarray) -> list[np.ndarray]:
    return session.run(None, {'images': images})

  return run


def _import_plugins() -> None:
  """Imports what translates operations of `jax.lax`, and `jnp.pad`.

  By itself jax2onnx imports the translations of whole libraries of layers,
  which takes long, as some compute at import. `lax.pad` it cannot translate
  where the batch is a symbol, `jnp.pad` it can.
  """
  names = [each.name for each in pkgutil.iter_modules(lax_plugins.__path__)]
  for name in (*(f'lax.{each}' for each in names), 'numpy.pad'):
    importlib.import_module(f'jax2onnx.plugins.jax.{name}')
  plugin_system._already_imported_plugins = True
