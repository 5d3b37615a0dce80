"""The command of `mini.ade20k_mini`."""

from resnest_jax.errors import run_module

if __name__ == '__main__':
  run_module('resnest_jax.data.mini.ade20k_mini')
