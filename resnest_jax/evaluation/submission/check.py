"""What is wrong with a zip file for a test server, without the server."""

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

# --- Of single masks ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mask:
  """What is in a mask.

  Attributes:
    fault: the rule that it breaks; '' if none.
    detail: what was seen instead.
    pixels: uint8 (H, W); None where there is a fault.
    counts: int64 (256,), pixels of each value.
  """

  fault: str = ''
  detail: str = ''
  pixels: np.ndarray | None = None
  counts: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(256, np.int64)
  )


def read_mask(png: bytes, size: ImageSize | None) -> Mask:
  """Decodes a mask: an 8-bit grey PNG of a given size (None: any)."""
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
    'Predict at the original size: predict.py does, from unresized images.'
  ),
  'damaged': 'Write the zip again.',
}


def check_files(masks: Mapping[str, Mask]) -> list[Finding]:
  """Files that are no masks of the right kind; name -> mask."""
  findings = []
  for fault, what in _FAULTS.items():
    found = {n: mask.detail for n, mask in masks.items() if mask.fault == fault}
    if found:
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
  """Errors and warnings about the values of masks; name -> mask."""
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
  # 0 and 255 may be somebody's void; if there are only train ids they are not.
  seen = set().union(*values.values())
  void = set() if seen - {IGNORE} <= train_ids else {0}
  errors, warnings = [], []
  trained = [
    name
    for name, v in values.items()
    if v <= train_ids | {IGNORE} and v - classes - void - {IGNORE}
  ]
  if trained:
    errors.append(
      Finding(
        f'{len(trained)} of {len(values)} masks hold train ids: their values '
        'are 0 to 18, which are road to bicycle in training alone.',
        tuple(trained),
        'The server wants label ids: 7 for road to 33 for bicycle. Write the '
        'zip with this command, from what predict.py has written.',
      )
    )
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
        'Add 1 to every pixel, or write the zip with this command, from what '
        'predict.py has written.'
      )
    findings.append(Finding(what, zero, remedy))
  if high := {n: v for n, v in values.items() if max(v, default=0) > last}:
    seen = sorted({x for v in high.values() for x in v if x > last})
    findings.append(
      Finding(
        f'{len(high)} of {len(values)} masks have values above {last}: '
        f'{listed(seen)}.',
        tuple(high),
        f'Accepted are 1 to {last}; 1 is added once.',
      )
    )
  return findings


# --- Of a whole file ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What is to be said of a zip file."""

  benchmark: Benchmark
  files: int  # Masks in it.
  errors: list[Finding]
  warnings: list[Finding]
  pixels: np.ndarray  # int64 (C,), of each class.
  images: np.ndarray  # int64 (C,), masks that have it.


def validate(
  path: Path,
  benchmark: Benchmark | None = None,
  images: Path | None = None,
) -> Verdict:
  """Says what the server would find wrong with a zip file.

  Args:
    path: the zip file.
    benchmark: the server; None: as the names in it say.
    images: folder or zip file of the test images, where they are at hand.

  Raises:
    UserError: it is no zip file, or it is not clear for which server.
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
  """The server whose names most files have."""
  names = [entry.filename.rsplit('/', 1)[-1] for entry in entries]
  numbers = {
    name: sum(b.submitted(n) is not None for n in names)
    for name, b in BENCHMARKS.items()
  }
  best = max(numbers, key=numbers.get)
  if not numbers[best]:
    raise UserError(
      f'{path} has no file with a name of Cityscapes or ADE20K (the first of '
      f'{len(names)} is {names[0] if names else "missing"}); say with '
      f'--benchmark ({" or ".join(BENCHMARKS)}) for which server it is.'
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
  if images is not None and len(images) != benchmark.number:
    warnings.append(
      Finding(
        f'--images has {len(images)} test images, {benchmark.name} has '
        f'{benchmark.number}.',
        (),
        'Give all of them, or leave --images out.',
      )
    )
  masks = _read_masks(archive, named, benchmark, images or {})
  errors += check_files(masks)
  more_errors, more_warnings = check_values(benchmark, masks)
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
  """Errors in how files are called and where they lie, and key -> masks."""
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
        f'Of {rules.typical_name(benchmark)} the mask is '
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
        'Leave one of each; with several the server stops.',
      )
    )
  return errors, named


def _read_masks(
  archive: zipfile.ZipFile,
  named: Mapping[str, Sequence[zipfile.ZipInfo]],
  benchmark: Benchmark,
  images: Mapping[str, ImageSize],
) -> dict[str, Mask]:
  """Name in the archive -> what is in the mask, without its pixels."""
  items = [(key, entry) for key, group in named.items() for entry in group]

  def read(item: tuple[str, zipfile.ZipInfo]) -> Mask:
    key, entry = item
    size = images.get(key, benchmark.size)
    try:
      mask = read_mask(archive.read(entry), size)  # Checks the CRC.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
      return Mask('damaged', f'not readable ({error})')
    return dataclasses.replace(mask, pixels=None)

  masks = {}
  with progress_bar('reading masks') as report:
    for (_, entry), mask in zip(
      items, map_in_threads(read, items), strict=True
    ):
      masks[entry.filename] = mask
      report(len(masks), len(items))
  return masks
