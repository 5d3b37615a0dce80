"""Loads and checks configurations: a file of `configs/` plus overrides."""

import argparse
import contextlib
import difflib
import functools
import inspect
import json
import re
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from resnest_jax.config_keys import KEYS, classifies
from resnest_jax.errors import UserError, ending
from resnest_jax.flags import Parser, command_line
from resnest_jax.overrides import KINDS, REMOVED, nearest, override
from resnest_jax.shipped import shipped
from resnest_jax.text import listed, shorten, without_secrets
from resnest_jax.untrusted import parse_json

# In a workdir: the configuration with which a run was last started.
SAVED = 'config.json'


def load_config(
  spec: str | Path, overrides: Mapping[str, Any] | None = None
) -> ConfigDict:
  """Reads a configuration file into a locked ConfigDict and validates it.

  Args:
    spec: path of a Python file with `get_config`, optionally with a colon and
      its argument: 'configs/ade20k_pspnet.py:mini'.
    overrides: dotted key -> value, or the value as a string:
      {'train.total_steps': 1000, 'data.crop_size': '256,256'}.

  Raises `UserError` for an unknown key or a value that is not accepted, too.
  """
  path, _, argument = str(spec).partition(':')
  config = _call_get_config(_config_file(path), argument)
  _check_keys(path, config)
  return _overridden(config, overrides or {})


def load_run_config(
  workdir: Path, overrides: Mapping[str, Any] | None = None
) -> ConfigDict:
  """As `load_config`, the configuration that a run was last started with.

  Keys that came later have their defaults. Raises `UserError` if `config.json`
  is missing or damaged, or its data is not here.
  """
  path, advice = Path(workdir) / SAVED, 'Give --config, as in the training.'
  if not path.parent.is_dir():
    raise UserError(
      f'there is no folder {workdir}; give the workdir of a training.'
    )
  with ending(advice):
    try:
      saved = flatten(parse_json(path.read_bytes(), str(path)))
    except OSError as error:
      raise UserError(
        f'{path} cannot be read ({error.strerror}), so the configuration is '
        'not known.'
      ) from error
  try:
    kept = {key: saved[key] for key in saved.keys() - REMOVED.keys()}
    config = _overridden(_common_config(), kept)
  except UserError as error:
    raise UserError(f'{path}: {str(error).rstrip(".")}. {advice}') from error
  config = _overridden(config, overrides or {})
  data = config.data
  # Paths in `folder` may be absolute, and then the folder is not needed.
  needed = data.folder.classes if data.name == 'folder' else ''
  if not (place := Path(data.data_dir) / needed).exists():
    raise UserError(
      f'the run {workdir} was trained on data.data_dir={data.data_dir}, and '
      f'{place.absolute()} is not there. Go to the folder where the training '
      'was started, or give --config.data.data_dir=DIR.'
      if 'data.data_dir' not in (overrides or {})
      else f'--config.data.data_dir={data.data_dir}: there is no {place}.'
    )
  return config


