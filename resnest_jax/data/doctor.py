"""Examines images and masks before somebody trains on them for a week.

    python -m resnest_jax.data.doctor --config configs/ade20k_pspnet.py

Reads every sample of the training and the evaluation split of the
configuration and reports what is wrong with them: for each finding what was
seen, in how many samples, in which, and what to do. docs/doctor.md lists the
rules. With --out it also writes doctor.json and the contact sheet doctor.png.
The exit status is 1 if there are errors, 0 if there are warnings or nothing.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import rich.console
from ml_collections import ConfigDict

from resnest_jax import errors
from resnest_jax.config import parse_flags
from resnest_jax.data.checks import files, report
from resnest_jax.data.checks.observe import Survey, survey
from resnest_jax.data.checks.rules import ERROR, Diagnosis, diagnose
from resnest_jax.data.datasets import open_data
from resnest_jax.data.progress import progress_bar
from resnest_jax.errors import UserError
from resnest_jax.evaluation import visualize

_COMMAND = 'python -m resnest_jax.data.doctor'


def main() -> None:
  parser = argparse.ArgumentParser(
    prog=_COMMAND,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config',
    required=True,
    metavar='FILE[:ARGUMENT]',
    help='the configuration that is trained with, a file of configs/; its keys '
    'are flags as well: --config.data.data_dir=DIR',
  )
  parser.add_argument(
    '--split',
    nargs='+',
    metavar='NAME',
    help="default: the configuration's training and evaluation split",
  )
  parser.add_argument(
    '--samples',
    type=int,
    metavar='N',
    help='look at N samples of each split, evenly spread; default: all',
  )
  parser.add_argument(
    '--out',
    type=Path,
    metavar='DIR',
    help='folder for doctor.json and doctor.png; default: neither is written',
  )
  flags = parse_flags(parser)
  if flags.samples is not None and flags.samples < 1:
    raise UserError(f'--samples is {flags.samples}; it must be at least 1.')
  data = flags.config.data
  names = flags.split or (data.train_split, data.eval_split)
  splits = [open_data(data, name) for name in dict.fromkeys(names)]
  if flags.out:
    report.claim(flags.out)
  with progress_bar('looking at samples') as on_progress:
    surveys = examine(flags.config, splits, flags.samples, on_progress)
  found = diagnose(surveys)

  console = rich.console.Console()
  if any(s.index_masks for s in surveys):
    console.print(report.class_table(surveys))
  for line in (note for s in surveys for note in report.notes(s)):
    print(line)
  for paragraph in report.paragraphs(found):
    print(f'\n{paragraph}')
  print(f'\n{report.summary(surveys, found)}')
  if flags.out:
    report.write_json(flags.out, surveys, found)
    report.draw(flags.out, splits, surveys, found)
    print(f'written to {flags.out}')
  if any(d.rule.severity == ERROR for d in found):
    sys.exit(1)


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
    visualize.spread(len(split), num_samples or len(split)) for split in splits
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
  return f'{_COMMAND} {shlex.join([*words, "--out", "doctor"])}'


if __name__ == '__main__':
  errors.run(main)
