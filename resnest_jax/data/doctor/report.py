"""The doctor's report: text, a table of classes, JSON, a contact sheet."""

import contextlib
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.table

from resnest_jax import drawing, files
from resnest_jax.bands import COLOURS, shown
from resnest_jax.data.doctor.decoder_warnings import jpeg_warnings
from resnest_jax.data.doctor.observe import Observation, Survey
from resnest_jax.data.doctor.rules import ERROR, WARNING, Diagnosis
from resnest_jax.errors import UserError
from resnest_jax.text import listed, percent, plural, share
from resnest_jax.untrusted import parse_json

WRITER = 'resnest_jax.data.doctor'
_PICTURES = 8  # Of each split on the contact sheet.
_MOST_NAMES = 1000  # Of a finding's samples in doctor.json.


def summary(surveys: Sequence[Survey], found: Sequence[Diagnosis]) -> str:
  """One line with the samples examined and the number of faults."""
  seen = ' and '.join(
    f'{share(len(s.seen), s.size, "sample")} of {s.split}' for s in surveys
  )
  counts = [
    plural(number, severity)
    for severity in (ERROR, WARNING)
    if (number := sum(d.rule.severity == severity for d in found))
  ]
  return f'{seen}: {", ".join(counts) or "nothing wrong"}'


def paragraphs(found: Sequence[Diagnosis]) -> list[str]:
  """Each finding in a few lines; equal ones of several splits are joined."""
  same: dict[tuple[str, ...], list[Diagnosis]] = {}
  for d in found:
    key = d.rule.severity, d.rule.name, d.finding.what, d.finding.remedy
    same.setdefault(key, []).append(d)
  said = []
  for (severity, name, what, remedy), diagnoses in same.items():
    samples = [name for d in diagnoses for name in d.finding.samples]
    splits = ' and '.join(d.split for d in diagnoses)
    lines = [f'{severity}: {name} ({splits})', f'  {what}']
    if samples:
      lines.append(f'  Samples: {listed(samples, 3)}')
    remedy = remedy.replace('\n', '\n  ')  # Some have commands in them.
    said.append('\n'.join([*lines, f'  What to do: {remedy}']))
  return said


def notes(s: Survey) -> list[str]:
  """Facts that are worth knowing but are no fault."""
  pixels, images = s.class_counts  # (C + 1,) each, ignored ones last.
  classes, absent = len(s.labels.classes), np.count_nonzero(images[:-1] == 0)
  lines = []
  if absent and s.index_masks:
    lines.append(
      f'{share(absent, classes, "class", "do")} not occur in '
      f'{plural(len(s.readable), "sample")} of {s.split}'
    )
  if pixels[-1]:
    ignored = [f'{v} ({n / pixels.sum():.1%})' for v, n in s.ignored.items()]
    lines.append(
      f'{pixels[-1] / pixels.sum():.1%} of the pixels of {s.split} are '
      f'ignored; their values in the masks: {listed(ignored, 12)}'
    )
  return lines


def class_table(surveys: Sequence[Survey]) -> rich.table.Table:
  """Shares of pixels and images of each class that occurs in a split."""
  table = rich.table.Table('value', 'class', title='shares in %')
  labels, shares = surveys[0].labels, []
  for s in surveys:
    pixels, images = s.class_counts
    shares.append(pixels / max(pixels.sum(), 1))
    shares.append(images / max(len(s.index_masks), 1))
    table.add_column(f'{s.split}\npixels', justify='right')
    table.add_column(f'{s.split}\nimages', justify='right')
  for k, name in enumerate([*labels.classes, 'ignored']):
    if any(share[k] for share in shares):
      # None of "ignored": `notes` lists those that occur.
      values = np.flatnonzero(labels.to_train_id == k)
      table.add_row(listed(values, 3), name, *(percent(x[k]) for x in shares))
  return table


def claim(folder: Path) -> None:
  """Raises `UserError` if it is not writable, or has a report of others."""
  # The JSON vouches for the picture: a lone doctor.png is refused.
  report, picture = folder / 'doctor.json', folder / 'doctor.png'
  files.check_writable(folder, 'give another folder')
  ours = False
  with contextlib.suppress(OSError, UserError):
    ours = parse_json(report.read_bytes(), '').get('written_by') == WRITER
  there = [path for path in (report, picture) if path.exists()]
  if there and not ours:
    raise UserError(
      f'{there[0]} exists and is not an earlier report of the doctor; '
      'nothing was written. Give another folder, or remove the file.'
    )


