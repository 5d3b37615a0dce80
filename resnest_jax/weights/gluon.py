"""GluonCV's files, MXNet's lists of named arrays, read without MXNet.

A file is 0x112 and 0 in 8 bytes each, a vector of arrays and a vector of names;
vectors begin with their length in 8 bytes. An array is 0xf993fac9 (0xf993faca
with NumPy's shapes), its storage (0: dense), its dimensions in 4 bytes and 8
each, device, device's number and type in 4 bytes each, and its values. All is
little-endian.
"""

import math
import re
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from resnest_jax.errors import UserError
from resnest_jax.text import listed

MAGIC = struct.pack('<Q', 0x112)
_ARRAYS = (0xF993FAC9, 0xF993FACA)
_TYPES = {0: '<f4', 1: '<f8', 2: '<f2'}
_MOST_AXES = 8
# GluonCV's names -> PyTorch-Encoding's.
_NAMES = (
  (r'\.gamma$', '.weight'),
  (r'\.beta$', '.bias'),
  (r'\.conv2\.bn\.', '.conv2.bn0.'),
  (r'^head\.aspp\.concurent\.', 'head.aspp.b'),
  (r'^auxlayer\.block\.', 'auxlayer.conv5.'),
)


def read_gluon(path: Path) -> dict[str, np.ndarray]:
  """The arrays of a file, by PyTorch-Encoding's or the authors' names.

  `UserError`: damaged, longer than its arrays, or of types that weights lack.
  """
  try:
    with path.open('rb') as file:
      arrays = _read(file, path.stat().st_size)
  except ValueError as error:
    raise UserError(
      f'{path} is damaged, or no weights of GluonCV: {error}. Get it again, or '
      'use another source.'
    ) from error
  heads = [x for x in arrays if re.match(r'head\.|auxlayer\.', x)]
  backbone = 'pretrained.' if heads else ''  # Of a classifier there are none.
  return {x if x in heads else backbone + x: arrays[x] for x in arrays}


def _read(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
  def take(form: str) -> tuple[int, ...]:
    if (number := struct.calcsize(form)) > left():
      raise ValueError('it is cut off')
    return struct.unpack(form, file.read(number))

  def left() -> int:
    return size - file.tell()

  def length() -> int:
    (number,) = take('<Q')
    if number > left():
      raise ValueError(f'it ends before {number} entries')
    return number

  def array() -> np.ndarray:
    magic, storage, axes = take('<IiI')
    if magic not in _ARRAYS or storage or not 0 < axes <= _MOST_AXES:
      raise ValueError(
        f'an array begins with {magic:#x}, {storage}, {axes}; accepted are '
        'dense ones of MXNet 1'
      )
    shape = take(f'<{axes}q')
    _, _, kind = take('<iii')
    if kind not in _TYPES:
      raise ValueError(f'an array has type {kind}; accepted are {[*_TYPES]}')
    dtype = np.dtype(_TYPES[kind])
    number = math.prod(shape)
    if min(shape) < 1 or number * dtype.itemsize > left():
      raise ValueError(f'it ends before an array of shape {shape}')
    value = np.fromfile(file, dtype, number).reshape(shape)
    return value.astype(np.float32) if kind == 2 else value

  def name() -> str:
    text = file.read(length()).decode()
    for old, new in _NAMES:
      text = re.sub(old, new, text)
    return text

  take('<QQ')
  arrays = [array() for _ in range(length())]
  names = [name() for _ in range(length())]
  if len({*names}) != len(arrays) or left():
    raise ValueError(
      f'it has {len(arrays)} arrays, {len({*names})} names '
      f'({listed(names, 3)}) and {left()} more bytes'
    )
  return dict(zip(names, arrays, strict=True))
