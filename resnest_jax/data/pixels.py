"""Decoded samples in one flat file, so that reading them decodes nothing.

    FOLDER/SPLIT.pixels    all samples, each as long as the others: the image,
                           uint8 (H, W, 3) RGB, then the mask, uint8 (H, W),
                           as decoded, then zeros up to a multiple of 8 bytes
    FOLDER/SPLIT.json      their size, names and checksums, and what they were
                           decoded from; there only if all samples are
    FOLDER/SPLIT.progress  the same for the samples that are written so far

A sample of 2048 x 1024 pixels takes 8.4 MB. Each is compared with its checksum
when it is read.
"""

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from resnest_jax.errors import UserError
from resnest_jax.files import write_text
from resnest_jax.threads import map_in_threads


class PixelFile:
  """The samples of a split; threads may share it.

  `file[i]` is a dict of `image`, `mask` and `name`.

  Attributes:
    source: what was given to `write_pixels`.

  Raises:
    ValueError: the files are damaged, or (on indexing) the sample is.
    OSError: they cannot be read.
  """

  def __init__(self, folder: Path, split: str):
    about = json.loads((folder / f'{split}.json').read_text('utf-8'))
    self.source = about['source']
    self._height, self._width = about['size']
    self._samples = about['samples']
    self._bytes = sample_bytes(self._height, self._width)
    path = folder / f'{split}.pixels'
    expected = self._bytes * len(self._samples)
    if (found := path.stat().st_size) != expected:
      raise ValueError(f'{path} has {found} bytes instead of {expected}')
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
    pixels = self._height * self._width
    shape = self._height, self._width
    return {
      'image': flat[: 3 * pixels].reshape(*shape, 3),
      'mask': flat[3 * pixels : 4 * pixels].reshape(shape),
      'name': name,
    }

  def mask(self, index: int) -> np.ndarray:
    """The mask alone."""
    return self[index]['mask']


def sample_bytes(height: int, width: int) -> int:
  """How many bytes a sample takes."""
  return -(-4 * height * width // 8) * 8


def _read_into(file: int, flat: np.ndarray, offset: int) -> None:
  """Fills `flat` with what stands at `offset`."""
  rest = memoryview(flat)
  while rest:
    count = os.preadv(file, [rest], offset)
    if count == 0:
      raise ValueError(f'the file ends {len(rest)} bytes too early')
    rest, offset = rest[count:], offset + count


def _checksum(flat: np.ndarray) -> int:
  """The sum of all 64-bit words: quick, and no single change leaves it."""
  return int(flat.view(np.uint64).sum(dtype=np.uint64))


def is_written(folder: Path, split: str) -> bool:
  """Whether all samples of the split are there."""
  return (folder / f'{split}.json').is_file()


def bytes_to_write(
  folder: Path,
  split: str,
  read: Callable[[int], dict],
  count: int,
  source: str,
) -> int:
  """How many bytes `write_pixels` would add to those that are there."""
  about = _describe(read, count, source)
  done = _read_progress(folder, split, about)
  return sample_bytes(*about['size']) * (count - len(done))


def write_pixels(
  folder: Path,
  split: str,
  read: Callable[[int], dict],
  count: int,
  source: str,
  on_progress: Callable[[int, int], None],
) -> None:
  """Writes every sample; goes on where an earlier call was stopped.

  Args:
    folder: made if needed.
    split: name of the files.
    read: `read(i)` is a dict of `image` uint8 (H, W, 3), `mask` uint8 (H, W)
      and `name`, the same size for all; called by several threads.
    count: how many there are.
    source: identifies what the samples are; an earlier call with another one
      does not count.
    on_progress: called with (samples done, samples in all).

  Raises:
    UserError: a sample of another size or type than 8 bits a channel.
  """
  folder.mkdir(parents=True, exist_ok=True)
  about = _describe(read, count, source)
  height, width = about['size']
  done = _read_progress(folder, split, about)
  progress = folder / f'{split}.progress'
  lines = [json.dumps(line) + '\n' for line in (about, *done)]
  progress.write_text(''.join(lines), 'utf-8')
  path = folder / f'{split}.pixels'
  with open(path, 'ab') as file, open(progress, 'a', encoding='utf-8') as log:
    file.truncate(len(done) * sample_bytes(height, width))
    for sample in map_in_threads(read, range(len(done), count), ahead=2):
      flat = _flattened(sample, height, width)
      file.write(flat)
      file.flush()  # Before the line that says that it is there.
      done.append([sample['name'], _checksum(flat)])
      log.write(json.dumps(done[-1]) + '\n')
      log.flush()
      on_progress(len(done), count)
    os.fsync(file.fileno())
  about['samples'] = done
  write_text(folder / f'{split}.json', json.dumps(about))
  progress.unlink()


def _describe(read: Callable[[int], dict], count: int, source: str) -> dict:
  """The first line of the progress file."""
  height, width = read(0)['mask'].shape[:2]
  return {'source': source, 'size': [height, width], 'count': count}


def _read_progress(folder: Path, split: str, about: dict) -> list[list]:
  """Name and checksum of each sample that an interrupted call has written."""
  try:
    lines = (folder / f'{split}.progress').read_text('utf-8').splitlines(True)
    size = (folder / f'{split}.pixels').stat().st_size
  except FileNotFoundError:
    return []
  # A last line without an end was being written.
  lines = [json.loads(line) for line in lines if line.endswith('\n')]
  if not lines or lines[0] != about:
    return []
  return lines[1 : 1 + size // sample_bytes(*about['size'])]


def _flattened(sample: dict, height: int, width: int) -> np.ndarray:
  """Image and mask one after the other."""
  flat = np.zeros(sample_bytes(height, width), np.uint8)
  end = 0
  for key, shape in (
    ('image', (height, width, 3)),
    ('mask', (height, width)),
  ):
    array = sample[key]
    if array.shape != shape or array.dtype != np.uint8:
      raise UserError(
        f'{sample["name"]}: the {key} is {array.dtype} of shape {array.shape}, '
        f'that of the first sample uint8 {shape}. Decoded pixels are '
        'stored for samples of one size only.'
      )
    flat[end : end + array.size] = array.ravel()
    end += array.size
  return flat
