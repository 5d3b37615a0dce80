"""The device mesh, and how arrays lie on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resnest_jax.errors import UserError


def make_mesh() -> Mesh:
  """All devices along `data`; `spatial` (image rows) has one."""
  devices = np.asarray(jax.devices()).reshape(-1, 1)
  return Mesh(devices, ('data', 'spatial'))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device: parameters, statistics, counts."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The first axis over the devices, the rest whole."""
  return NamedSharding(mesh, PartitionSpec('data'))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Raises `UserError` where the devices cannot share a batch evenly."""
  devices = mesh.shape['data']
  if batch_size % devices:
    raise UserError(
      f'a batch of {batch_size} cannot be divided over {devices} devices; '
      f'set the batch size to a multiple of {devices}.'
    )


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """This process' rows of a batch, placed on the mesh as global arrays."""
  sharding = batch_sharding(mesh)
  return {
    key: jax.make_array_from_process_local_data(sharding, value)
    for key, value in batch.items()
  }