def _overridden(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  known, defaults = flatten(config), _defaults()
  # None may come back where a row has set something else.
  known |= {key: None for key in known if defaults.get(key, '') is None}
  for key, value in overrides.items():
    override(config, key, value, known)
  if 'model.in_channels' not in overrides:
    config.model.in_channels = len(config.data.bands) or 3
  validate(config)
  return config.lock()


def flag_parser(
  description: str, workdir_required: bool = True, config_required: bool = True
) -> Parser:
  """A parser with the flags of all scripts that take a configuration.

  Without --config `parse_flags` takes that of the run, --workdir or --weights.
  """
  parser = Parser(
    description=description,
    epilog='Every key of the configuration is a flag as well, such as\n'
    '--config.train.total_steps=1000. configs/common.py explains the keys.',
  )
  parser.add_argument(
    '--config',
    required=config_required,
    metavar='FILE[:ARGUMENT]',
    help='a file of configs/: a row of the table in README.md, or folder.py '
    'for data of your own; with :mini a small twin of a row'
    + ('' if config_required else '; default: the configuration of the run'),
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

  `config` of the result is the loaded ConfigDict; raises as `load_config`.
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
  if flags.config:
    flags.config = load_config(flags.config, overrides)
    return flags
  run = flags.workdir or flags.weights
  if not run:
    parser.error('--workdir or --config is required')
  if not flags.workdir and not Path(run, SAVED).is_file():
    raise UserError(
      f'--weights {run} is no workdir of a training, whose configuration would '
      'be taken: give --config, which names the data set.'
    )
  flags.config = load_run_config(Path(run), overrides)
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

  `saved` is an earlier configuration, written by `config_to_json`; `ignore`
  are keys and sections that may differ: ['data.data_dir', 'eval'].
  """
  old = flatten(json.loads(without_secrets(saved)))
  new = flatten(json.loads(config_to_json(config)))  # JSON knows no tuples.
  # Newer than the run: the default leaves everything as it was.
  old = {key: x for key, x in _defaults().items() if key in new} | old
  # Of removed keys only the former default still exists.
  new |= {key: REMOVED[key][0] for key in REMOVED.keys() & old.keys()}
  lines = []
  for key in sorted(old.keys() | new.keys()):
    ignored = any(f'{key}.'.startswith(f'{prefix}.') for prefix in ignore)
    if ignored or (key in old and key in new and old[key] == new[key]):
      continue
    before, now = (repr(x[key]) if key in x else 'not set' for x in (old, new))
    now = REMOVED[key][1] if key in REMOVED else f'{now} now'
    lines.append(f'{key}: {before} before, {now}')
  return lines


@functools.cache
def _defaults() -> dict[str, Any]:
  if not shipped('configs/common.py').is_file():
    return {}  # The package alone was copied.
  return flatten(json.loads(config_to_json(_common_config())))


def _common_config() -> ConfigDict:
  return runpy.run_path(str(shipped('configs/common.py')))['get_config']()


def validate(config: ConfigDict) -> None:
  """Raises `UserError` for a value out of its range.

  Names of networks, data sets and the like are checked where they are used.
  """
  values = flatten(config)

  def refuse(key: str, accepted: str):
    given = shorten(repr(values[key]))
    raise UserError(f'config.{key} is {given}; it must be {accepted}.')

  # ConfigDict takes None for every key.
  for name, default in _defaults().items():
    if default is not None and values.get(name, default) is None:
      refuse(name, KINDS[type(default)])
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
  _check_task(classifies(config), values, refuse)
  if channels := len(values['data.bands']):
    if values['data.name'] != 'folder':
      refuse('data.bands', 'left out, as data.name is not folder')
    if values['data.augmentation'] != 'mmseg':
      refuse('data.augmentation', 'mmseg with data.bands')
  if values['model.in_channels'] != (channels or 3):
    refuse('model.in_channels', f'{channels or 3}, as data.bands has')
  way = values['data.augmentation']
  squares = {'encoding': 'image_scale', 'imagenet': 'image_scale crop_size'}
  for key in squares.get(way, '').split():
    if len(set(values[f'data.{key}'])) > 1:
      accepted = f'one edge twice, as 520,520, with data.augmentation={way}'
      refuse(f'data.{key}', accepted)
  if way == 'encoding' and values['data.cat_max_ratio'] != 1:
    accepted = '1 with data.augmentation=encoding, which takes any crop'
    refuse('data.cat_max_ratio', accepted)
  if not any(config.loss.terms.values()):
    raise UserError(
      'there is no loss: set config.loss.terms. and one of '
      f'{", ".join(config.loss.terms)} above 0.'
    )
  optimizer, train = config.optimizer, config.train
  steps = train.total_steps  # Of epochs known once the data is.
  if not train.total_epochs and optimizer.warmup_steps >= steps:
    refuse('optimizer.warmup_steps', f'below train.total_steps, {steps}')
  if train.micro_batch_size and train.batch_size % train.micro_batch_size:
    accepted = f'0 or divide train.batch_size, {train.batch_size}'
    refuse('train.micro_batch_size', accepted)
  if optimizer.min_learning_rate > optimizer.learning_rate:
    refuse('optimizer.min_learning_rate', 'at most optimizer.learning_rate')


def _check_task(
  classify: bool, values: Mapping[str, Any], refuse: Callable[[str, str], None]
) -> None:
  """Calls `refuse` for what only the other task, by its head, can use."""
  head = f'with model.head={values["model.head"]}'
  if classify != (values['data.augmentation'] == 'imagenet'):
    only = 'imagenet' if classify else 'mmseg or encoding'
    refuse('data.augmentation', f'{only} {head}')
  if not classify:
    for key in ('loss.mixup', 'model.dropblock', 'train.norm_group'):
      if values[key]:
        refuse(key, f'0 {head}: it is for classifiers')
    return
  if values['mesh.spatial'] != 1:
    refuse('mesh.spatial', f'1 {head}, whose images are not cut')
  if values['loss.class_weights'] is not None:
    refuse('loss.class_weights', f'None {head}')
  for key in (x for x in values if x.startswith('loss.terms.')):
    if values[key] != (only := int(key == 'loss.terms.cross_entropy')):
      refuse(key, f'{only} {head}, whose loss is the cross entropy')
  micro, group = values['train.micro_batch_size'], values['train.norm_group']
  which = 'train.micro_batch_size' if micro else 'train.batch_size'
  images = values[which]
  # A batch that is smaller than the group is a group by itself.
  fits = not group or not images % group or (group > images and not micro)
  if group == 1 or not fits:
    refuse('train.norm_group', f'0, or at least 2 and divide {which}, {images}')


def fit_num_classes(config: ConfigDict, num_classes: int) -> None:
  """Sets `model.num_classes` if it is 0; another number is a `UserError`."""
  if config.model.num_classes == 0:
    config.model.num_classes = num_classes
  if config.model.num_classes != num_classes:
    raise UserError(
      f'config.model.num_classes is {config.model.num_classes}, but the data '
      f'set {config.data.name} has {num_classes} classes. Set '
      f'--config.model.num_classes={num_classes}, or 0 for as many as there '
      'are.'
    )


def fit_total_steps(config: ConfigDict, num_images: int) -> None:
  """Replaces `train.total_epochs`, if given, by `train.total_steps`."""
  train = config.train
  if train.total_epochs:
    train.total_steps = -(-train.total_epochs * num_images // train.batch_size)
    train.total_epochs = None
    validate(config)


def _check_keys(path: str, config: Any) -> None:
  # With the sections that stand for keys of former versions.
  known = isinstance(config, ConfigDict) and flatten(config)
  names = [x for x in KEYS if not any(y.startswith(f'{x}.') for y in KEYS)]
  if missing := [name for name in names if not known or name not in known]:
    raise UserError(
      f'get_config of {path} returns no whole configuration: '
      f'{listed(missing, 3)} {"is" if len(missing) == 1 else "are"} missing. '
      'Begin with config = common.get_config(), as the files in configs/ do, '
      'and return config.'
    )


def _config_file(path: str) -> Path:
  # The rows are found from anywhere, with or without folder and ending.
  named = path if path.endswith('.py') else f'{path}.py'
  places = Path(path), Path(named), shipped(named), shipped('configs') / named
  file = next((place for place in places if place.is_file()), None)
  if file and file.stem != 'common':
    return file
  rows, own = shipped('configs'), Path(path).parent
  there = sorted(f.stem for f in rows.glob('*.py') if _is_row(f))
  if own.resolve() != rows.resolve():
    there += sorted(str(f) for f in own.glob('*.py') if _is_row(f))
  stems = {Path(name).stem: name for name in there}
  near = difflib.get_close_matches(Path(named).stem, stems, 1)
  meant = f' (did you mean {stems[near[0]]}?)' if near else ''
  what = f'there is no config file {path!r}{meant}'
  if file:
    what = f'{path} holds the defaults of all rows and is none itself'
  raise UserError(
    f'{what}; there are {", ".join(there)}. Others are given by their path.'
  )


def _is_row(path: Path) -> bool:
  with contextlib.suppress(OSError):
    return path.stem != 'common' and b'get_config' in path.read_bytes()
  return False


@contextlib.contextmanager
def _importable(path: Path) -> Iterator[None]:
  """Lets a file import `configs`, of its own clone or else as shipped."""

  def imported() -> dict[str, types.ModuleType]:
    names = (x for x in sys.modules if x.partition('.')[0] == 'configs')
    return {name: sys.modules[name] for name in names}

  before, parent = imported(), path.resolve().parent.parent
  for name in before:
    del sys.modules[name]
  # Not left to the search: another package of that name would win.
  sys.modules['configs'] = package = types.ModuleType('configs')
  package.__path__ = [str(parent / 'configs'), str(shipped('configs'))]
  sys.path.insert(0, str(parent))
  try:
    yield
  finally:
    sys.path.remove(str(parent))
    for name in imported():
      del sys.modules[name]
    sys.modules.update(before)


def _call_get_config(path: Path, argument: str) -> ConfigDict:
  try:
    with _importable(path):
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
    raise UserError(f'{path}, line {line}: {_said(error)}') from error


# In errors of ml_collections.
_UNKNOWN = re.compile(r"""Key "(.*?)" does not exist|'?(\w+)'?\nDid|'(\w+)'$""")
_OTHER_TYPE = re.compile(
  r"(?s)Could not override field '(\w+)'.*?\. (.*) is of original type "
  r"<class '(\w+)'> .* <class '(.*)'>"
)


def _said(error: Exception) -> str:
  """An error of a configuration file, about keys in the words of flags."""
  inner = error.args[0] if error.args else ''
  message = str(*getattr(inner, 'args', [inner])[:1])
  if found := _UNKNOWN.match(message):
    key = found[found.lastindex]
    known = dict.fromkeys([*KEYS, *(x.rpartition('.')[0] for x in KEYS)])
    return f'unknown config key {key!r}; {nearest(key, known)}'
  if found := _OTHER_TYPE.match(message):
    key, value, given, wanted = found.groups()
    words = {kind.__name__: x for kind, x in KINDS.items()}
    value = repr(value) if given == 'str' else value
    return f'{key} must be {words.get(wanted, "a section")}, not {value}.'
  return f'{type(error).__name__}: {message}'
