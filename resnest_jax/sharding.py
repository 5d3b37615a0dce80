"""The device mesh, and the placement of arrays on it.

Axis `data` splits a batch by images, `spatial` the rows of each image.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resnest_jax.errors import UserError
from resnest_jax.models import implementations


def make_mesh(
  data: int = -1, spatial: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """All devices of all hosts, along `data` and `spatial`.

  `data` devices share the images of a batch (-1: all of them), `spatial` ones
  the rows of an image. Raises `UserError` if they are not all `devices`.
  """
  devices = devices or jax.devices()
  # An image stays on one host where possible: every layer exchanges halos.
  devices = sorted(devices, key=lambda d: (d.process_index, d.id))
  count = len(devices)
  if data == -1 and spatial <= count:
    data = count // spatial
  if data * spatial != count:
    fits = [n for n in range(1, count + 1) if count % n == 0]
    raise UserError(
      f'mesh.data={data} and mesh.spatial={spatial} do not make the {count} '
      f'devices there are; leave mesh.data at -1 and set mesh.spatial to one '
      f'of {", ".join(map(str, fits))}.'
    )
  return _mesh(np.asarray(devices).reshape(data, spatial))


def local_mesh() -> Mesh:
  """The devices of this host alone, along `data`: hosts evaluate apart."""
  return _mesh(np.asarray(jax.local_devices()).reshape(-1, 1))


def _mesh(devices: np.ndarray) -> Mesh:
  # With explicit axes each operation would have to state its placement.
  return Mesh(devices, ('data', 'spatial'), axis_types=2 * (AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device: parameters, statistics, counts."""
  return NamedSharding(mesh, P())


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Arrays that all hosts have alike, as global arrays on every device."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(replicated(mesh), x), tree
  )


def place_locally(tree: Any, mesh: Mesh) -> Any:
  """Whole copies on the devices of `local_mesh()`; replicas are not copied."""
  here = set(mesh.devices.flat)

  def place(x: Any) -> jax.Array:
    if not (
      isinstance(x, jax.Array)
      and x.is_fully_replicated
      and x.sharding.device_set >= here
    ):
      return jax.device_put(x, replicated(mesh))
    # A global array would make all hosts take part in each evaluation.
    copies = {shard.device: shard.data for shard in x.addressable_shards}
    return jax.make_array_from_single_device_arrays(
      x.shape, replicated(mesh), [copies[d] for d in mesh.devices.flat]
    )

  return jax.tree.map(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P('data'))


def batch_shardings(mesh: Mesh) -> dict[str, NamedSharding]:
  """The placement of a training batch: pixels are split over both axes."""
  pixels = NamedSharding(mesh, P('data', 'spatial'))
  whole = batch_sharding(mesh)
  return {'image': pixels, 'label': pixels, 'size': whole, 'photometric': whole}


def divisible_batch_size(batch_size: int, mesh: Mesh | None) -> int:
  """This process' share of a global batch, rounded up to suit its devices."""
  devices = 1 if mesh is None else mesh.shape['data']
  return -(-batch_size // (devices * jax.process_count())) * devices


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Raises `UserError` if the devices cannot share a batch evenly."""
  devices = mesh.shape['data']
  if batch_size % devices:
    raise UserError(
      f'a batch of {batch_size} cannot be divided over {devices} devices; '
      f'set the batch size to a multiple of {devices}.'
    )


def check_rows(height: int, output_stride: int, mesh: Mesh) -> None:
  """Raises `UserError` if the devices cannot share the crop's rows evenly."""
  parts = mesh.shape['spatial']
  multiple = parts * max(output_stride, 8)
  if parts > 1 and height % multiple:
    raise UserError(
      f'{height} rows cannot be divided over mesh.spatial={parts} devices at '
      f'output stride {output_stride}; set the height in data.crop_size to a '
      f'multiple of {multiple}, or mesh.spatial to 1.'
    )


@contextlib.contextmanager
def shared_rows(mesh: Mesh) -> Iterator[None]:
  """Decorates what is traced for a mesh whose devices may share rows."""
  if mesh.shape['spatial'] == 1:
    yield
    return
  # The abstract mesh lets losses tile each device's own rows. For the gradient
  # of a window's maximum XLA would gather whole feature maps.
  with (
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    implementations.use(pooling='slices', wide='convolution'),
  ):
    yield


def host_share(mesh: Mesh) -> tuple[int, int]:
  """This host reads the i-th of n equal runs of every batch: (i, n)."""
  # Hosts that share the rows of the same images have the same i.
  spatial, here = mesh.shape['spatial'], len(mesh.local_devices)
  if spatial % here and here % spatial:
    raise UserError(
      f'mesh.spatial={spatial} does not fit {here} devices a host; one of the '
      'two numbers has to be a multiple of the other.'
    )
  images = max(here // spatial, 1)  # This host's devices hold rows of so many.
  owners = [device.process_index for device in mesh.devices.flat]
  first = owners.index(jax.process_index()) // spatial
  return first // images, mesh.shape['data'] // images


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Places this host's images, those of `host_share`, in the global batch."""
  # Of a classifier, whose images are small, no row is apart from others.
  of_pixels = {} if 'shift' in batch else batch_shardings(mesh)
  shardings = {key: of_pixels.get(key, batch_sharding(mesh)) for key in batch}
  if all(sharding.is_fully_addressable for sharding in shardings.values()):
    return jax.device_put(batch, shardings)
  # JAX's own assembly from local arrays fails where hosts share rows.
  run, runs = host_share(mesh)

  def place(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
    def part(index):
      first, last, _ = index[0].indices(runs * len(local))
      offset = run * len(local)
      return local[(slice(first - offset, last - offset), *index[1:])]

    shape = (runs * len(local), *local.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  return jax.tree.map(place, dict(batch), shardings)
