"""Checks a zip file as the test server would, without the server."""

import collections
import dataclasses
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from resnest_jax.data.images import decode_image, png_header
from resnest_jax.errors import UserError
from resnest_jax.evaluation.submission import rules
from resnest_jax.evaluation.submission.rules import (
  BENCHMARKS,
  Benchmark,
  ImageSize,
)
from resnest_jax.findings import Finding
from resnest_jax.labels import IGNORE
from resnest_jax.progress import progress_bar
from resnest_jax.text import listed
from resnest_jax.threads import map_in_threads

# --- Single masks ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mask:
  fault: str = ''  # A key of `_FAULTS`, '' if there is none.
  detail: str = ''  # The value that is not accepted.
  pixels: np.ndarray | None = None  # uint8 (H, W); None if there is a fault.
  # int64 (256,), pixels of each value.
  counts: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(256, np.int64)
  )


def read_mask(png: bytes, size: ImageSize | None) -> Mask:
  """Decodes a mask: an 8-bit grey PNG of a given size (None: any)."""
  # The header is checked before the pixels: OpenCV expands palettes into
  # colours, and decoding a file of a wrong size only costs time and memory.
  header = png_header(png)
  if header is None:
    return Mask('not_png', 'no PNG file')
  if (header.bits, header.colour) != (8, 'grey'):
    return Mask('mode', f'{header.bits}-bit {header.colour}')
  if size is not None and (header.width, header.height) != tuple(size):
    return Mask(
      'size',
      f'{header.width} x {header.height} instead of {size[0]} x {size[1]}',
    )
  pixels = decode_image(png, cv2.IMREAD_UNCHANGED)
  if pixels is None:
    return Mask('damaged', 'damaged')
  counts = np.bincount(pixels.ravel(), minlength=256)
  return Mask(pixels=pixels, counts=counts)


# In the order in which they are reported; each follows 'N of M files'.
_FAULTS = {
  'not_png': 'are no PNG files',
  'mode': 'are not 8-bit grey',
  'size': 'have another size than their image',
  'damaged': 'cannot be decoded',
}
_REMEDIES = {
  'not_png': 'Save masks as PNG.',
  'mode': (
    'A mask has one channel of 8 bits that holds the class number: no colours, '
    'no palette, no transparency.'
  ),
  'size': (
    'Predict the original images, not resized ones; predict.py keeps the size.'
  ),
  'damaged': 'Write the zip again.',
}


def check_files(masks: Mapping[str, Mask]) -> list[Finding]:
  """Files that are not masks of the right kind; `masks` is name -> mask."""
  findings = []
  for fault, what in _FAULTS.items():
    found = {n: mask.detail for n, mask in masks.items() if mask.fault == fault}
    if found:
      # One finding for a kind of fault, with its distinct details: thousands of
      # masks usually have the same fault.
      details = collections.Counter(found.values())
      findings.append(
        Finding(
          f'{len(found)} of {len(masks)} files {what}: {listed(details)}.',
          tuple(found),
          _REMEDIES[fault],
        )
      )
  return findings


def check_values(
  benchmark: Benchmark, masks: Mapping[str, Mask]
) -> tuple[list[Finding], list[Finding]]:
  """Errors and warnings about the values; `masks` is name -> mask."""
  # Only which values occur decides, so that pixels need not stay in memory.
  values = {
    name: set(np.flatnonzero(mask.counts).tolist())
    for name, mask in masks.items()
    if not mask.fault
  }
  if benchmark.name == 'cityscapes':
    return _check_label_ids(benchmark, values)
  return _check_counted_from_one(benchmark, values), []


