"""Devices that are not there, for their compilers.

`v5e:4x4` are 16 chips of a TPU v5e, `h200:8` eight NVIDIA H200. XLA's TPU
compiler comes with libtpu, that for NVIDIA GPUs with jax's CUDA plugin; both
run on a CPU (requirements-ahead.txt). `cpu` are the CPU devices that are there.
"""

import math
import re
from typing import Any, NamedTuple

from resnest_jax.errors import UserError


class Chip(NamedTuple):
  """A device, by its maker's figures.

  Attributes:
    platform: 'tpu' or 'cuda'.
    memory: GB; of a TPU, what XLA does not keep for itself.
    teraflops: dense bfloat16 products, 1e12 operations/s.
    link: GB/s that a device can send to others in its slice or machine.
    network: GB/s to those of other machines.
    host: devices of one host.
    operations: of bfloat16 products, a cycle; 0: not known.
  """

  platform: str
  memory: float
  teraflops: float
  link: float
  network: float
  host: int
  operations: int = 0

  @property
  def hertz(self) -> float:
    """The clock's rate."""
    return 1e12 * self.teraflops / self.operations


# Google's pages on TPU versions (a slice is one network), NVIDIA's on the H200
# (NVLink one way; a 400 Gbit/s adapter for each). Devices of a v3 are the two
# cores of a chip. Operations are those of units of 128 x 128 (v6e: 256 x 256)
# multiply-adds: two in a v3's core, four in a v5e and v6e, eight in a v5p.
CHIPS = {
  'v3': Chip('tpu', 16 * 1.0737, 61.5, 164, 164, 8, 2 * 2 * 128**2),
  'v4': Chip('tpu', 32 * 1.0737, 275, 300, 300, 4),
  'v5e': Chip('tpu', 15.75 * 1.0737, 197, 200, 200, 4, 2 * 4 * 128**2),
  'v5p': Chip('tpu', 95 * 1.0737, 459, 600, 600, 4, 2 * 8 * 128**2),
  'v6e': Chip('tpu', 31.25 * 1.0737, 918, 400, 400, 4, 2 * 4 * 256**2),
  'h200': Chip('cuda', 141, 989, 450, 50, 8),
}
NAMES = (
  'v5e:1x1',
  'v5e:2x2',
  'v5e:4x4',
  'v5e:16x16',
  'v6e:2x2',
  'v5p:2x2x1',
  'v4:2x2x1',
  'h200:1',
  'h200:8',
  'cpu',
)

# Names of platforms, as devices and as `implementations` have them.
PLATFORMS = {'cpu': 'cpu', 'cuda': 'gpu', 'gpu': 'gpu', 'tpu': 'tpu'}

# What XLA wants to know of an H200 to compile for one that is not there.
_H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: %d
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def split_name(name: str) -> tuple[str, str]:
  """'v5e:2x2' -> ('v5e', '2x2').

  Raises:
    UserError: there is no such chip, or its number is not given.
  """
  kind, _, shape = name.partition(':')
  if name == 'cpu':
    return 'cpu', ''
  if kind not in CHIPS or not re.fullmatch(r'\d+(x\d+){0,2}', shape):
    raise UserError(
      f'--topologies {name}: there is no such one; write cpu, or a chip of '
      f'{", ".join(CHIPS)}, a colon and how many, as {", ".join(NAMES[:-1])}.'
    )
  return kind, shape


def count_devices(name: str) -> int:
  """How many devices a topology has."""
  kind, shape = split_name(name)
  if kind == 'cpu':
    import jax

    return jax.device_count('cpu')
  return math.prod(map(int, shape.split('x')))


def find_devices(name: str, memory: float | None = None) -> list[Any]:
  """The devices of a topology, in the order of a mesh.

  Args:
    name: see `NAMES`.
    memory: bytes of a GPU, instead of its own.

  Raises:
    UserError: see `split_name`; or there is no compiler for them.
  """
  import jax
  from jax.experimental import topologies

  kind, _ = split_name(name)
  if kind == 'cpu':
    return jax.devices('cpu')
  chip, count = CHIPS[kind], count_devices(name)
  try:
    if chip.platform == 'tpu':
      more = {}
      if count == 1:
        more['chips_per_host_bounds'] = [1, 1, 1]
      found = topologies.get_topology_desc(
        platform='tpu', topology_name=name, **more
      ).devices
    else:
      memory = memory or chip.memory * 1e9
      found = topologies.get_topology_desc(
        platform='cuda',
        topology_name=kind,
        topology=f'1x1x{count}',
        target_config=_H200 % memory,
      ).devices
  except Exception as error:
    raise UserError(
      f'--topologies {name}: no compiler here makes anything for it ({error}). '
      'Either pip install -r requirements-ahead.txt is still to be done, or '
      f'there is no such slice; known to work are {", ".join(NAMES)}.'
    ) from error
  return sorted(found, key=lambda device: device.id)
