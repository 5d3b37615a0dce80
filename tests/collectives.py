"""The devices that share a batch, and what they may send to each other."""

from typing import Any

import jax
from jax.sharding import Mesh

from resnest_jax.training.sharding import make_mesh


def mesh_of(devices: int) -> Mesh:
  """A mesh of so many devices, each with a part of the batch."""
  return make_mesh(devices=jax.devices()[:devices])


def assert_local(program: Any) -> None:
  """The batch is summed over, and never collected or exchanged."""
  text = program.as_text()
  assert 'all-reduce' in text
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text
