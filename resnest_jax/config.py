"""From a file of `configs/` and the command line to a checked ConfigDict."""

import argparse
import difflib
import functools
import inspect
import json
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from resnest_jax.errors import UserError
from resnest_jax.flags import Parser
from resnest_jax.overrides import REMOVED, override
from resnest_jax.shipped import shipped

# Smallest accepted value of whole-number keys.
_AT_LEAST = {
  'seed': 0,
  'model.stem_width': 1,
  'model.width': 1,
  'model.radix': 1,
  'model.groups': 1,
  'model.base_width': 1,
  'model.head_channels': 1,
  'model.aux_channels': 1,
  'data.doctor_samples': 0,
  'model.num_classes': 0,
  'data.folder.split_seed': 0,
  'data.num_workers': 0,
  'data.num_threads': 0,
  'data.prefetch': 1,
  'loss.ohem_min_kept': 1,
  'optimizer.warmup_steps': 0,
  'mesh.data': -1,
  'mesh.spatial': 1,
  'train.total_steps': 1,
  # The split attention normalises 1x1 maps over the batch: one value has no
  # variance.
  'train.batch_size': 2,
  'train.log_steps': 1,
  'train.eval_steps': 1,
  'train.checkpoint_steps': 1,
  'train.keep_checkpoints': 1,
  'train.micro_batch_size': 0,
  'train.pictures': 0,
  'eval.batch_size': 1,
  'eval.bucket': 1,
  'eval.overlays': 0,
  'eval.report_images': 0,
}
LOSSES = ('cross_entropy', 'ohem', 'focal', 'dice', 'lovasz')
# Bounds of real-number keys as written in words, and the test.
_NOT_NEGATIVE = ('at least 0', lambda x: 0 <= x < float('inf'))
_POSITIVE = ('above 0', lambda x: 0 < x < float('inf'))
_SHARE = ('from 0 to 1', lambda x: 0 <= x <= 1)
_SHARE_BELOW_1 = ('at least 0 and below 1', lambda x: 0 <= x < 1)
_BOUNDS = {
  'model.dropout': _SHARE_BELOW_1,
  'data.folder.eval_fraction': ('above 0 and below 1', lambda x: 0 < x < 1),
  'data.cat_max_ratio': ('above 0 and at most 1', lambda x: 0 < x <= 1),
  'data.repeat_threshold': _SHARE,
  'data.flip_probability': _SHARE,
  'data.timeout': ('above 0', lambda x: x > 0),
  'eval.fscore_beta': _POSITIVE,
  **{f'loss.terms.{name}': _NOT_NEGATIVE for name in LOSSES},
  'loss.aux_weight': _NOT_NEGATIVE,
  'loss.label_smoothing': _SHARE_BELOW_1,
  'loss.ohem_threshold': _SHARE,
  'loss.focal_gamma': _NOT_NEGATIVE,
  'loss.focal_alpha': _SHARE,
  'optimizer.learning_rate': _POSITIVE,
  'optimizer.min_learning_rate': ('at least 0', lambda x: x >= 0),
  'optimizer.power': _POSITIVE,
  'optimizer.warmup_ratio': _SHARE,
  'optimizer.momentum': _SHARE_BELOW_1,
  'optimizer.beta1': _SHARE_BELOW_1,
  'optimizer.beta2': _SHARE_BELOW_1,
  'optimizer.epsilon': _POSITIVE,
  'optimizer.weight_decay': _NOT_NEGATIVE,
  'optimizer.layer_decay': ('above 0 and at most 1', lambda x: 0 < x <= 1),
  'optimizer.head_multiplier': _POSITIVE,
  'optimizer.clip_norm': _POSITIVE,
  'train.freeze': ('from 0 to 5', lambda x: 0 <= x <= 5),
  'train.ema_decay': ('at least 0 and below 1', lambda x: 0 <= x < 1),
}
SAMPLINGS = ('uniform', 'repeat_factor', 'class_balanced')
PROTOCOLS = ('whole', 'slide', 'ms_flip_0x', 'ms_flip_1x')
# Accepted names.
_CHOICES = {
  'data.sampling': SAMPLINGS,
  'eval.protocol': PROTOCOLS,
  'loss.focal_activation': ('sigmoid', 'softmax'),
  'optimizer.name': ('sgd', 'adamw'),
  'optimizer.schedule': ('poly', 'cosine'),
}
# Length of tuples of positive whole numbers.
_SIZES = {
  'model.stage_sizes': 4,
  'data.image_scale': 2,
  'data.crop_size': 2,
  'eval.slide_crop': 2,
  'eval.slide_stride': 2,
}


def load_config(
  spec: str | Path, overrides: Mapping[str, Any] | None = None
) -> ConfigDict:
  """Reads a configuration file.

  Args:
    spec: path of a Python file with `get_config`, and after a colon the
      argument it is called with: 'configs/ade20k_pspnet.py:mini'.
    overrides: dotted key -> value, or the value as a string:
      {'train.total_steps': 1000, 'data.crop_size': '256,256'}.

  Returns:
    A locked, type-safe ConfigDict that `validate` has checked.

  Raises:
    UserError: no such file, a key that does not exist, a value of another
      type or out of range.
  """
  path, _, argument = str(spec).partition(':')
  config = _call_get_config(_config_file(path), argument)
  for key, value in (overrides or {}).items():
    override(config, key, value, flatten(config))
  validate(config)
  return config.lock()


