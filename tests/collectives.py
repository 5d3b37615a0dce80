"""The devices that share a batch, and what they may send to each other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from golden.reference import QUICK
from jax.sharding import Mesh

from resnest_jax.sharding import batch_sharding, make_mesh, replicated


def mesh_of(devices: int) -> Mesh:
  """A mesh of so many devices, each with a part of the batch."""
  return make_mesh(devices=jax.devices()[:devices])


def assert_local(program: Any) -> None:
  """The batch is summed over, and never collected or exchanged."""
  text = program.as_text()
  assert 'all-reduce' in text
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text


def assert_gradients_local(apply: Callable, variables: Any, x: Any) -> None:
  """The same of the gradients of `apply(variables, x)` on four devices."""
  mesh = mesh_of(4)
  whole, split = replicated(mesh), batch_sharding(mesh)
  gradients = jax.jit(
    jax.grad(lambda *both: jnp.sum(apply(*both)[0] ** 2), (0, 1)),
    in_shardings=(whole, split),
    out_shardings=(whole, split),
  )
  assert_local(gradients.lower(variables, x).compile(QUICK))
