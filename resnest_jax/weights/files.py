"""Weight files: safetensors, and PyTorch's without running their code."""

import hashlib
import importlib.util
import io
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from resnest_jax.errors import UserError
from resnest_jax.files import (
  check_new,
  explain_refusal,
  whole_folder,
  write_json,
)
from resnest_jax.text import listed

SAFETENSORS = 'model.safetensors'
TORCH = 'model.pth'
ABOUT = 'about.json'
TORCH_SUFFIXES = ('.pth', '.pt', '.bin')
TORCH_INSTALL = (
  'pip install torch --index-url https://download.pytorch.org/whl/cpu'
)
MAX_HEADER = 100_000_000  # Bytes, safetensors' own limit.
HEADER_KEY = 'resnest_jax'  # Of our description, in both formats.
# Of mmengine's message hub next to the weights, for which PyTorch's restricted
# loader would refuse the file. Pickle protocol 2 and NumPy 1 have other names.
IGNORED_OBJECTS = (
  'mmengine.logging.history_buffer.HistoryBuffer',
  '__builtin__.getattr',
  'builtins.getattr',
  'numpy.core.multiarray._reconstruct',
  'numpy._core.multiarray._reconstruct',
  'numpy.core.multiarray.scalar',
  'numpy._core.multiarray.scalar',
  'numpy.ndarray',
  'numpy.dtype',
)


class WeightFile(NamedTuple):
  """The contents of a file.

  state_dict: name -> NumPy array; half precision has become float32.
  about: our description, {} in files of others.
  meta: the metadata of others, {} if there is none.
  """

  state_dict: dict[str, np.ndarray]
  about: dict[str, Any]
  meta: dict[str, Any]


def read_weights(path: Path) -> WeightFile:
  """Reads a safetensors or PyTorch file, recognised by its content.

  Raises:
    UserError: another format, a damaged file, a pickle that would run code, no
      state dict inside, or PyTorch is not installed.
  """
  path = weight_file(path)
  with path.open('rb') as file:
    start = file.read(9)
  # First: the length of safetensors' header may look like a zip file or pickle.
  length = int.from_bytes(start[:8], 'little')
  if start[8:9] == b'{' and length <= MAX_HEADER:
    return _read_safetensors(path)
  # Zip files since PyTorch 1.6, bare pickles before.
  if start[:4] == b'PK\x03\x04' or start[:1] == b'\x80':
    return _read_torch(path)
  raise UserError(
    f'{path} is neither a safetensors nor a PyTorch file: it begins with '
    f'{start!r}. It may be a web page or cut off; get it again.'
  )


def weight_file(path: Path) -> Path:
  """Returns `path`, or the weights in it if it is a folder."""
  path = Path(path)
  if path.is_file():
    return path
  if not path.is_dir():
    raise UserError(f'there is no weight file {path}.')
  for name in (SAFETENSORS, TORCH):
    if (path / name).is_file():
      return path / name
  inside = listed(sorted(x.name for x in path.iterdir()), 8)
  raise UserError(
    f'the folder {path} holds neither {SAFETENSORS} nor {TORCH}, nor the '
    f'checkpoints of a training, but {inside or "nothing"}. Give the file '
    'itself.'
  )


def _read_safetensors(path: Path) -> WeightFile:
  import safetensors

  try:
    with safetensors.safe_open(path, framework='np') as file:
      header = file.metadata() or {}
      names = list(file.keys())
      state_dict = {name: _float32(file.get_tensor(name)) for name in names}
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise UserError(f'{path} is damaged ({error}); get it again.') from error
  try:
    about = json.loads(header.pop(HEADER_KEY, '{}'))
  except ValueError as error:
    raise UserError(f'{path} has a damaged header ({error}).') from error
  return WeightFile(state_dict, about, dict(header))


def _float32(value: np.ndarray) -> np.ndarray:
  # Exact. NumPy sees bfloat16 as kind 'V', so the test excludes integers and
  # bools instead of naming floats.
  short = value.dtype.itemsize < 4 and value.dtype.kind not in 'iub'
  return value.astype(np.float32) if short else value


class _Ignored:
  # A pickle creates objects by a call or by __new__, with any arguments, which
  # object.__new__ accepts if __init__ does, and then sets their state.

  def __init__(self, *args, **kwargs):
    del args, kwargs

  def __setstate__(self, state):
    del state


def check_torch() -> None:
  """Raises `UserError` if PyTorch is not installed, without importing it."""
  if importlib.util.find_spec('torch') is None:
    raise UserError(
      'PyTorch files need the package torch (its CPU build will do): '
      f'{TORCH_INSTALL}. safetensors files need nothing more.'
    )