def _check_label_ids(
  benchmark: Benchmark, values: Mapping[str, set[int]]
) -> tuple[list[Finding], list[Finding]]:
  classes = set(benchmark.mask_values[: len(benchmark.labels.classes)].tolist())
  train_ids = set(range(len(classes)))
  # Train ids 0 to 18 and label ids 7 to 33 overlap, so a single mask may fit
  # both. 0 is road as a train id and "unlabeled" as a label id: it counts as
  # the second unless no mask in the zip file has a value above 18.
  seen = set().union(*values.values())
  void = set() if seen - {IGNORE} <= train_ids else {0}
  errors, warnings = [], []
  # All values can be train ids, and at least one cannot be a label id that the
  # network predicts.
  trained = [
    name
    for name, v in values.items()
    if v <= train_ids | {IGNORE} and v - classes - void - {IGNORE}
  ]
  if trained:
    errors.append(
      Finding(
        f'{len(trained)} of {len(values)} masks hold train ids: their values '
        'are 0 to 18, which mean road to bicycle only in training.',
        tuple(trained),
        'The server expects label ids, 7 for road to 33 for bicycle. Write the '
        'zip with this command, from the masks of predict.py.',
      )
    )
  # Masks of train ids would break the rules below as well: one finding each.
  rest = {name: v for name, v in values.items() if name not in set(trained)}
  if wrong := {n: v for n, v in rest.items() if any(x > 33 for x in v)}:
    seen = sorted({x for v in wrong.values() for x in v if x > 33})
    errors.append(
      Finding(
        f'{len(wrong)} of {len(values)} masks have values that are no label '
        f'id: {listed(seen)}; accepted are {listed(sorted(classes), 99)}.',
        tuple(wrong),
        'Every pixel needs a class; the server refuses 255.',
      )
    )
  # The server accepts label ids of classes that it does not evaluate, such as
  # 1 for the ego vehicle. They are a warning only.
  unused = {n: v for n, v in rest.items() if {x for x in v if x < 34} - classes}
  if unused:
    seen = sorted({x for v in unused.values() for x in v if x < 34} - classes)
    warnings.append(
      Finding(
        f'{len(unused)} of {len(values)} masks have label ids that are not '
        f'evaluated: {listed(seen)}. Such a pixel can only be wrong.',
        tuple(unused),
        'Predict one of the 19 evaluated classes for every pixel.',
      )
    )
  return errors, warnings


def _check_counted_from_one(
  benchmark: Benchmark, values: Mapping[str, set[int]]
) -> list[Finding]:
  last = len(benchmark.labels.classes)
  seen = set().union(*values.values())
  findings = []
  # 0 has two causes. The highest class tells them apart: masks that count from
  # 0 never reach it, correct ones of thousands of images almost surely do.
  if zero := tuple(name for name, v in values.items() if 0 in v):
    if last in seen:
      what = (
        f'{len(zero)} of {len(values)} masks have the value 0, which is '
        '"other" and no class.'
      )
      remedy = 'Predict one of the classes 1 to 150 for every pixel.'
    else:
      what = (
        f'{len(zero)} of {len(values)} masks have the value 0, and none has '
        f'{last}: they count the classes from 0, the server counts from 1. '
        'Every class would be taken for the one before it.'
      )
      remedy = (
        'Add 1 to every pixel, or write the zip with this command, from the '
        'masks of predict.py.'
      )
    findings.append(Finding(what, zero, remedy))
  if high := {n: v for n, v in values.items() if max(v, default=0) > last}:
    seen = sorted({x for v in high.values() for x in v if x > last})
    findings.append(
      Finding(
        f'{len(high)} of {len(values)} masks have values above {last}: '
        f'{listed(seen)}.',
        tuple(high),
        f'Accepted are 1 to {last}. Add 1 to the class numbers only once.',
      )
    )
  return findings


# --- The whole file ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The result of `validate`."""

  benchmark: Benchmark
  files: int  # Test images that have a mask.
  errors: list[Finding]
  warnings: list[Finding]
  pixels: np.ndarray  # int64 (C,), pixels of each class.
  images: np.ndarray  # int64 (C,), masks that contain the class.


def validate(
  path: Path,
  benchmark: Benchmark | None = None,
  images: Path | None = None,
) -> Verdict:
  """Finds the faults of a zip file.

  Without `benchmark` the server is guessed from the names in the file. Without
  `images`, a folder or zip file, some names and sizes are not checked.
  """
  if not path.is_file():
    raise UserError(f'there is no file {path}.')
  try:
    with zipfile.ZipFile(path) as archive:
      entries = [x for x in archive.infolist() if not x.is_dir()]
      benchmark = benchmark or guess(path, entries)
      sizes = images and rules.read_images(benchmark, images)
      return _validate(archive, entries, benchmark, sizes)
  except zipfile.BadZipFile as error:
    raise UserError(
      f'{path} is no zip file, or is cut off ({error}). Write it again.'
    ) from error


