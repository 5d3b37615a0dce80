"""The label doctor's examination, of a data set or before a training."""

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
  """Looks at samples of each split.

  Args:
    config: a whole configuration.
    splits: of `open_data`.
    num_samples: of each, evenly spread; None: all.
    on_progress: called with (samples done, samples of all splits).

  Raises:
    UserError: a split without samples.
  """
  cv2.setNumThreads(0)  # Samples are read in parallel.
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
  """Looks at `config.data.doctor_samples` samples of each split.

  Prints what is found and writes doctor.json and doctor.png into the workdir.

  Args:
    config: a whole configuration.
    splits: those of training and evaluation, as `open_data` gives them.
    workdir: of the run.

  Raises:
    UserError: there are errors, or the workdir has a doctor.json that is not
      the doctor's.
  """
  number = config.data.doctor_samples
  if not number:
    return
  report.claim(workdir)
  start = time.perf_counter()
  splits = list({split.split: split for split in splits}.values())
  surveys = examine(config, splits, number)
  found = diagnose(surveys)
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
  for paragraph in report.paragraphs([d for d in found if d not in mistakes]):
    print(paragraph, flush=True)
  if mistakes:
    described = '\n'.join(report.paragraphs(mistakes))
    raise UserError(
      f'the label doctor found what would spoil the training:\n{described}\n'
      f'Examine all samples: {examine_command(sys.argv[1:])}\n'
      f'{_nevertheless(mistakes, config)}'
    )


def _nevertheless(mistakes: Sequence[Diagnosis], config: ConfigDict) -> str:
  """How to train without mending the data, if one can."""
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
      f'Those of {", ".join(others)} have to be mended or taken away: '
      'evaluation leaves out none.'
    )
  return '\n'.join(lines)


def _is_skipped(diagnosis: Diagnosis, config: ConfigDict) -> bool:
  """Whether it is about samples that the training is told to go without."""
  return (
    config.data.skip_unreadable
    and diagnosis.rule.check is files.unreadable
    and diagnosis.split == config.data.train_split
  )


def examine_command(arguments: Sequence[str]) -> str:
  """The command that examines the data of a training.

  Args:
    arguments: of the training's command line.
  """
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
  if not words:
    words = ['--config', 'configs/FILE.py']
  return f'{COMMAND} {shlex.join([*words, "--out", "doctor"])}'
