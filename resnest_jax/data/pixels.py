"""Decoded samples in one flat file, so that reading them decodes nothing.

    FOLDER/SPLIT.pixels    samples of equal length: the image, uint8 (H, W, 3)
                           RGB, the mask, uint8 (H, W), zeros up to 8 bytes
    FOLDER/SPLIT.json      size, names, checksums and source of the samples;
                           exists only if all are there
    FOLDER/SPLIT.progress  the same for the samples that are written so far

Reading a sample compares its checksum.
"""

import json
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from resnest_jax.errors import UserError
from resnest_jax.files import write_text
from resnest_jax.threads import map_in_threads


class PixelFile:
  """The samples of a split: dicts of `image`, `mask` and `name`."""

  def __init__(self, folder: Path, split: str):
    about = json.loads((folder / f'{split}.json').read_text('utf-8'))
    self.source = about['source']
    self._shape = tuple(about['size'])
    self._samples = about['samples']
    self._bytes = sample_bytes(*self._shape)
    path = folder / f'{split}.pixels'
    expected = self._bytes * len(self._samples)
    if (found := path.stat().st_size) != expected:
      raise ValueError(f'{path} has {found} bytes instead of {expected}')
    # Not a memory map: where preadv raises OSError, it would kill the process.
    self._file = os.open(path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._file)

  def __len__(self) -> int:
    return len(self._samples)

  def __getitem__(self, index: int) -> dict:
    name, checksum = self._samples[index]
    flat = np.empty(self._bytes, np.uint8)
    _read_into(self._file, flat, index * self._bytes)
    if _checksum(flat) != checksum:
      raise ValueError(f'{name} is not what was written')
    pixels = math.prod(self._shape)
    return {
      'image': flat[: 3 * pixels].reshape(*self._shape, 3),
      'mask': flat[3 * pixels : 4 * pixels].reshape(self._shape),
      'name': name,
    }

  def mask(self, index: int) -> np.ndarray:
    return self[index]['mask']


def sample_bytes(height: int, width: int) -> int:
  # 3 + 1 bytes a pixel, rounded up to the 64-bit words of the checksum.
  return -(-4 * height * width // 8) * 8


def _read_into(file: int, flat: np.ndarray, offset: int) -> None:
  rest = memoryview(flat)
  while rest:
    count = os.preadv(file, [rest], offset)  # Perhaps fewer than asked for.
    if count == 0:
      raise ValueError(f'the file ends {len(rest)} bytes too early')
    rest, offset = rest[count:], offset + count


def _checksum(flat: np.ndarray) -> int:
  # Modulo 2**64; runs at memory speed, unlike CRC-32.
  return int(flat.view(np.uint64).sum(dtype=np.uint64))


def is_written(folder: Path, split: str) -> bool:
  return (folder / f'{split}.json').is_file()


def write_pixels(
  folder: Path,
  split: str,
  read: Callable[[int], dict],
  count: int,
  source: str,
  on_progress: Callable[[int, int], None],
  check_space: Callable[[int], None] = lambda needed: None,
) -> None:
  """Writes all samples; resumes where an earlier call was stopped.

  `read(i)`, called by several threads, returns `image`, `mask` and `name`.
  `source` identifies the samples: progress with another one is discarded.
  `check_space` is called first, with the number of bytes that are missing.
  """
  height, width = read(0)['mask'].shape
  about = {'source': source, 'size': [height, width], 'count': count}
  done = _read_progress(folder, split, about)
  check_space(sample_bytes(height, width) * (count - len(done)))
  folder.mkdir(parents=True, exist_ok=True)
  progress = folder / f'{split}.progress'
  # Rewritten without a line that was cut off: appending is safe.
  lines = [json.dumps(line) + '\n' for line in (about, *done)]
  write_text(progress, ''.join(lines))
  path = folder / f'{split}.pixels'
  if not done:  # Or a link to a file of somebody else's would be emptied.
    path.unlink(missing_ok=True)
  with open(path, 'ab') as file, open(progress, 'a', encoding='utf-8') as log:
    file.truncate(len(done) * sample_bytes(height, width))
    for sample in map_in_threads(read, range(len(done), count), ahead=2):
      flat = _flattened(sample, height, width)
      file.write(flat)
      # Before the log line, which would else vouch for missing data.
      file.flush()
      done.append([sample['name'], _checksum(flat)])
      log.write(json.dumps(done[-1]) + '\n')
      log.flush()
      on_progress(len(done), count)
    os.fsync(file.fileno())
  about['samples'] = done
  write_text(folder / f'{split}.json', json.dumps(about))
  progress.unlink()


def _read_progress(folder: Path, split: str, about: dict) -> list[list]:
  try:
    lines = (folder / f'{split}.progress').read_text('utf-8').splitlines(True)
    size = (folder / f'{split}.pixels').stat().st_size
  except FileNotFoundError:
    return []
  lines = [json.loads(line) for line in lines if line.endswith('\n')]
  if not lines or lines[0] != about:
    return []
  # Log and pixels may reach the disk in any order: trust the shorter one.
  return lines[1 : 1 + size // sample_bytes(*about['size'])]


def _flattened(sample: dict, height: int, width: int) -> np.ndarray:
  flat = np.zeros(sample_bytes(height, width), np.uint8)
  end = 0
  for key, shape in ('image', (height, width, 3)), ('mask', (height, width)):
    array = sample[key]
    if array.shape != shape or array.dtype != np.uint8:
      raise UserError(
        f'{sample["name"]}: the {key} is {array.dtype} of shape {array.shape}, '
        f'expected uint8 {shape} as in the first sample. Decoded pixels are '
        'stored only for samples of one size.'
      )
    flat[end : end + array.size] = array.ravel()
    end += array.size
  return flat
