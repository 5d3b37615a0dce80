"""One step of several processes; the first one writes what came out.

python tests/training/step_of_hosts.py OUT.npz SPATIAL --coordinator ...
"""

import argparse

import jax
import numpy as np
from training.one_step import step_on

from resnest_jax.distributed import join, messages
from resnest_jax.sharding import make_mesh


def main():
  parser = join.add_flags(argparse.ArgumentParser())
  parser.add_argument('out')
  parser.add_argument('spatial', type=int)
  flags = parser.parse_args()
  jax.config.update('jax_enable_x64', True)
  with join.joined(flags, {'spatial': flags.spatial}):
    arrays, _ = step_on(make_mesh(spatial=flags.spatial))
    if messages.is_first():
      np.savez(flags.out, **arrays)


if __name__ == '__main__':
  main()
