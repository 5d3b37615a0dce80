"""Loads and checks configurations: a file of `configs/` plus overrides."""

import argparse
import functools
import inspect
import json
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from resnest_jax.config_keys import KEYS
from resnest_jax.errors import UserError
from resnest_jax.flags import Parser, command_line
from resnest_jax.overrides import REMOVED, override
from resnest_jax.shipped import shipped
from resnest_jax.text import shorten, without_secrets


def load_config(
  spec: str | Path, overrides: Mapping[str, Any] | None = None
) -> ConfigDict:
  """Reads a configuration file into a locked ConfigDict and validates it.

  Args:
    spec: path of a Python file with `get_config`, optionally with a colon and
      its argument: 'configs/ade20k_pspnet.py:mini'.
    overrides: dotted key -> value, or the value as a string:
      {'train.total_steps': 1000, 'data.crop_size': '256,256'}.

  Raises:
    UserError: no such file, an unknown key, a value of another type or out of
      range.
  """
  path, _, argument = str(spec).partition(':')
  config = _call_get_config(_config_file(path), argument)
  _check_keys(path, config)
  # None may come back where a row has set something else.
  unset = {key: None for key, value in _defaults().items() if value is None}
  known = flatten(config)
  known |= {key: unset.get(key, value) for key, value in known.items()}
  for key, value in (overrides or {}).items():
    override(config, key, value, known)
  validate(config)
  return config.lock()


