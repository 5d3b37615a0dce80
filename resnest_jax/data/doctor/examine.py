"""Runs the label doctor on a data set, or before a training."""

import itertools
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
from ml_collections import ConfigDict

from resnest_jax import drawing
from resnest_jax.config_keys import classifies
from resnest_jax.data.doctor import files, report
from resnest_jax.data.doctor.observe import Survey, survey
from resnest_jax.data.doctor.rules import ERROR, Diagnosis, diagnose
from resnest_jax.errors import UserError, writing

COMMAND = 'python -m resnest_jax.data.doctor'


def examine(
  config: ConfigDict,
  splits: Sequence[Any],
  num_samples: int | None = None,
  on_progress=lambda done, total: None,
) -> list[Survey]:
  """Surveys each split that `open_data` has opened, or so many samples of each.

  `on_progress` is called with (samples done, samples of all splits). Raises
  `UserError` if a split has none.
  """
  cv2.setNumThreads(0)  # They would compete with the readers.
  chosen = [drawing.spread(len(s), num_samples or len(s)) for s in splits]
  total, done, surveys = sum(map(len, chosen)), itertools.count(1), []
  for split, indices in zip(splits, chosen, strict=True):
    if not indices:
      raise UserError(
        f'the split {split.split} of {split.name} has no samples. Prepare the '
        'data again, or choose another split in the config.'
      )
    surveys.append(
      survey(
        split,
        indices,
        for_training=split.split == config.data.train_split,
        num_outputs=config.model.num_classes,
        num_threads=config.data.num_threads,
        on_progress=lambda *_: on_progress(next(done), total),
      )
    )
  return surveys


def check_before_training(
  config: ConfigDict, splits: Sequence[Any], workdir: Path
) -> None:
  """Examines `config.data.doctor_samples` samples of each split.

  Prints the findings and writes doctor.json and doctor.png into the workdir.
  Raises `UserError` for errors, and for a doctor.json that it did not write.
  """
  number = config.data.doctor_samples
  if not number or classifies(config):  # It looks at masks.
    return
  report.claim(workdir)
  start = time.perf_counter()
  # A configuration may train and evaluate on one split; examine it once.
  splits = list({split.split: split for split in splits}.values())
  surveys = examine(config, splits, number)
  found = diagnose(surveys)
  # The error below refers to these.
  with writing(workdir):
    report.write_json(workdir, surveys, found)
    report.draw(workdir, splits, surveys, found)
  seconds = time.perf_counter() - start
  print(
    f'label doctor: {report.summary(surveys, found)} ({seconds:.1f} s; '
    f'{workdir / "doctor.png"})',
    flush=True,
  )
  # Evaluation skips nothing, because a score has to cover every image.
  skips = config.data.skip_unreadable and config.data.train_split
  mistakes, others = [], []
  for d in found:
    skipped = d.rule.check is files.unreadable and d.split == skips
    stops = d.rule.severity == ERROR and not skipped
    (mistakes if stops else others).append(d)
  for paragraph in report.paragraphs(others):
    print(paragraph, flush=True)
  if mistakes:
    described = '\n'.join(report.paragraphs(mistakes))
    raise UserError(
      f'the label doctor found errors that spoil the training:\n{described}\n'
      f'Examine all samples: {examine_command(sys.argv[1:])}\n'
      f'{_nevertheless(mistakes, config, surveys)}'.rstrip()
    )


def _nevertheless(
  mistakes: Sequence[Diagnosis], config: ConfigDict, surveys: Sequence[Survey]
) -> str:
  """The flags that start the training without a repair, if there are any."""
  # Skipping helps only if unreadable files are the sole errors.
  if any(d.rule.check is not files.unreadable for d in mistakes):
    if any(o.refused for s in surveys for o in s.readable):
      return ''  # It would stop at the first of these samples.
    return 'To train nevertheless: --config.data.doctor_samples=0'
  said = {
    d.split: f'Samples of {d.split} must be repaired or removed: evaluation '
    'skips none.'
    for d in mistakes
  }
  if (training := config.data.train_split) in said:
    said[training] = (
      'To train without the samples that cannot be read: '
      '--config.data.skip_unreadable=true'
    )
  return '\n'.join(said.values())


def examine_command(arguments: Sequence[str]) -> str:
  """The doctor's command for the data of a training's command line."""
  # With a value behind = or in the next word.
  flags = r'(--config(?:\.[^\0=]+)?)[=\0](?!--)([^\0]*)'
  words = map('='.join, re.findall(flags, '\0'.join(arguments)))
  # `train` may be called from Python, without a command line.
  words = [*words] or ['--config=configs/FILE.py']
  return f'{COMMAND} {shlex.join([*words, "--out=doctor"])}'
