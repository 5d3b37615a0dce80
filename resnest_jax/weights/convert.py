"""Converts weights between mmsegmentation, the authors, timm and this project.

    python -m resnest_jax.weights.convert ade20k_pspnet --out weights/pspnet
    python -m resnest_jax.weights.convert runs/pspnet --out pth --to mmseg

Every tensor has to find its place: what is missing or left over is an error,
and what is not wanted is left out by its name (--drop fc). The model is
recognised from the names and shapes. The output folder holds the weights and
about.json: the model with its dilation rule, class names, normalisation and
where the weights come from. This also stands inside the weight file.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from resnest_jax.errors import UserError, run
from resnest_jax.weights.files import check_new, write_weights
from resnest_jax.weights.infer import Description
from resnest_jax.weights.pretrained import (
  NORMALIZATION,
  Weights,
  load_weights,
  remaining,
)
from resnest_jax.weights.state_dict import (
  KINDS,
  export_state_dict,
  import_state_dict,
  variable_shapes,
  without,
)


def main(arguments: Sequence[str] | None = None) -> None:
  """Reads the command line, converts, says what was done."""
  flags = _parser().parse_args(arguments)
  check_new(flags.out)
  if (Path(flags.source) / 'checkpoints').is_dir():
    weights = _of_run(Path(flags.source), flags.checkpoint, flags.drop)
  else:
    weights = load_weights(
      flags.source, drop=flags.drop, backbone=flags.backbone
    )
  model = weights.description.create()
  variables = import_state_dict(model, weights.state_dict)
  exported = export_state_dict(model, variables, flags.to)
  files = write_weights(flags.out, flags.to, exported, weights.about())
  _report(weights, variables, files)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m resnest_jax.weights.convert',
    description=__doc__.splitlines()[0],
    epilog='RESNEST_JAX_CACHE names the folder of downloads; '
    'RESNEST_JAX_OFFLINE=1 forbids them.',
  )
  parser.add_argument(
    'source',
    help='a file, a folder written by this command, the workdir of a '
    'training, a published name (resnest101, ade20k_pspnet, ...), an address, '
    'or hf://owner/repository/file',
  )
  parser.add_argument(
    '--out', required=True, type=Path, metavar='DIR', help='a new folder'
  )
  parser.add_argument(
    '--to',
    choices=KINDS,
    default='ours',
    help='whose names to write; mmseg is a .pth and needs the package torch, '
    'the others are safetensors (default: ours)',
  )
  parser.add_argument(
    '--drop',
    nargs='+',
    default=[],
    metavar='NAME',
    help='modules of the source to leave out, for instance: fc',
  )
  parser.add_argument(
    '--backbone',
    metavar='NAME',
    help="the source's backbone, where its file name does not tell: "
    'resnest50_fast_2s1x64d has the shapes of resnest50',
  )
  parser.add_argument(
    '--checkpoint',
    default='latest',
    help='of a workdir: latest (default), best, or a step',
  )
  return parser


def _of_run(workdir: Path, which: str, drop: list[str]) -> Weights:
  """The weights of a training, by the names of their paths."""
  from resnest_jax.training.checkpoints import restore_variables

  try:
    config = json.loads((workdir / 'config.json').read_text('utf-8'))
    description = Description('segmentor', config['model'])
  except (OSError, ValueError, KeyError) as error:
    raise UserError(
      f'{workdir} has checkpoints but no config.json of a training that can '
      f'be read ({error}).'
    ) from error
  model = description.create()
  variables, step, about = restore_variables(
    workdir, which, variable_shapes(model)
  )
  state_dict = without(export_state_dict(model, variables, 'ours'), drop)
  if drop:
    description = remaining(description, state_dict)
  return Weights(
    state_dict,
    'ours',
    description,
    about['classes'],
    about.get('palette'),
    NORMALIZATION,
    {'source': str(workdir), 'step': step, 'config': config['name']},
  )


def _report(weights: Weights, variables: Any, files: list[Path]) -> None:
  task, config = weights.description
  arrays = flatten_dict(variables)
  parameters = sum(v.size for k, v in arrays.items() if k[0] == 'params')
  name = config['backbone']
  if config.get('stage_sizes'):
    name = f'a ResNeSt of {tuple(config["stage_sizes"])} blocks'
  head = f' with {config["head"]}' if 'head' in config else ''
  classes = (
    f', {config["num_classes"]} classes' if 'num_classes' in config else ''
  )
  print(
    f'{task}: {name}{head}{classes}, dilation rule '
    f'{config["dilation_rule"]}, {parameters / 1e6:.2f} M parameters'
  )
  print(f'{len(weights.state_dict)} tensors of kind {weights.kind}, all placed')
  if not all(np.isfinite(value).all() for value in arrays.values()):
    print('warning: there are values that are not finite')
  print(f'written: {", ".join(map(str, files))}')


if __name__ == '__main__':
  run(main)
