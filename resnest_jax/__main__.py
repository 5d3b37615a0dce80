"""The command `resnest-jax`: `resnest-jax train FLAGS` is `train.py FLAGS`."""

import importlib
import importlib.util
import sys
import types

from resnest_jax import __version__
from resnest_jax.errors import UserError, run
from resnest_jax.shipped import shipped

SCRIPTS = {
  'train': 'trains a network',
  'eval': 'scores a network on a split',
  'predict': 'predicts pictures and videos',
  'export': 'writes StableHLO, ONNX, safetensors, mmsegmentation files',
}
# Name -> module and what it does.
MODULES = {
  'prepare': ('data.prepare', 'prepares data sets, and converts masks'),
  'doctor': ('data.doctor.__main__', 'examines images and masks'),
  'convert': ('weights.convert', 'converts weights from and to other projects'),
  'demo': ('demo.serve', 'serves a page to try a network on pictures'),
}
COMMANDS = SCRIPTS | {name: what for name, (_, what) in MODULES.items()}
_USAGE = """\
usage: resnest-jax COMMAND FLAGS

{}

resnest-jax COMMAND --help lists the flags. configs/folder.py and the
rows next to it are found from any folder."""


def main() -> None:
  name, *arguments = sys.argv[1:] or ['--help']
  if name in ('-h', '--help'):
    lines = (f'  {name:8} {what}' for name, what in COMMANDS.items())
    print(_USAGE.format('\n'.join(lines)))
    return
  if name == '--version':
    print(__version__)
    return
  if name not in COMMANDS:
    raise UserError(
      f'there is no command {name!r}; there are {", ".join(COMMANDS)}.'
    )
  # argparse takes the program's name from there, for --help and errors.
  sys.argv = [f'resnest-jax {name}', *arguments]
  module = _load(name)
  stopped = getattr(module, 'STOPPED', None)
  run(module.main, *([stopped] if stopped else []))


def _load(name: str) -> types.ModuleType:
  if name in MODULES:
    return importlib.import_module(f'resnest_jax.{MODULES[name][0]}')
  # By path, because the scripts of a clone belong to no package.
  spec = importlib.util.spec_from_file_location(
    f'resnest_jax.scripts.{name}', shipped(f'{name}.py')
  )
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  return script


def start() -> None:
  run(main)


if __name__ == '__main__':
  start()
