"""The command of `mini.cityscapes_mini`."""

from resnest_jax.data.mini.cityscapes_mini import main
from resnest_jax.errors import run

if __name__ == '__main__':
  run(main)
