"""Writes zip files for the test servers of Cityscapes and ADE20K."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import rich.table

from resnest_jax import files
from resnest_jax.data.images import read_file
from resnest_jax.data.own.pairing import walk
from resnest_jax.errors import UserError
from resnest_jax.evaluation.submission import check, rules
from resnest_jax.evaluation.submission.rules import Benchmark, ImageSize
from resnest_jax.findings import Finding
from resnest_jax.progress import console, progress_bar
from resnest_jax.text import listed, plural
from resnest_jax.threads import map_in_threads
from resnest_jax.untrusted import load_json

# Run-length encoding suits label maps: it takes a third of the time of zlib's
# default strategy, and the files are smaller.
PNG_FLAGS = (
  *(cv2.IMWRITE_PNG_COMPRESSION, 6),
  *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
)


# --- Writing -----------------------------------------------------------------


def write(
  benchmark: Benchmark,
  predictions: Path,
  out: Path,
  images: Mapping[str, ImageSize] | None = None,
) -> int:
  """Writes the zip file, whole or not at all; returns the number of masks.

  `predictions` is the --out of predict.py; `images` are the sizes of the test
  images by key, if they are available.
  """
  # All that names and classes.json tell, before any mask is decoded.
  check_new(out)
  files.check_writable(out.parent)
  paths = find_predictions(benchmark, predictions)
  complain(rules.check_names(benchmark, paths, images))
  values = benchmark.mask_values

  def convert(item: tuple[str, Path]) -> tuple[str, check.Mask, bytes]:
    key, path = item
    size = benchmark.size if images is None else images[key]
    mask = check.read_mask(read_file(path), size)
    if mask.fault:  # Reported with those of others, after the last mask.
      return path.name, mask, b''
    if mask.counts[len(values) :].any():
      wrong = np.flatnonzero(mask.counts)[-1]
      raise UserError(
        f'{path} has the value {wrong}; accepted are class numbers from 0 to '
        f'{len(values) - 1}. Predict with weights of {benchmark.name}.'
      )
    png = cv2.imencode('.png', values[mask.pixels], PNG_FLAGS)
    # Pixels are dropped: thousands of masks would not fit in memory.
    return path.name, mask._replace(pixels=None), png[1].tobytes()

  masks = {}
  with (
    files.explain_refusal(out),
    files.whole_file(out) as temporary,
    zipfile.ZipFile(temporary, 'w') as archive,
    progress_bar('writing masks') as report,
  ):
    # Only this thread writes, so that files are in the order of their names.
    for done, (key, (name, mask, png)) in enumerate(
      zip(paths, map_in_threads(convert, paths.items()), strict=True), 1
    ):
      masks[name] = mask
      archive.writestr(f'{key}{benchmark.suffix}', png)
      report(done, len(paths))
    # An error in here leaves no file.
    complain(check.check_files(masks))
    check_new(out)  # Another process may have written it meanwhile.
  return len(paths)


def find_predictions(benchmark: Benchmark, folder: Path) -> dict[str, Path]:
  """Key -> path of its index mask, sorted by key."""
  if not folder.is_dir():
    raise UserError(f'there is no folder {folder}; give another --predictions.')
  found: dict[str, Path] = {}
  for path in walk(folder):
    # predict.py writes one into each --out: perhaps a folder for each city.
    if path.name == 'classes.json':
      _check_classes(benchmark, path)
    elif key := benchmark.predicted(path.name):
      if key in found:
        raise UserError(
          f'{found[key]} and {path} are of the same test image; remove one.'
        )
      found[key] = path
  if not found:
    raise UserError(
      f'{folder} holds no prediction of a test image of {benchmark.name}. '
      f'Predict images with names like {benchmark.example} (python '
      f'predict.py --out {folder} ...).'
    )
  return dict(sorted(found.items()))


def _check_classes(benchmark: Benchmark, path: Path) -> None:
  try:
    classes = tuple(load_json(files.read_bounded(path, 2**24))['classes'])
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f'{path} is damaged ({error}); predict again.') from error
  if classes != benchmark.labels.classes:
    raise UserError(
      f'{path} says that the predictions are of {len(classes)} classes, '
      f'{listed(classes, 3)}; the classes of {benchmark.name} are '
      f'{listed(benchmark.labels.classes, 3)}. Predict with weights of '
      f'{benchmark.name}.'
    )


def check_new(out: Path) -> None:
  """Raises `UserError` unless `out` is a new file that ends in .zip."""
  if out.suffix != '.zip':
    raise UserError(f'--out {out} has to end with .zip.')
  if out.exists():
    raise UserError(
      f'{out} is there already and nothing was written; give another --out, '
      'or remove it.'
    )


def complain(findings: Sequence[Finding]) -> None:
  """Raises one `UserError` with all findings, if there are any."""
  if findings:
    lines = [line for finding in findings for line in _lines(finding)]
    raise UserError('\n  '.join(['nothing was written:', *lines]))


# --- On the console ----------------------------------------------------------


def _lines(finding: Finding) -> list[str]:
  lines = [finding.what]
  if finding.samples:
    lines.append(f'  Files: {listed(finding.samples)}')
  return [*lines, f'  What to do: {finding.remedy}']


def show(path: Path, verdict: check.Verdict) -> None:
  """Prints the verdict: a table of the classes, then the findings."""
  classes = verdict.benchmark.labels.classes
  values = verdict.benchmark.mask_values
  table = rich.table.Table('value', 'class', title=f'masks of {path.name}')
  table.add_column('pixels in %', justify='right')
  table.add_column('masks', justify='right')
  total = max(verdict.pixels.sum(), 1)
  for k in np.flatnonzero(verdict.images):
    share = f'{100 * verdict.pixels[k] / total:.3f}'
    table.add_row(str(values[k]), classes[k], share, str(verdict.images[k]))
  console().print(table)
  never = [classes[k] for k in np.flatnonzero(verdict.images == 0)]
  # Often a sign of wrong weights, which no rule of the server detects.
  if never:
    print(
      f'{plural(len(never), "class", "are")} predicted nowhere: {listed(never)}'
    )
  found = {'error': verdict.errors, 'warning': verdict.warnings}
  for severity, findings in found.items():
    for finding in findings:
      print('\n  '.join([f'{severity}:', *_lines(finding)]))
  size = path.stat().st_size / 1e6
  print(
    f'{path}: {verdict.files} of {verdict.benchmark.number} masks for '
    f'{verdict.benchmark.name}, {size:.1f} MB, '
    f'{plural(len(verdict.errors), "error")}, '
    f'{plural(len(verdict.warnings), "warning")}'
  )
