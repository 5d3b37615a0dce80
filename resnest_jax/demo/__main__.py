"""The command of `demo.serve`."""

from resnest_jax.demo.serve import STOPPED, main
from resnest_jax.errors import run

if __name__ == '__main__':
  run(main, STOPPED)
