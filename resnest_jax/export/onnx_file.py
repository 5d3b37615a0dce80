"""ONNX files, written by jax2onnx and run by onnxruntime."""

import importlib
import logging
import pkgutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import jax2onnx
import jax2onnx.plugins.jax.lax as lax_plugins
import onnx
import onnxruntime
from jax import export
from jax2onnx.plugins import plugin_system

from resnest_jax.errors import UserError
from resnest_jax.export.checks import INSTALL_JAX2ONNX, JAX2ONNX, Runner
from resnest_jax.export.folding import folded
from resnest_jax.export.program import Program
from resnest_jax.files import plain_name

OPSET = 18  # The first with all operators that jax2onnx writes.


def write_onnx(
  path: Path,
  program: Program,
  picture: jax.ShapeDtypeStruct,
  outputs: Sequence[str],
) -> None:
  """Writes a program for any number of pictures of one shape, (H, W, C).

  The input is `images`; the outputs have the given names. Raises `UserError` if
  jax2onnx cannot translate the program.
  """
  _import_plugins()
  # onnx_ir warns of every value without a type.
  logging.getLogger('onnx_ir').setLevel(logging.ERROR)
  (batch,) = export.symbolic_shape('b')
  # An error of the network itself is not reported as jax2onnx's.
  jax.eval_shape(program, picture.update(shape=(batch, *picture.shape)))
  try:
    model = jax2onnx.to_onnx(
      folded(program),
      inputs=[picture.update(shape=('b', *picture.shape))],
      model_name='resnest_jax',
      opset=OPSET,
      input_names=['images'],
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


def read_onnx(path: Path) -> Runner:
  """Loads a model to run on the CPU."""
  with plain_name(path) as name:
    session = onnxruntime.InferenceSession(
      name, providers=['CPUExecutionProvider']
    )
  return lambda images: session.run(None, {'images': images})


def _import_plugins() -> None:
  # By itself jax2onnx imports whole libraries, some of which compute at import.
  # `jnp.pad` is there because `lax.pad` fails with a symbolic batch.
  names = [each.name for each in pkgutil.iter_modules(lax_plugins.__path__)]
  for name in (*(f'lax.{each}' for each in names), 'numpy.pad'):
    importlib.import_module(f'jax2onnx.plugins.jax.{name}')
  # Tells jax2onnx that nothing is left to import.
  plugin_system._already_imported_plugins = True
