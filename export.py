"""Exports a trained network to StableHLO, ONNX, safetensors and mmsegmentation.

    python export.py --weights runs/pspnet --out exported --sizes 512x512
    python export.py --weights ade20k_pspnet --out exported --formats onnx
    python export.py --weights ade20k_pspnet --out exported --canvas 1024x2048
    python export.py --weights runs/a --out b --formats onnx --precision int8
    python export.py --weights resnest50 --out features --features
    python export.py --renew exported

--weights is the workdir of a training, a published name, a file or an address
(docs/weights.md). StableHLO and ONNX files turn any number of uint8 pictures of
one size, or with --canvas of any size up to it, into label maps without this
project. Each file is read back and compared with the checkpoint; --out appears
once all agree, with about.json and a model card, README.md. --features writes
C2 to C5 of the backbone instead, for detectors (docs/backbone.md), --precision
smaller ONNX files as well, float16 or int8, whose labels agree. Later
releases of JAX may refuse a StableHLO file; --renew rewrites a folder's with
the installed JAX. See docs/export.md.
"""

import argparse
import re
from pathlib import Path

from resnest_jax.errors import UserError, run
from resnest_jax.flags import Parser, add_source_flags

# Flags that an export needs and --renew refuses.
SOURCE = ('weights', 'out')
STOPPED = 'stopped; nothing was written.'


def main() -> None:
  flags = vars(parse())
  flags['sizes'] = [parse_size('sizes', size) for size in flags['sizes']]
  flags['canvas'] = [
    size if size == 'free' else parse_size('canvas', size)
    for size in flags['canvas']
  ]
  # Imported late: these take seconds, and a mistyped flag should fail at once.
  from resnest_jax import runtime
  from resnest_jax.export.folder import export_model
  from resnest_jax.export.renew import renew_exports

  runtime.set_up()
  if folder := flags.pop('renew'):
    renew_exports(folder, pictures=flags['pictures'])
    return
  if flags['formats'] is None:
    flags['formats'] = ['stablehlo', *['safetensors'] * (not flags['features'])]
  export_model(flags.pop('weights'), **flags)  # Flags are named as arguments.


def parse() -> argparse.Namespace:
  """Parses the command line of an export, or of --renew."""
  parser = make_parser()
  flags = parser.parse_args()
  if not flags.renew:
    # Not `required` in the parser, because --renew goes without them.
    missing = [f'--{name}' for name in SOURCE if not getattr(flags, name)]
    if missing:
      parser.error(
        f'the following arguments are required: {", ".join(missing)} (or '
        '--renew DIR alone)'
      )
    return flags
  # Attributes that exist already keep their values instead of the defaults, so
  # a second parse shows which flags were given.
  names = (*SOURCE, 'formats', 'sizes', 'probabilities', 'checkpoint')
  names += ('canvas', 'features', 'precision', 'agreement')
  bare = argparse.Namespace(**dict.fromkeys(names))
  bare = parser.parse_args(namespace=bare)
  given = [f'--{name}' for name in names if getattr(bare, name) is not None]
  if given:
    raise UserError(
      f'--renew {flags.renew} takes weights, sizes and outputs from the folder '
      f'and cannot be given with {", ".join(given)}. Leave these out, or omit '
      '--renew for a new export.'
    )
  return flags


def parse_size(flag: str, text: str) -> tuple[int, int]:
  """'512x1024' -> (512, 1024), height and width."""
  found = re.fullmatch(r'(\d{1,5})x(\d{1,5})', text)
  if not found:
    raise UserError(
      f'--{flag} {text} is no size; write HEIGHTxWIDTH in pixels, such as '
      '512x1024.'
    )
  return int(found[1]), int(found[2])


def make_parser() -> argparse.ArgumentParser:
  parser = Parser(description=__doc__)
  add_source_flags(parser, required=False)
  add = parser.add_argument
  add('--out', type=Path, metavar='DIR', help='a new folder')
  add(
    '--renew',
    type=Path,
    metavar='DIR',
    help='write the StableHLO of this folder of exports again, alone or with '
    '--pictures',
  )
  add(
    '--formats',
    nargs='+',
    # `FORMATS`, whose import would take seconds.
    choices=(
      *('stablehlo', 'onnx', 'safetensors'),
      *('mmseg', 'web', 'timm', 'official'),
    ),
    help='what to write (default: stablehlo safetensors; of features: '
    'stablehlo)',
  )
  add(
    '--sizes',
    nargs='+',
    default=[],
    metavar='HxW',
    help='height and width of pictures, a StableHLO and an ONNX file for each '
    '(default: the crop of the training)',
  )
  add(
    '--canvas',
    nargs='+',
    default=[],
    metavar='HxW',
    help='a StableHLO and an ONNX file for pictures of any size up to each of '
    'these, or up to one that is known when it runs: free (of a segmentor)',
  )
  add(
    '--features',
    nargs='?',
    const=32,
    type=int,
    choices=(8, 16, 32),
    metavar='STRIDE',
    help='write C2 to C5 of the backbone instead, at this output stride: 8, 16 '
    'or 32 (default: 32)',
  )
  add(
    '--probabilities',
    action='store_true',
    help='output the probabilities of all classes from StableHLO and ONNX: 4 '
    'bytes a class and pixel',
  )
  add(
    '--precision',
    nargs='+',
    default=[],
    choices=('float16', 'int8'),
    help='smaller ONNX files of a segmentor as well, with label maps as in '
    'float32 but for few pixels',
  )
  add(
    '--agreement',
    type=float,
    default=0.995,
    metavar='SHARE',
    help='of the pixels that have to keep their class in such a file '
    '(default: 0.995)',
  )
  add(
    '--pictures',
    nargs='+',
    default=[],
    metavar='PICTURE',
    help='files or folders of pictures to compare on, of which 20 are taken '
    '(default: 20 drawn scenes)',
  )
  return parser


if __name__ == '__main__':
  run(main, STOPPED)
