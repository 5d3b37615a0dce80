"""PyTorch's files, read without running their code."""

import importlib.util
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from resnest_jax.errors import UserError
from resnest_jax.text import listed
from resnest_jax.untrusted import brief

TORCH_INSTALL = (
  'pip install torch --index-url https://download.pytorch.org/whl/cpu'
)
# Packages whose objects lie next to weights: settings, paths, logs. PyTorch's
# restricted loader would refuse the file for them.
_BESIDE = re.compile(
  r'(argparse|pathlib|datetime|typing|omegaconf|mmengine|mmcv|ml_collections'
  r'|pytorch_lightning|lightning|lightning_fabric)\.'
  r'|numpy\.|collections\.defaultdict$'
  # What an enumeration calls, and the defaults of a defaultdict.
  r'|(__builtin__|builtins)\.(getattr|list|tuple|dict|set|int|float|str|bool)$'
)
# PyTorch stores arrays as they are; zip archives that others have packed again
# are a little smaller than their contents, and bombs a thousand times.
_MOST_PACKED = 4


class _Ignored:
  # A pickle creates objects by a call or by __new__, with any arguments, which
  # object.__new__ accepts if __init__ does, and then sets their state.

  def __init__(self, *_, **__):
    pass

  def __setstate__(self, _):
    pass


class _Mapping:
  def __new__(cls, *_):
    return {}  # The restricted loader fills plain ones only.


def check_torch() -> None:
  """Raises `UserError` if PyTorch is not installed, without importing it."""
  if importlib.util.find_spec('torch') is None:
    raise UserError(
      'PyTorch files need the package torch (its CPU build will do): '
      f'{TORCH_INSTALL}. safetensors files need nothing more.'
    )


def load_pickle(path: Path) -> Any:
  """What a PyTorch file holds; objects of other packages are empty shells.

  `UserError`: damaged, a pickle that would run code, a file that unpacks to
  many times its size, or PyTorch is not installed.
  """
  check_torch()
  import torch

  _check_packed(path)
  ignored: list[str] = []
  while True:
    shells = [
      (_Mapping if name.startswith('collections.') else _Ignored, name)
      for name in ignored
    ]
    try:
      with warnings.catch_warnings(), torch.serialization.safe_globals(shells):
        warnings.simplefilter('ignore')
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # Damaged files raise errors of many kinds.
      # PyTorch names them one at a time.
      name = _wanted(error)
      if _BESIDE.match(name) and name not in ignored:
        ignored.append(name)
        continue
      raise UserError(f'{path} {_why_not(error)}') from error


def _check_packed(path: Path) -> None:
  most = _MOST_PACKED * path.stat().st_size
  try:
    with zipfile.ZipFile(path) as file:
      entries, damaged = file.infolist(), None
      unpacked = sum(entry.file_size for entry in entries)
      # PyTorch compares no checksums. Told to compute none, it writes zeros.
      if unpacked <= most and any(entry.CRC for entry in entries):
        damaged = file.testzip()
  except Exception:  # Of many kinds, as PyTorch's own.
    return  # A bare pickle, or damaged, which PyTorch notices.
  names = [entry.filename for entry in entries]
  if not any(name.endswith('/data.pkl') for name in names):
    inside = listed(map(brief, names), 3) or 'nothing'
    raise UserError(
      f'{path} is a zip archive but no PyTorch file: it has no data.pkl, but '
      f'{inside}. If weights are inside, unpack it and give them.'
    )
  if unpacked > most:
    raise UserError(
      f'{path} would unpack to {unpacked / 1e9:.1f} GB, many times its size, '
      'which weights never do; it was not read. Use another source.'
    )
  if damaged:
    raise UserError(
      f'{path} is damaged: {brief(damaged)} in it does not match its checksum. '
      'Get it again.'
    )


def _wanted(error: Exception) -> str:
  # The object whose absence is the error, or ''.
  found = re.search(r'GLOBAL (\S+)', str(error))
  name = found[1] if found else ''
  return name if '.' in name or not name else f'builtins.{name}'


def _why_not(error: Exception) -> str:
  # Not PyTorch's own message: it advises `weights_only=False`, to run the code.
  if name := _wanted(error):
    return (
      f'wants to run {name}, which weights do not need; it was not run '
      'and nothing was read. Use another source, or a safetensors file.'
    )
  if 'weights_only' in str(error):
    return (
      "holds more than weights: PyTorch's restricted loader, which runs no "
      'code of a file, refuses it, and nothing was read. Use another source, '
      'or a safetensors file.'
    )
  return (
    'cannot be read as a PyTorch file: it is damaged or cut off. Get it again.'
  )


def to_numpy(path: Path, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Tensors as NumPy arrays, half precision as float32; or a `UserError`."""
  import torch

  half = (torch.float16, torch.bfloat16)
  kinds = 'float32 float64 bool uint8 int8 int16 int32 int64'
  whole = tuple(getattr(torch, kind) for kind in kinds.split())
  arrays, size, most = {}, 0, _MOST_PACKED * path.stat().st_size
  for name, value in tensors.items():
    kind = value.dtype if value.layout is torch.strided else value.layout
    if kind not in half + whole or value.is_quantized or value.is_meta:
      raise unknown_type(path, name, kind)
    used = value.numel() * value.element_size()
    size += used
    # Strides of 0 make terabytes out of one number.
    if used > value.untyped_storage().nbytes() or size > most:
      raise UserError(
        f'{path} has less data than its tensors need: {name} of shape '
        f'{tuple(value.shape)} repeats what is there. It was not read. Save '
        'copies (tensor.clone()), or use another source.'
      )
    value = value.detach().resolve_neg()
    arrays[name] = (value.float() if value.dtype in half else value).numpy()
  return arrays


def unknown_type(path: Path, name: str, kind: object) -> UserError:
  return UserError(
    f'{path}: {name} is of type {kind}, which is not read. Accepted are '
    'float16, bfloat16, float32, float64 and whole numbers: save it as one of '
    'them.'
  )