def flag_parser(
  description: str, workdir_required: bool = True
) -> argparse.ArgumentParser:
  """A parser with the flags all scripts share; a script may add its own."""
  parser = Parser(
    description=description,
    epilog='Every key of the configuration is a flag as well, for instance\n'
    '--config.train.total_steps=1000. configs/common.py explains the keys.',
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config',
    required=True,
    metavar='FILE[:ARGUMENT]',
    help='a file of configs/: a row of the table in README.md, or folder.py '
    'for data of your own; with :mini a small twin of a row',
  )
  parser.add_argument(
    '--workdir',
    required=workdir_required,
    type=Path,
    metavar='DIR',
    help='folder of one run: its checkpoints, logs and results',
  )
  return parser


def parse_flags(
  parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
  """Parses a command line with `--config.key=value` or `--config.key value`.

  Args:
    parser: of `flag_parser`, with the script's own flags added.
    arguments: the command line; None: that of the process.

  Returns:
    The flags; `config` is the loaded ConfigDict, `workdir` a Path.

  Raises:
    UserError: an unknown or missing flag, and all that `load_config` raises.
  """
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  rest, overrides = [], {}
  while arguments:
    flag, equals, value = arguments.pop(0).partition('=')
    if not flag.startswith('--config.'):
      rest.append(flag + equals + value)
      continue
    if not equals:
      if not arguments or arguments[0].startswith('--'):
        raise UserError(f'{flag} needs a value: {flag}=VALUE.')
      value = arguments.pop(0)
    overrides[flag.removeprefix('--config.')] = value
  flags = parser.parse_args(rest)
  flags.config = load_config(flags.config, overrides)
  return flags


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
  """Dotted key -> value, in the order of the keys."""
  flat = {}
  for key in sorted(config):
    value = config[key]
    if isinstance(value, Mapping | ConfigDict):
      flat |= {f'{key}.{name}': leaf for name, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def config_to_json(config: ConfigDict) -> str:
  """The configuration as indented JSON with sorted keys."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def differences(
  saved: str, config: ConfigDict, ignore: Sequence[str] = ()
) -> list[str]:
  """Compares with what `config_to_json` wrote earlier.

  A key that did not exist then counts as its default, which is how what came
  later behaves where nobody asks for it. So does one that is gone now, of which
  a run had the former default.

  Args:
    saved: that JSON.
    config: the configuration now.
    ignore: keys and sections that may differ: ['data.data_dir', 'eval'].

  Returns:
    A line for every other key that differs, with both values.
  """
  old = flatten(json.loads(saved))
  new = flatten(json.loads(config_to_json(config)))
  absent = object()
  lines = []
  for key in sorted(old.keys() | new.keys()):
    ignored = any(f'{key}.'.startswith(f'{prefix}.') for prefix in ignore)
    before, now = old.get(key, absent), new.get(key, absent)
    if ignored or before == now:
      continue
    if before is absent and _defaults().get(key, absent) == now:
      continue
    if now is absent and key in REMOVED:
      if before != REMOVED[key].default:
        lines.append(f'{key}: {before!r} before, {REMOVED[key].instead}')
      continue
    shown = ['not set' if x is absent else repr(x) for x in (before, now)]
    lines.append(f'{key}: {shown[0]} before, {shown[1]} now')
  return lines


@functools.cache
def _defaults() -> dict[str, Any]:
  """Flat, as JSON has them; of the configs that came along, if any."""
  path = shipped('configs/common.py')
  if not path.is_file():
    return {}
  config = runpy.run_path(str(path))['get_config']()
  return flatten(json.loads(config_to_json(config)))


def validate(config: ConfigDict) -> None:
  """Refuses values that cannot be meant; names are checked where they are used.

  Raises:
    UserError: names the key, its value and what is accepted.
  """
  values = flatten(config)

  def refuse(key: str, accepted: str):
    raise UserError(f'config.{key} is {values[key]!r}; it must be {accepted}.')

  for key, minimum in _AT_LEAST.items():
    if values[key] is not None and values[key] < minimum:
      why = ' (batch normalisation)' if key == 'train.batch_size' else ''
      refuse(key, f'at least {minimum}{why}')
  for key, (accepted, holds) in _BOUNDS.items():
    if values[key] is not None and not holds(values[key]):
      refuse(key, accepted)
  for key, names in _CHOICES.items():
    if values[key] not in names:
      near = difflib.get_close_matches(values[key], names, 1)
      hint = f' (did you mean {near[0]}?)' if near else ''
      refuse(key, f'one of {", ".join(names)}{hint}')
  for key, length in _SIZES.items():
    size = values[key]
    if size is not None and not _positive_integers(size, length):
      refuse(key, f'{length} positive whole numbers')
  if values['mesh.data'] == 0:
    refuse('mesh.data', 'at least 1, or -1: all devices')
  if values['model.num_classes'] == 1:
    refuse('model.num_classes', 'at least 2, or 0: as many as the data has')
  if values['data.image_scale'][0] < values['data.image_scale'][1]:
    refuse('data.image_scale', '(long edge, short edge) in pixels')
  if not _is_range(values['data.scale_range']):
    refuse('data.scale_range', 'two positive numbers, the smaller first')
  scales = values['eval.scales']
  if not scales or not all(_is_positive(scale) for scale in scales):
    refuse('eval.scales', 'one or more positive numbers')
  crop = values['eval.slide_crop'] or values['data.crop_size']
  stride = values['eval.slide_stride'] or crop
  if stride[0] > crop[0] or stride[1] > crop[1]:
    window = f'{crop[0]},{crop[1]}'
    refuse('eval.slide_stride', f'at most the window, which is {window}')
  class_weights = values['loss.class_weights']
  if class_weights is not None and not _are_weights(class_weights):
    refuse('loss.class_weights', 'numbers of at least 0, not all 0')
  if not any(config.loss.terms.values()):
    raise UserError(
      'there is no loss: set config.loss.terms. and one of '
      f'{", ".join(LOSSES)} above 0.'
    )
  steps = values['train.total_steps']
  if values['optimizer.warmup_steps'] >= steps:
    refuse('optimizer.warmup_steps', f'below train.total_steps, {steps}')
  micro_batch_size = values['train.micro_batch_size']
  if micro_batch_size and values['train.batch_size'] % micro_batch_size:
    batch_size = values['train.batch_size']
    refuse(
      'train.micro_batch_size', f'0 or divide train.batch_size, {batch_size}'
    )
  if values['optimizer.min_learning_rate'] > values['optimizer.learning_rate']:
    refuse('optimizer.min_learning_rate', 'at most optimizer.learning_rate')


def fit_num_classes(config: ConfigDict, num_classes: int) -> None:
  """Sets `config.model.num_classes` to the data set's number where it is 0.

  Raises:
    UserError: it is another number.
  """
  if config.model.num_classes == 0:
    config.model.num_classes = num_classes
  if config.model.num_classes != num_classes:
    raise UserError(
      f'config.model.num_classes is {config.model.num_classes}, but the data '
      f'set {config.data.name} has {num_classes} classes. Set '
      f'--config.model.num_classes={num_classes}, or 0 for as many as there '
      'are.'
    )


def _positive_integers(values: tuple, length: int) -> bool:
  return len(values) == length and all(
    type(value) is int and value > 0 for value in values
  )


def _is_positive(value: Any) -> bool:
  return type(value) in (int, float) and 0 < value < float('inf')


def _are_weights(values: tuple) -> bool:
  return any(values) and all(x == 0 or _is_positive(x) for x in values)


def _is_range(values: tuple) -> bool:
  numbers = all(_is_positive(value) for value in values)
  return numbers and len(values) == 2 and values[0] <= values[1]


def _config_file(path: str) -> Path:
  """The path of a row's file, else an error that lists those there are.

  Seen from the working folder, else from where the scripts are.
  """
  file = Path(path)
  if not file.is_file() and shipped(file).is_file():
    file = shipped(file)
  if file.is_file() and file.stem != 'common':
    return file
  folder = file.parent if file.parent.is_dir() else Path('configs')
  files = folder.glob('*.py') if folder.is_dir() else shipped(folder).iterdir()
  there = [str(folder / f.name) for f in files if f.suffix == '.py']
  there = sorted(f for f in there if Path(f).stem != 'common')
  advice = f'in {folder}/ there are: {", ".join(there)}.'
  if not there:
    advice = 'give the full path.'
  what = f'there is no config file {path!r}'
  if file.is_file():
    what = f'{path} holds the defaults of all rows and is none itself'
  raise UserError(f'{what}; {advice}')


def _call_get_config(path: Path, argument: str) -> ConfigDict:
  """Runs the file; its own mistakes are reported with their line."""
  try:
    with _importable(path.resolve().parent.parent):
      get_config = runpy.run_path(str(path)).get('get_config')
      if get_config is None:
        raise UserError(f'{path} has no function get_config(argument=None).')
      if not argument:
        return get_config()
      if not inspect.signature(get_config).parameters:
        raise UserError(
          f'{path} takes no argument; leave out ":{argument}" after the name.'
        )
      return get_config(argument)
  except UserError:
    raise
  except Exception as error:
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(error.__traceback__)
      if frame.filename == str(path)
    ]
    line = lines[-1] if lines else getattr(error, 'lineno', '?')
    # After an unknown key ml_collections prints the whole section.
    message = str(error.args[0] if error.args else '')
    message = message.partition(' Other fields')[0].replace("'Key", 'Key')
    raise UserError(
      f'{path}, line {line}: {type(error).__name__}: {message}'
    ) from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
  """Lets a config import its neighbours (`from configs import common`)."""
  sys.path.insert(0, str(folder))
  try:
    yield
  finally:
    sys.path.remove(str(folder))
