"""The devices that share a batch, and what they may send to each other."""

import re

import jax
import jax.numpy as jnp
from golden.reference import QUICK

from resnest_jax.sharding import batch_sharding, make_mesh, replicated

SENT = re.compile('all-reduce|all-gather|all-to-all|collective-permute')


def mesh_of(devices):
  """A mesh of so many devices, each with a part of the batch."""
  return make_mesh(devices=jax.devices()[:devices])


def assert_local(program):
  """The batch is summed over, and never collected or exchanged."""
  assert set(SENT.findall(program.as_text())) == {'all-reduce'}


def assert_gradients_local(apply, variables, x):
  """The same of the gradients of `apply(variables, x)` on four devices."""
  places = replicated(mesh_of(4)), batch_sharding(mesh_of(4))
  gradients = jax.grad(lambda *both: jnp.sum(apply(*both)[0] ** 2), (0, 1))
  program = jax.jit(gradients, in_shardings=places, out_shardings=places)
  assert_local(program.lower(variables, x).compile(QUICK))
