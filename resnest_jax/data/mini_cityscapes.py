"""The command of `mini.cityscapes_mini`."""

import importlib

from resnest_jax.errors import run

if __name__ == '__main__':
  # Imported late, so that Ctrl-C meanwhile is told in a line.
  run(
    lambda: importlib.import_module(
      'resnest_jax.data.mini.cityscapes_mini'
    ).main()
  )
