"""Converts weights between this project and the libraries of others.

    python -m resnest_jax.weights.convert ade20k_pspnet --out weights/pspnet
    python -m resnest_jax.weights.convert runs/pspnet --out pth --to mmseg

The model is recognised from names and shapes; a missing or surplus tensor is an
error, and --drop leaves modules out. The output folder holds the weights and
about.json, the description that the weight file has in its header.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnest_jax.errors import run_module

if __name__ == '__main__':
  # Before the imports below, so that Ctrl-C during them is told in a line.
  run_module(__spec__.name)

import jax

from resnest_jax import runtime
from resnest_jax.files import check_new
from resnest_jax.flags import Parser, add_checkpoint_flag
from resnest_jax.weights.files import WITH_TORCH, write_weights
from resnest_jax.weights.infer import backbone_of, same_shapes, title_of
from resnest_jax.weights.names import WHOSE, WHOSE_READ
from resnest_jax.weights.pickles import check_torch
from resnest_jax.weights.pretrained import Weights, load_weights
from resnest_jax.weights.state_dict import KINDS, export_state_dict


def main(arguments: Sequence[str] | None = None) -> None:
  flags = _parser().parse_args(arguments)
  runtime.set_up()
  check_new(flags.out)  # Both checks come before a download.
  if flags.to in WITH_TORCH:
    check_torch()
  given = {x: getattr(flags, x) for x in ('drop', 'backbone', 'part')}
  weights = load_weights(flags.source, checkpoint=flags.checkpoint, **given)
  model, variables = weights.create()
  exported = export_state_dict(model, variables, flags.to)
  files = write_weights(flags.out, flags.to, exported, weights.about())
  _report(weights, variables)
  print(
    f'written with {WHOSE[flags.to]} names: {len(exported)} tensors, in '
    f'{", ".join(map(str, files))}'
  )


def _parser() -> Parser:
  parser = Parser(
    prog='python -m resnest_jax.weights.convert',
    description=__doc__.splitlines()[0],
    epilog='RESNEST_JAX_CACHE names the folder of downloads; '
    'RESNEST_JAX_OFFLINE=1 forbids them.',
  )
  add = parser.add_argument
  add(
    'source',
    help='a file, a folder written by this command, the workdir of a '
    'training, a published name (resnest101, ade20k_pspnet, ...), an address, '
    'or hf://owner/repository/file',
  )
  add('--out', required=True, type=Path, metavar='DIR', help='a new folder')
  add(
    '--to',
    choices=KINDS,
    default='ours',
    help=f'whose names to write; {", ".join(WITH_TORCH)} are a .pth and need '
    'the package torch, the others are safetensors (default: ours)',
  )
  add(
    '--drop',
    nargs='+',
    default=[],
    metavar='NAME',
    help='modules of the source to leave out, such as fc',
  )
  add(
    '--backbone',
    metavar='NAME',
    help='the backbone of a renamed file: resnest50_fast_2s1x64d has the '
    'shapes of resnest50',
  )
  add(
    '--part',
    metavar='NAME',
    help='one of several networks in the source, such as ema; the command '
    'lists them',
  )
  add_checkpoint_flag(parser)
  return parser


def _report(weights: Weights, variables: Any) -> None:
  task, config = weights.description
  parameters = sum(x.size for x in jax.tree.leaves(variables['params']))
  name, same = title_of(config), same_shapes(backbone_of(config))
  others = [other for other in same if other != name]
  # No shape shows where a pool stands (avd_first): the name is a guess.
  if others and not weights.provenance['backbone_known']:
    have = 'has' if len(others) == 1 else 'have'
    name += (
      f' (assumed from shapes; {", ".join(others)} {have} the same: '
      '--backbone names it)'
    )
  parts = [f'{task}: {name}']
  if 'head' in config:
    bare = ' and no auxiliary head' * (config['aux_channels'] is None)
    parts[0] += f' with {config["head"]}{bare}'
  if 'num_classes' in config:
    parts.append(f'{config["num_classes"]} classes')
  # All dilation rules give the same results in an undilated network.
  if config['output_stride'] < 32:
    parts.append(f'dilation rule {config["dilation_rule"]}')
  print(f'{", ".join(parts)}, {parameters / 1e6:.2f} M parameters')
  print(
    f'read with {WHOSE_READ[weights.kind]} names: {len(weights.state_dict)} '
    'tensors, all placed'
  )
  for note in weights.notes():
    print(note)