def _read_torch(path: Path) -> WeightFile:
  check_torch()
  import torch

  ignored = [(_Ignored, name) for name in IGNORED_OBJECTS]
  try:
    with warnings.catch_warnings(), torch.serialization.safe_globals(ignored):
      warnings.simplefilter('ignore')
      content = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # Damaged files raise errors of many kinds.
    raise UserError(f'{path} {_why_not(error)}') from error
  outer = content if isinstance(content, Mapping) else {}
  # mmsegmentation and timm nest it next to the optimizer and the rest.
  nested = (outer.get(key) for key in ('state_dict', 'model'))
  tensors = next((x for x in nested if isinstance(x, Mapping)), content)
  if not isinstance(tensors, Mapping) or not all(
    isinstance(value, torch.Tensor) for value in tensors.values()
  ):
    keys = list(content)[:8] if isinstance(content, Mapping) else type(content)
    raise UserError(
      f'{path} holds no state dict: accepted are name -> tensor, alone or '
      f"under 'state_dict' or 'model'; there is {keys}."
    )
  if tensors and all(name.startswith('module.') for name in tensors):
    # DataParallel wraps the model in a module of this name.
    tensors = {k.removeprefix('module.'): v for k, v in tensors.items()}
  half = (torch.float16, torch.bfloat16)
  state_dict = {
    name: (value.float() if value.dtype in half else value).numpy()
    for name, value in tensors.items()
  }
  extras = (outer.get(key) for key in (HEADER_KEY, 'meta'))
  return WeightFile(
    state_dict, *(x if isinstance(x, dict) else {} for x in extras)
  )


def _why_not(error: Exception) -> str:
  # Not PyTorch's own message: it advises `weights_only=False`, to run the code.
  if found := re.search(r'GLOBAL (\S+)', str(error)):
    return (
      f'wants to run {found[1]}, which weights do not need; it was not run '
      'and nothing was read. Use another source, or a safetensors file.'
    )
  if 'weights_only' in str(error):
    return (
      "holds more than weights: PyTorch's restricted loader, which runs no "
      'code of a file, refuses it, and nothing was read. Use another source, '
      'or a safetensors file.'
    )
  first_line = str(error).strip().partition('\n')[0]
  return (
    f'cannot be read as a PyTorch file ({type(error).__name__}: {first_line}). '
    'It may be cut off; get it again.'
  )


def write_weights(
  folder: Path,
  kind: str,
  state_dict: Mapping[str, np.ndarray],
  about: Mapping[str, Any],
) -> list[Path]:
  """Writes a state dict and its description into a new folder.

  Args:
    folder: new or empty. It appears complete or not at all.
    kind: 'mmseg' writes `model.pth`, others `model.safetensors`.
    state_dict: name -> array.
    about: JSON-able; written into the weight file and into `about.json`.

  Returns:
    The paths of both files.
  """
  folder, about = Path(folder), public(about)
  check_new(folder)
  name = TORCH if kind == 'mmseg' else SAFETENSORS
  encode = _torch_file if kind == 'mmseg' else _safetensors_file
  # Written here: the packages' own errors do not say why a write is refused.
  content = encode(state_dict, about)
  with (
    explain_refusal(folder, 'give another --out'),
    whole_folder(folder) as temporary,
  ):
    (temporary / name).write_bytes(content)
    write_json(temporary / ABOUT, about)
  return [folder / name, folder / ABOUT]


def public(about: Mapping[str, Any]) -> dict[str, Any]:
  """A description to be published: its provenance names no local folders."""
  return {
    key: _without_folders(value) if key == 'provenance' else value
    for key, value in about.items()
  }


def _without_folders(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _without_folders(each) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [_without_folders(each) for each in value]
  if not isinstance(value, str):
    return value
  # Files of others may be from another system.
  if PureWindowsPath(value).is_absolute():
    return PureWindowsPath(value).name
  local = value in ('.', '..') or (os.sep in value and os.path.exists(value))
  if local or os.path.isabs(value) or value.startswith('~'):
    return os.path.basename(os.path.abspath(value))
  return value


def _safetensors_file(state_dict, about) -> bytes:
  from safetensors.numpy import save

  # `save` ignores strides, and ascontiguousarray makes scalars 1-d.
  tensors = {
    name: np.ascontiguousarray(value).reshape(value.shape)
    for name, value in state_dict.items()
  }
  # timm and others look for the format.
  return save(tensors, {'format': 'pt', HEADER_KEY: json.dumps(about)})


def _torch_file(state_dict, about) -> bytes:
  check_torch()
  import torch

  classes, palette = about.get('classes'), about.get('palette')
  # mmsegmentation 1.x reads `dataset_meta`, 0.x the names in capitals.
  meta = {'dataset_meta': {'classes': classes, 'palette': palette}}
  meta |= {'CLASSES': classes, 'PALETTE': palette}
  tensors = {
    # A copy, because PyTorch warns of arrays that cannot be written to.
    name: torch.from_numpy(np.array(value))
    for name, value in state_dict.items()
  }
  content = {'meta': meta if classes else {}, 'state_dict': tensors}
  file = io.BytesIO()
  torch.save(content | {HEADER_KEY: dict(about)}, file)
  return file.getvalue()


def sha256(path: Path) -> str:
  """In hexadecimal digits."""
  with Path(path).open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