def flag_parser(description: str, workdir_required: bool = True) -> Parser:
  """A parser with the flags of all scripts that take a configuration."""
  parser = Parser(
    description=description,
    epilog='Every key of the configuration is a flag as well, such as\n'
    '--config.train.total_steps=1000. configs/common.py explains the keys.',
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

  `config` of the result is the loaded ConfigDict.

  Raises:
    UserError: an unknown or missing flag; see also `load_config`.
  """
  arguments = command_line(arguments)
  # Without argparse: the keys are known only once the file has been read.
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
  """Dotted key -> value, sorted within each section."""
  flat = {}
  for key in sorted(config):
    value = config[key]
    if isinstance(value, Mapping | ConfigDict):
      flat |= {f'{key}.{name}': leaf for name, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def config_to_json(config: ConfigDict) -> str:
  """The configuration as indented JSON with sorted keys, without secrets."""
  text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'
  return without_secrets(text)


def differences(
  saved: str, config: ConfigDict, ignore: Sequence[str] = ()
) -> list[str]:
  """A line with both values for every key that differs.

  Args:
    saved: an earlier configuration, written by `config_to_json`.
    config: the one of today.
    ignore: keys and sections that may differ: ['data.data_dir', 'eval'].
  """
  old = flatten(json.loads(without_secrets(saved)))
  new = flatten(json.loads(config_to_json(config)))  # JSON knows no tuples.
  absent = object()
  lines = []
  for key in sorted(old.keys() | new.keys()):
    ignored = any(f'{key}.'.startswith(f'{prefix}.') for prefix in ignore)
    before, now = old.get(key, absent), new.get(key, absent)
    if ignored or before == now:
      continue
    # Newer than the run: the default leaves everything as it was.
    if before is absent and _defaults().get(key, absent) == now:
      continue
    # Removed since: only the former default still exists.
    if now is absent and key in REMOVED:
      default, instead = REMOVED[key]
      if before != default:
        lines.append(f'{key}: {before!r} before, {instead}')
      continue
    shown = ['not set' if x is absent else repr(x) for x in (before, now)]
    lines.append(f'{key}: {shown[0]} before, {shown[1]} now')
  return lines


@functools.cache
def _defaults() -> dict[str, Any]:
  path = shipped('configs/common.py')
  if not path.is_file():
    return {}  # The package alone was copied.
  config = runpy.run_path(str(path))['get_config']()
  return flatten(json.loads(config_to_json(config)))


def validate(config: ConfigDict) -> None:
  """Raises `UserError` for a value out of its range.

  Names of networks, data sets and the like are checked where they are used.
  """
  values = flatten(config)

  def refuse(key: str, accepted: str):
    given = shorten(repr(values[key]))
    raise UserError(f'config.{key} is {given}; it must be {accepted}.')

  for name, key in KEYS.items():
    value = values.get(name)
    if key.accepted and value is not None and not key.accepted.holds(value):
      refuse(name, key.accepted.said_of(value))
  # A stride beyond the window would leave pixels without a prediction.
  crop = values['eval.slide_crop'] or values['data.crop_size']
  stride = values['eval.slide_stride'] or crop
  if stride[0] > crop[0] or stride[1] > crop[1]:
    window = f'{crop[0]},{crop[1]}'
    refuse('eval.slide_stride', f'at most the window, which is {window}')
  if not any(config.loss.terms.values()):
    raise UserError(
      'there is no loss: set config.loss.terms. and one of '
      f'{", ".join(config.loss.terms)} above 0.'
    )
  optimizer, train = config.optimizer, config.train
  if optimizer.warmup_steps >= (steps := train.total_steps):
    refuse('optimizer.warmup_steps', f'below train.total_steps, {steps}')
  if train.micro_batch_size and train.batch_size % train.micro_batch_size:
    accepted = f'0 or divide train.batch_size, {train.batch_size}'
    refuse('train.micro_batch_size', accepted)
  if optimizer.min_learning_rate > optimizer.learning_rate:
    refuse('optimizer.min_learning_rate', 'at most optimizer.learning_rate')


def fit_num_classes(config: ConfigDict, num_classes: int) -> None:
  """Sets `config.model.num_classes` from the data set if it is 0.

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


def _check_keys(path: str, config: Any) -> None:
  # With the sections that stand for keys of former versions.
  known = isinstance(config, ConfigDict) and flatten(config)
  names = [x for x in KEYS if not any(y.startswith(f'{x}.') for y in KEYS)]
  if missing := [name for name in names if not known or name not in known]:
    raise UserError(
      f'get_config of {path} returns no whole configuration: '
      f'{", ".join(missing[:3])}{", ..." if len(missing) > 3 else ""} '
      f'{"is" if len(missing) == 1 else "are"} missing. Begin with config = '
      'common.get_config(), as the files in configs/ do, and return config.'
    )


def _config_file(path: str) -> Path:
  # An installed `resnest-jax` finds the rows from anywhere.
  file = Path(path)
  if not file.is_file() and shipped(file).is_file():
    file = shipped(file)
  if file.is_file() and file.stem != 'common':
    return file
  folder = file.parent if file.parent.is_dir() else Path('configs')
  files = (folder if folder.is_dir() else shipped(folder)).glob('*.py')
  there = [str(folder / f.name) for f in sorted(files) if f.stem != 'common']
  advice = f'in {folder}/ there are: {", ".join(there)}.'
  if not there:
    advice = 'give the full path.'
  what = f'there is no config file {path!r}'
  if file.is_file():
    what = f'{path} holds the defaults of all rows and is none itself'
  raise UserError(f'{what}; {advice}')


def _call_get_config(path: Path, argument: str) -> ConfigDict:
  # configs/x.py imports `configs.common`, so the parent has to be importable.
  parent = str(path.resolve().parent.parent)
  sys.path.insert(0, parent)
  try:
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
    # The last line of the file in the traceback; a SyntaxError has none.
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = lines[-1] if lines else getattr(error, 'lineno', '?')
    # After an unknown key ml_collections prints the whole section.
    message = str(error.args[0] if error.args else '')
    message = message.partition(' Other fields')[0].replace("'Key", 'Key')
    raise UserError(
      f'{path}, line {line}: {type(error).__name__}: {message}'
    ) from error
  finally:
    sys.path.remove(parent)
