"""StableHLO by `jax.export`: one file for CPU, CUDA and TPU."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

from resnest_jax.export.checks import Runner
from resnest_jax.export.program import Program

PLATFORMS = ('cpu', 'cuda', 'tpu')


def write_stablehlo(
  path: Path, program: Program, size: tuple[int, int]
) -> None:
  """Writes a program of pictures of one size, for any number of them."""
  (batch,) = export.symbolic_shape('b')
  images = jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8)
  exported = export.export(jax.jit(program), platforms=PLATFORMS)(images)
  path.write_bytes(exported.serialize())


def read_stablehlo(path: Path) -> Runner:
  """The program in a file, compiled as it is used."""
  exported = export.deserialize(bytearray(path.read_bytes()))
  return jax.jit(exported.call)