def guess(path: Path, entries: Sequence[zipfile.ZipInfo]) -> Benchmark:
  # By most of the names: a few foreign ones are a fault to report later.
  names = [entry.filename.rsplit('/', 1)[-1] for entry in entries]
  numbers = {
    name: sum(b.submitted(n) is not None for n in names)
    for name, b in BENCHMARKS.items()
  }
  best = max(numbers, key=numbers.get)
  if not numbers[best]:
    raise UserError(
      f'{path} has no file with a name of Cityscapes or ADE20K (the first of '
      f'{len(names)} is {names[0] if names else "missing"}); name the server '
      f'with --benchmark {" or ".join(BENCHMARKS)}.'
    )
  return BENCHMARKS[best]


def _validate(
  archive: zipfile.ZipFile,
  entries: Sequence[zipfile.ZipInfo],
  benchmark: Benchmark,
  images: Mapping[str, ImageSize] | None,
) -> Verdict:
  errors, named = _check_entries(entries, benchmark)
  errors += rules.check_names(benchmark, named, images)
  warnings = []
  # The names above are then compared with an incomplete list.
  if images is not None and len(images) != benchmark.number:
    warnings.append(
      Finding(
        f'--images has {len(images)} test images, {benchmark.name} has '
        f'{benchmark.number}.',
        (),
        'Give all of them, or omit --images.',
      )
    )
  masks = _read_masks(archive, named, benchmark, images or {})
  errors += check_files(masks)
  more_errors, more_warnings = check_values(benchmark, masks)
  # (masks, 256) -> (masks, C), from values in the file to train ids. The shape
  # is given because a zip file may hold no mask.
  counts = np.array([m.counts for m in masks.values()]).reshape(-1, 256)
  counts = counts[:, benchmark.mask_values[: len(benchmark.labels.classes)]]
  return Verdict(
    benchmark=benchmark,
    files=len(named),
    errors=errors + more_errors,
    warnings=warnings + more_warnings,
    pixels=counts.sum(0),
    images=np.count_nonzero(counts, axis=0),
  )


def _check_entries(
  entries: Sequence[zipfile.ZipInfo], benchmark: Benchmark
) -> tuple[list[Finding], dict[str, list[zipfile.ZipInfo]]]:
  """Errors in names and folders of the files; and key -> its masks."""
  errors, foreign, deep = [], [], []
  named = collections.defaultdict(list)
  for entry in entries:
    folder, _, name = entry.filename.rpartition('/')
    if key := benchmark.submitted(name):
      named[key].append(entry)
      if folder and not benchmark.folders:
        deep.append(entry.filename)
    else:
      foreign.append(entry.filename)
  if foreign:
    errors.append(
      Finding(
        f'{len(foreign)} files have names that no test image has.',
        tuple(foreign),
        f'The mask of {rules.typical_name(benchmark)} is named '
        f'{benchmark.image(rules.typical_name(benchmark))}{benchmark.suffix}.',
      )
    )
  if deep:
    errors.append(
      Finding(
        f'{len(deep)} masks lie in folders.',
        tuple(deep),
        'Zip the files, not the folder that they are in.',
      )
    )
  if twice := {key: x for key, x in named.items() if len(x) > 1}:
    errors.append(
      Finding(
        f'{len(twice)} test images have several masks.',
        tuple(x.filename for group in twice.values() for x in group),
        'Keep one of each: the server stops where there are several.',
      )
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
    # Reading checks the CRC. A fault of one file is a finding, so that a single
    # run reports all of them; zipfile raises RuntimeError for encrypted ones.
    # Threads may share the archive: zipfile locks its file.
    try:
      mask = read_mask(archive.read(entry), size)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
      return Mask('damaged', f'not readable ({error})')
    # 1525 masks of Cityscapes would take 3 GB.
    return dataclasses.replace(mask, pixels=None)

  masks = {}
  with progress_bar('reading masks') as report:
    for (_, entry), mask in zip(
      items, map_in_threads(read, items), strict=True
    ):
      masks[entry.filename] = mask
      report(len(masks), len(items))
  return masks
