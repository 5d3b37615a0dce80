"""The command of `mini.ade20k_mini`."""

from resnest_jax.data.mini.ade20k_mini import main
from resnest_jax.errors import run

if __name__ == '__main__':
  run(main)