def write_json(
  folder: Path, surveys: Sequence[Survey], found: Sequence[Diagnosis]
) -> None:
  """Writes `doctor.json`."""
  content = {
    'written_by': WRITER,
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'data': surveys[0].data,
    'findings': [
      {'rule': d.rule.name, 'severity': d.rule.severity, 'split': d.split}
      | {'count': len(d.finding.samples), **d.finding._asdict()}
      | {'samples': d.finding.samples[:_MOST_NAMES]}
      for d in found
    ],
    'splits': {s.split: _facts(s) for s in surveys},
  }
  files.write_json(folder / 'doctor.json', content)


def _facts(s: Survey) -> dict[str, Any]:
  pixels, images = (counts.tolist() for counts in s.class_counts)
  return {
    'samples': s.size,
    'seen': len(s.seen),
    'ignored_pixels': pixels[-1],
    'mask_values': {str(value): n for value, n in s.histogram.items()},
    'classes': [
      {'class': name, 'pixels': pixels[k], 'images': images[k]}
      for k, name in enumerate(s.labels.classes)
    ],
  }


def draw(
  folder: Path,
  splits: Sequence[Any],
  surveys: Sequence[Survey],
  found: Sequence[Diagnosis],
) -> None:
  """Writes `doctor.png`: masks over images, with findings first and marked.

  There is no picture if no sample can be read. `splits` are of the `surveys`.
  """
  panels = []
  for split, s in zip(splits, surveys, strict=True):
    faults = _faults(s, found)
    for o in _chosen(s, faults):
      # The survey has already reported the decoder's complaints.
      with jpeg_warnings():
        sample = split.raw(o.index)
      note = ', '.join(faults.get(o.index, ()))
      panels.append(_panel(s, o, sample['image'], sample['mask'], note))
  if panels:
    sheet = drawing.contact_sheet(panels, columns=2)
    drawing.write_image(folder / 'doctor.png', sheet)


def _faults(s: Survey, found: Sequence[Diagnosis]) -> dict[int, list[str]]:
  """Index -> names of the rules that the sample breaks."""
  faults: dict[int, list[str]] = {}
  for d in found:
    # Copies are reported as 'a = b', see `content._pairs`.
    concerned = {y for x in d.finding.samples for y in x.split(' = ')}
    for o in s.readable:
      if d.split == s.split and o.name in concerned:
        faults.setdefault(o.index, []).append(d.rule.name)
  return faults


def _chosen(s: Survey, faults: dict[int, list[str]]) -> list[Observation]:
  # One sample for each rule that is broken, as long as there is room. The rest
  # is spread evenly, because no rule can tell whether sky is called sky.
  first = {rule: i for i in sorted(faults, reverse=True) for rule in faults[i]}
  chosen = {*sorted({*first.values()})[:_PICTURES]}
  others = [o.index for o in s.readable if o.index not in chosen]
  places = drawing.spread(len(others), _PICTURES - len(chosen))
  chosen.update(others[place] for place in places)
  return [o for o in s.readable if o.index in chosen]


def _panel(
  s: Survey, o: Observation, image: np.ndarray, mask: np.ndarray, note: str
) -> np.ndarray:
  """Draws one sample; a mask that is no index mask is shown as a picture."""
  image = shown(image, s.bands or COLOURS)
  beyond = len(s.labels.to_train_id)
  if o.values.size and 0 <= o.values[0] <= o.values[-1] < beyond:
    label = s.labels.to_train_id[mask.astype(int)]
    if label.shape != image.shape[:2]:  # Shown next to it.
      label = drawing.colour(label, s.labels.palette)
  elif mask.ndim == 3 and mask.shape[2] >= 3:
    label = shown(mask[..., 2::-1], COLOURS)  # OpenCV's BGR, or BGRA.
  else:
    label = shown(mask.reshape(*mask.shape[:2], -1), ('grey',))
  of, title = (s.labels.classes, s.labels.palette), f'{o.name} ({s.split})'
  return drawing.mask_panel(image, label, *of, title=title, note=note)
