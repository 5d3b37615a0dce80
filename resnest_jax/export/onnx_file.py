"""ONNX files, written by jax2onnx and run by onnxruntime."""

import importlib
import logging
import pkgutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import jax2onnx
import jax2onnx.plugins.jax.lax as lax_plugins
import onnx
import onnxruntime
from jax2onnx.plugins import plugin_system

from resnest_jax.errors import UserError
from resnest_jax.export.checks import INSTALL_JAX2ONNX, JAX2ONNX, Runner
from resnest_jax.export.folding import folded
from resnest_jax.export.program import Program, symbolic
from resnest_jax.files import plain_name

OPSET = 18  # The first with all operators that jax2onnx writes.


def write_onnx(
  path: Path,
  program: Program,
  inputs: Mapping[str, jax.ShapeDtypeStruct],
  outputs: Sequence[str],
) -> None:
  """Writes a program; `inputs` are as of `symbolic`.

  Inputs and outputs have the given names. Raises `UserError` if jax2onnx cannot
  translate the program.
  """
  # By itself jax2onnx imports whole libraries, some of which compute at import.
  # `jnp.pad` is there because `lax.pad` fails with a symbolic batch, the others
  # are of `folded`.
  names = [f'lax.{x.name}' for x in pkgutil.iter_modules(lax_plugins.__path__)]
  for name in (*names, 'numpy.pad', 'numpy.matmul', 'nn.relu'):
    importlib.import_module(f'jax2onnx.plugins.jax.{name}')
  # Tells jax2onnx that nothing is left to import.
  plugin_system._already_imported_plugins = True
  # onnx_ir warns of every value without a type.
  logging.getLogger('onnx_ir').setLevel(logging.ERROR)
  # An error of the network itself is not reported as jax2onnx's.
  jax.eval_shape(program, *symbolic(inputs))
  try:
    model = jax2onnx.to_onnx(
      folded(program),
      inputs=list(inputs.values()),
      model_name='resnest_jax',
      opset=OPSET,
      input_names=list(inputs),
      output_names=list(outputs),
    )
  except Exception as error:  # Its kind depends on jax2onnx's version.
    first_line = str(error).strip().partition('\n')[0]
    installed, remedy = version('jax2onnx'), ''
    if installed != JAX2ONNX:
      remedy = f' Version {JAX2ONNX} is tested: {INSTALL_JAX2ONNX}.'
    raise UserError(
      f'jax2onnx {installed} cannot translate the network '
      f'({type(error).__name__}: {first_line}).{remedy} To export without '
      'ONNX, leave it out of --formats.'
    ) from error
  onnx.save(model, path)
  with plain_name(path) as name:
    onnx.checker.check_model(name)


def read_onnx(model: Path | bytes) -> Runner:
  """Loads a file, or its content, to run on the CPU."""
  # As bytes: onnxruntime does not read files of all names.
  content = model if isinstance(model, bytes) else model.read_bytes()
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # Errors.
  session = onnxruntime.InferenceSession(
    content, options, providers=['CPUExecutionProvider']
  )
  names = [each.name for each in session.get_inputs()]
  return lambda *inputs: session.run(
    None, dict(zip(names, inputs, strict=True))
  )
