"""The command `resnest-jax`: `resnest-jax train FLAGS` is `train.py FLAGS`."""

import importlib.util
import sys

from resnest_jax import __version__
from resnest_jax.errors import UserError, run
from resnest_jax.shipped import shipped

COMMANDS = {
  'train': 'trains a network',
  'eval': 'scores a network on a split',
  'predict': 'predicts pictures and videos',
  'export': 'writes StableHLO, ONNX, safetensors, mmsegmentation files',
}
_USAGE = """\
usage: resnest-jax COMMAND FLAGS

{}

resnest-jax COMMAND --help lists the flags. configs/folder.py and the
rows next to it are found from any folder. Data is prepared by
python -m resnest_jax.data.prepare."""


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
  # By path, because the scripts of a clone belong to no package.
  spec = importlib.util.spec_from_file_location(
    f'resnest_jax.scripts.{name}', shipped(f'{name}.py')
  )
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  # argparse takes the program's name from there, for --help and errors.
  sys.argv = [f'resnest-jax {name}', *arguments]
  stopped = getattr(script, 'STOPPED', None)
  run(script.main, *([stopped] if stopped else []))


def start() -> None:
  run(main)


if __name__ == '__main__':
  start()
