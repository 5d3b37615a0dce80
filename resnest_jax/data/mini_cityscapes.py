"""The command of `mini.cityscapes_mini`."""

from resnest_jax.errors import run_module

if __name__ == '__main__':
  run_module('resnest_jax.data.mini.cityscapes_mini')
