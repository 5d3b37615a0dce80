"""Runs the label doctor on a data set, or before a training."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
from ml_collections import ConfigDict

from resnest_jax import drawing
from resnest_jax.data.doctor import files, report
from resnest_jax.data.doctor.observe import Survey, survey
from resnest_jax.data.doctor.rules import ERROR, Diagnosis, diagnose
from resnest_jax.errors import UserError

COMMAND = 'python -m resnest_jax.data.doctor'


def examine(
  config: ConfigDict,
  splits: Sequence[Any],
  num_samples: int | None = None,
  on_progress=lambda done, total: None,
) -> list[Survey]:
  """Surveys each split that `open_data` has opened.

  Args:
    config: the whole configuration, not only its `data`.
    splits: surveyed one after the other.
    num_samples: per split, evenly spread; None examines all.
    on_progress: called with (samples done, samples of all splits).

  Raises:
    UserError: a split has no samples.
  """
  # Samples are read in parallel; OpenCV's own threads would compete.
  cv2.setNumThreads(0)
  chosen = [
    drawing.spread(len(split), num_samples or len(split)) for split in splits
  ]
  total, surveys, before = sum(map(len, chosen)), [], 0
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
        # Bound as a default: a closure would see the last value of `before`.
        on_progress=lambda done, _, before=before: on_progress(
          before + done, total
        ),
      )
    )
    before += len(indices)
  return surveys


def check_before_training(
  config: ConfigDict, splits: Sequence[Any], workdir: Path
) -> None:
  """Examines `config.data.doctor_samples` samples of each split.

  Prints the findings and writes doctor.json and doctor.png into the workdir.

  Raises:
    UserError: there are errors, or the workdir has a doctor.json that the
      doctor did not write.
  """
  number = config.data.doctor_samples
  if not number:
    return
  report.claim(workdir)
  start = time.perf_counter()
  # A configuration may train and evaluate on one split; examine it once.
  splits = list({split.split: split for split in splits}.values())
  surveys = examine(config, splits, number)
  found = diagnose(surveys)
  # Written before the error is raised, which refers to them.
  report.write_json(workdir, surveys, found)
  report.draw(workdir, splits, surveys, found)
  seconds = time.perf_counter() - start
  print(
    f'label doctor: {report.summary(surveys, found)} ({seconds:.1f} s; '
    f'{workdir / "doctor.png"})',
    flush=True,
  )
  mistakes = [
    d for d in found if d.rule.severity == ERROR and not _is_skipped(d, config)
  ]
  # Errors that are skipped are still printed, with the warnings.
  for paragraph in report.paragraphs([d for d in found if d not in mistakes]):
    print(paragraph, flush=True)
  if mistakes:
    described = '\n'.join(report.paragraphs(mistakes))
    raise UserError(
      f'the label doctor found errors that spoil the training:\n{described}\n'
      f'Examine all samples: {examine_command(sys.argv[1:])}\n'
      f'{_nevertheless(mistakes, config)}'
    )


def _nevertheless(mistakes: Sequence[Diagnosis], config: ConfigDict) -> str:
  """The flags that start the training without a repair, if there are any."""
  # Skipping helps only if unreadable files are the sole errors.
  if any(d.rule.check is not files.unreadable for d in mistakes):
    return 'To train nevertheless: --config.data.doctor_samples=0'
  training = config.data.train_split
  lines = []
  if any(d.split == training for d in mistakes):
    lines.append(
      'To train without the samples that cannot be read: '
      '--config.data.skip_unreadable=true'
    )
  if others := [d.split for d in mistakes if d.split != training]:
    lines.append(
      f'Samples of {", ".join(others)} must be repaired or removed: '
      'evaluation skips none.'
    )
  return '\n'.join(lines)


def _is_skipped(diagnosis: Diagnosis, config: ConfigDict) -> bool:
  # Evaluation skips nothing, because a score has to cover every image.
  return (
    config.data.skip_unreadable
    and diagnosis.rule.check is files.unreadable
    and diagnosis.split == config.data.train_split
  )


def examine_command(arguments: Sequence[str]) -> str:
  """The doctor's command for the data of a training's command line."""
  # Only --config and its overrides apply; --workdir and others are dropped. A
  # value may follow its flag after a blank or after '='.
  words, arguments = [], list(arguments)
  while arguments:
    word = arguments.pop(0)
    flag, equals, value = word.partition('=')
    if not equals and arguments and not arguments[0].startswith('--'):
      value = arguments.pop(0)
    if flag == '--config':
      words[:0] = [flag, value]
    elif flag.startswith('--config.'):
      words.append(f'{flag}={value}')
  if not words:  # `train` was called from Python, without a command line.
    words = ['--config', 'configs/FILE.py']
  return f'{COMMAND} {shlex.join([*words, "--out", "doctor"])}'
