"""Checks a zip file as the test server would, without the server."""

import collections
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from resnest_jax.data.images import MAX_PIXELS, decode_image, png_header
from resnest_jax.errors import UserError
from resnest_jax.evaluation.submission import rules
from resnest_jax.evaluation.submission.rules import Benchmark, ImageSize
from resnest_jax.findings import Finding
from resnest_jax.labels import IGNORE
from resnest_jax.progress import progress_bar
from resnest_jax.text import listed, plural, share_of
from resnest_jax.threads import map_in_threads
from resnest_jax.untrusted import DAMAGED, check_entry

_Values = Mapping[str, set[int]]  # Name of a mask -> the values in it.

# --- Single masks ------------------------------------------------------------


class Mask(NamedTuple):
  fault: str = ''  # A key of `_FAULTS`, '' if there is none.
  detail: str = ''  # The value that is not accepted.
  pixels: np.ndarray | None = None  # uint8 (H, W); None if there is a fault.
  counts: np.ndarray = np.zeros(256, np.int64)  # Pixels of each value.


def read_mask(png: bytes, size: ImageSize | None) -> Mask:
  """Decodes a mask: an 8-bit grey PNG of a given size (None: any)."""
  # The header first: OpenCV expands palettes into colours.
  header = png_header(png)
  if header is None:
    return Mask('not_png', 'no PNG file')
  if (header.bits, header.colour) != (8, 'grey'):
    return Mask('mode', f'{header.bits}-bit {header.colour}')
  if size is not None and (header.width, header.height) != tuple(size):
    wrong = f'{header.width} x {header.height}'
    return Mask('size', f'{wrong} instead of {size[0]} x {size[1]}')
  if header.width * header.height > MAX_PIXELS:
    return Mask('pixels', f'{header.width} x {header.height}')
  pixels = decode_image(png, cv2.IMREAD_UNCHANGED)
  if pixels is None:
    return Mask('damaged', 'damaged')
  # In parts: np.bincount takes eight bytes a pixel.
  parts = np.array_split(pixels.ravel(), -(-pixels.size // 2**20))
  counts = sum(np.bincount(part, minlength=256) for part in parts)
  return Mask(pixels=pixels, counts=counts)


# In the order of reports: what 'N of M files' do, and the remedy.
_FAULTS = {
  'not_png': ('are', 'not PNG', 'Save masks as PNG.'),
  'mode': (
    'are',
    'not 8-bit grey',
    'A mask has one channel of 8 bits that holds the class number: no colours, '
    'no palette, no transparency.',
  ),
  'size': (
    'have',
    'another size than the image',
    'Predict the original images, not resized ones; predict.py keeps the size.',
  ),
  'pixels': (
    'have',
    f'more than {MAX_PIXELS} pixels, the most that are decoded',
    'Predict the original images; predict.py keeps the size.',
  ),
  'damaged': ('cannot', 'be decoded', 'Write the zip again.'),
}


def check_files(masks: Mapping[str, Mask]) -> list[Finding]:
  """Files that are not masks of the right kind; `masks` is name -> mask."""
  findings = []
  for fault, (verb, what, remedy) in _FAULTS.items():
    found = {n: mask.detail for n, mask in masks.items() if mask.fault == fault}
    # Thousands of masks usually have the same fault.
    details = listed(dict.fromkeys(found.values()))
    findings += rules.if_any(
      found,
      f'{share_of(found, masks, "file", verb)} {what}: {details}.',
      remedy,
    )
  return findings


def check_values(
  benchmark: Benchmark, masks: Mapping[str, Mask]
) -> tuple[list[Finding], list[Finding]]:
  """Errors and warnings about the values; `masks` is name -> mask."""
  values = {
    name: set(np.flatnonzero(mask.counts).tolist())
    for name, mask in masks.items()
    if not mask.fault
  }
  if benchmark.name == 'cityscapes':
    return _check_label_ids(benchmark, values)
  return _check_counted_from_one(benchmark, values), []


def _check_label_ids(
  benchmark: Benchmark, values: _Values
) -> tuple[list[Finding], list[Finding]]:
  classes = set(benchmark.mask_values.tolist())
  train_ids = set(range(len(classes)))
  # Train ids 0 to 18 and label ids 7 to 33 overlap, so a single mask may fit
  # both. 0 is road as a train id and "unlabeled" as a label id: it counts as
  # the second unless no mask in the zip file has a value above 18.
  seen = set().union(*values.values())
  void = set() if seen - {IGNORE} <= train_ids else {0}
  # All values can be train ids, and at least one cannot be a label id that the
  # network predicts.
  trained = [
    name
    for name, v in values.items()
    if v <= train_ids | {IGNORE} and v - classes - void - {IGNORE}
  ]
  errors = rules.if_any(
    trained,
    f'{share_of(trained, values, "mask", "have")} train ids: values 0 to 18, '
    'which mean road to bicycle only in training.',
    'The server expects label ids, 7 for road to 33 for bicycle. Write the zip '
    'with this command, from the masks of predict.py.',
  )
  # Masks of train ids would break the rules below as well: one finding each.
  rest = {name: v for name, v in values.items() if name not in set(trained)}
  wrong, numbers = _with_any(rest, range(34, 256))
  errors += rules.if_any(
    wrong,
    f'{share_of(wrong, values, "mask", "have")} values that are no label id: '
    f'{numbers}; accepted are {listed(sorted(classes), 99)}.',
    'Every pixel needs a class; the server refuses 255.',
  )
  # The server accepts ids that it does not evaluate, such as 1, ego vehicle.
  unused, numbers = _with_any(rest, set(range(34)) - classes)
  return errors, rules.if_any(
    unused,
    f'{share_of(unused, values, "mask", "have")} label ids that are not '
    f'evaluated: {numbers}. Such a pixel can only be wrong.',
    'Predict one of the 19 evaluated classes for every pixel.',
  )


def _with_any(values: _Values, wrong: Iterable[int]) -> tuple[list[str], str]:
  """Masks with any of the values; and those that occur, in words."""
  found = {name: v.intersection(wrong) for name, v in values.items()}
  seen = sorted(set().union(*found.values()))
  return [name for name, v in found.items() if v], listed(seen)


def _check_counted_from_one(
  benchmark: Benchmark, values: _Values
) -> list[Finding]:
  last = len(benchmark.labels.classes)
  zero, _ = _with_any(values, [0])
  what = f'{share_of(zero, values, "mask", "have")} the value 0'
  # 0 has two causes. The highest class tells them apart: masks that count from
  # 0 never reach it, correct ones of thousands of images almost surely do.
  if any(last in v for v in values.values()):
    what += ', which is "other" and no class.'
    remedy = 'Predict one of the classes 1 to 150 for every pixel.'
  else:
    what += (
      f', and none has {last}: they count the classes from 0, the server '
      'counts from 1. Every class would be taken for the one before it.'
    )
    remedy = (
      'Add 1 to every pixel, or write the zip with this command, from the '
      'masks of predict.py.'
    )
  high, numbers = _with_any(values, range(last + 1, 256))
  return rules.if_any(zero, what, remedy) + rules.if_any(
    high,
    f'{share_of(high, values, "mask", "have")} values above {last}: {numbers}.',
    f'Accepted are 1 to {last}. Add 1 to the class numbers only once.',
  )


# --- The whole file ----------------------------------------------------------


class Verdict(NamedTuple):
  """The result of `validate`."""

  benchmark: Benchmark
  files: int  # Test images that have a mask.
  errors: list[Finding]
  warnings: list[Finding]
  pixels: np.ndarray  # int64 (C,), pixels of each class.
  images: np.ndarray  # int64 (C,), masks that contain the class.


def validate(
  path: Path, benchmark: Benchmark | None = None, images: Path | None = None
) -> Verdict:
  """Finds the faults of a zip file.

  Without `benchmark` the server is guessed from the names in the file. Without
  `images`, a folder or zip file, some names and sizes are not checked.
  """
  if not path.is_file():
    raise UserError(f'there is no file {path}.')
  try:
    archive = zipfile.ZipFile(path)
  except DAMAGED as error:
    raise UserError(
      f'{path} is no zip file, or is cut off ({error}). Write it again.'
    ) from error
  with archive:
    entries = [x for x in archive.infolist() if not x.is_dir()]
    benchmark = benchmark or guess(path, entries)
    sizes = images and rules.read_images(benchmark, images)
    errors, named = _check_entries(entries, benchmark)
    errors += rules.check_names(benchmark, named, sizes)
    masks = _read_masks(archive, named, benchmark, sizes or {})
  errors += check_files(masks)
  more, warnings = check_values(benchmark, masks)
  if sizes is not None and len(sizes) != benchmark.number:
    what = (
      f'--images has {len(sizes)} test images, {benchmark.name} has '
      f'{benchmark.number}.'
    )
    remedy = 'Give all of them, or omit --images.'
    warnings.insert(0, Finding(what, (), remedy))
  # (masks, C) by train ids; reshaped because a zip file may hold no mask.
  counts = np.array([m.counts for m in masks.values()]).reshape(-1, 256)
  counts = counts[:, benchmark.mask_values]
  of_classes = counts.sum(0), np.count_nonzero(counts, axis=0)
  return Verdict(benchmark, len(named), errors + more, warnings, *of_classes)


def guess(path: Path, entries: Sequence[zipfile.ZipInfo]) -> Benchmark:
  # By most of the names: a few foreign ones are a fault to report later.
  names = [entry.filename.rsplit('/', 1)[-1] for entry in entries]
  numbers = {
    name: sum(b.submitted(n) is not None for n in names)
    for name, b in rules.BENCHMARKS.items()
  }
  best = max(numbers, key=numbers.get)
  if not numbers[best]:
    raise UserError(
      f'{path} has no file with a name of Cityscapes or ADE20K (the first of '
      f'{len(names)} is {names[0] if names else "missing"}); name the server '
      f'with --benchmark {" or ".join(rules.BENCHMARKS)}.'
    )
  return rules.BENCHMARKS[best]


def _check_entries(
  entries: Sequence[zipfile.ZipInfo], benchmark: Benchmark
) -> tuple[list[Finding], dict[str, list[zipfile.ZipInfo]]]:
  """Errors in names and folders of the files; and key -> its masks."""
  foreign, deep = [], []
  named = collections.defaultdict(list)
  for entry in entries:
    folder, _, name = entry.filename.rpartition('/')
    if key := benchmark.submitted(name):
      named[key].append(entry)
      if folder and not benchmark.folders:
        deep.append(entry.filename)
    else:
      foreign.append(entry.filename)
  twice = {key: group for key, group in named.items() if len(group) > 1}
  errors = rules.if_any(
    foreign,
    f'{plural(len(foreign), "file", "have")} names that no test image has.',
    f'The mask of {benchmark.example} is named '
    f'{benchmark.image(benchmark.example)}{benchmark.suffix}.',
  )
  errors += rules.if_any(
    deep,
    f'{plural(len(deep), "mask", "are")} in folders.',
    'Zip the files, not the folder that they are in.',
  )
  errors += rules.if_any(
    [x.filename for group in twice.values() for x in group],
    f'{plural(len(twice), "test image", "have")} several masks.',
    'Keep one of each: the server stops where there are several.',
  )
  return errors, named


def _read_masks(
  archive: zipfile.ZipFile,
  named: Mapping[str, Sequence[zipfile.ZipInfo]],
  benchmark: Benchmark,
  images: Mapping[str, ImageSize],
) -> dict[str, Mask]:
  """Name in the archive -> mask, without its pixels."""
  items = [(key, entry) for key, group in named.items() for entry in group]

  def read(item: tuple[str, zipfile.ZipInfo]) -> Mask:
    key, entry = item
    size = images.get(key, benchmark.size)
    # Reading checks the CRC. Threads may share the archive: zipfile locks its
    # file.
    try:
      check_entry(archive, entry)
      png = archive.read(entry)
    except (UserError, *DAMAGED) as error:
      return Mask('damaged', f'not readable ({error})')
    # 1525 masks of Cityscapes would take 3 GB.
    return read_mask(png, size)._replace(pixels=None)

  masks = {}
  with progress_bar('reading masks') as report:
    found = zip(items, map_in_threads(read, items), strict=True)
    for (_, entry), mask in found:
      masks[entry.filename] = mask
      report(len(masks), len(items))
  return masks
