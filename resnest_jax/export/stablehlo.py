"""StableHLO files by `jax.export`, each for CPU, CUDA and TPU."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import jax
from jax import export

from resnest_jax.errors import UserError
from resnest_jax.export.card import Export
from resnest_jax.export.checks import Runner
from resnest_jax.export.program import Program, symbolic
from resnest_jax.untrusted import parse_json
from resnest_jax.weights.files import ABOUT

PLATFORMS = ('cpu', 'cuda', 'tpu')


def write_stablehlo(
  path: Path, program: Program, inputs: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
  """Writes a program; `inputs` are as of `symbolic`."""
  # Else JAX notes with each operation where the code lies on this machine.
  jax.config.update('jax_hlo_source_file_canonicalization_regex', '.*/')
  lower = export.export(jax.jit(program), platforms=PLATFORMS)
  path.write_bytes(lower(*symbolic(inputs)).serialize())


def read_stablehlo(path: Path) -> Runner:
  """Loads a program, which is compiled when it is first called.

  Raises `UserError` if this JAX refuses it, now or at the first call.
  """
  content = bytearray(path.read_bytes())
  try:
    program = jax.jit(export.deserialize(content).call)
  except ImportError:  # flatbuffers is missing; the file may be good.
    raise
  except Exception as error:  # A damaged file raises errors of many kinds.
    raise _refused(path, error) from error

  def run(*inputs: jax.Array) -> tuple[jax.Array, ...]:
    # Only compiling shows that a readable file has StableHLO of a newer JAX.
    try:
      return program(*inputs)
    except jax.errors.JaxRuntimeError as error:
      if 'deserialize StableHLO' not in str(error):
        raise
      raise _refused(path, error) from error

  return run


def _refused(path: Path, error: Exception) -> UserError:
  first_line = str(error).strip().partition('\n')[0]
  return UserError(
    f'JAX {jax.__version__} does not read {path} ({type(error).__name__}: '
    f'{first_line}).{_history(path)} python export.py --renew {path.parent} '
    'writes it again, from the weights in its folder; or use the release of '
    'JAX that wrote it.'
  )


def _history(path: Path) -> str:
  # Unless it is a file of somebody else, or of a version that recorded none.
  with contextlib.suppress(Exception):
    about = parse_json((path.parent / ABOUT).read_bytes(), ABOUT)
    (entry,) = (each for each in about['exports'] if each['file'] == path.name)
    return f' {ABOUT} has of it: {Export.of(entry).written.sentence()}'
  return ''
