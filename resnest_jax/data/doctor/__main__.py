"""Examines images and masks before a training spends days on them.

    python -m resnest_jax.data.doctor --config configs/ade20k_pspnet.py

Reads every sample of the training and the evaluation split of the
configuration and reports each fault: what was seen, in how many samples, in
which, and what to do. docs/doctor.md lists the rules. --out also writes
doctor.json and the contact sheet doctor.png. The exit status is 1 if there
are errors, and otherwise 0.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from resnest_jax.errors import run_module

if __name__ == '__main__':
  # Before the imports below, so that Ctrl-C during them is told in a line.
  run_module(__spec__.name)

from resnest_jax.config import parse_flags
from resnest_jax.config_keys import classifies
from resnest_jax.data.datasets import open_data
from resnest_jax.data.doctor import report
from resnest_jax.data.doctor.examine import COMMAND, examine
from resnest_jax.data.doctor.observe import Survey
from resnest_jax.data.doctor.rules import ERROR, Diagnosis, diagnose
from resnest_jax.errors import UserError
from resnest_jax.files import explain_refusal
from resnest_jax.flags import Parser
from resnest_jax.progress import console, progress_bar


def main() -> None:
  parser = Parser(prog=COMMAND, description=__doc__)
  add = parser.add_argument
  about = 'of the training; its keys are flags: --config.data.data_dir=DIR'
  add('--config', required=True, metavar='FILE[:ARGUMENT]', help=about)
  about = "default: the configuration's training and evaluation split"
  add('--split', nargs='+', metavar='NAME', help=about)
  about = 'examine N evenly spread samples of each split; default: all'
  add('--samples', type=int, metavar='N', help=about)
  about = 'folder for doctor.json and doctor.png; default: neither is written'
  add('--out', type=Path, metavar='DIR', help=about)
  flags = parse_flags(parser)
  if flags.samples is not None and flags.samples < 1:
    raise UserError(f'--samples is {flags.samples}; it must be at least 1.')
  if classifies(flags.config):
    raise UserError(
      'the doctor examines masks, which classifiers have not; their data is '
      'checked when a training opens it (docs/classify.md).'
    )
  data = flags.config.data
  names = flags.split or (data.train_split, data.eval_split)
  splits = [open_data(data, name) for name in dict.fromkeys(names)]
  if flags.out:
    report.claim(flags.out)  # Before all samples are read, in minutes.
  with progress_bar('examining samples') as on_progress:
    surveys = examine(flags.config, splits, flags.samples, on_progress)
  found = diagnose(surveys)

  # On disk before anything is printed, and printed if the disk refuses.
  try:
    if flags.out:
      with explain_refusal(flags.out):
        report.write_json(flags.out, surveys, found)
        report.draw(flags.out, splits, surveys, found)
  finally:
    show(surveys, found)
  if flags.out:
    print(f'written to {flags.out}')
  # Scripts may chain the training to this command: warnings do not stop it.
  if any(d.rule.severity == ERROR for d in found):
    sys.exit(1)


def show(surveys: Sequence[Survey], found: Sequence[Diagnosis]) -> None:
  # Findings come last, so that a long table does not scroll them away.
  if any(s.index_masks for s in surveys):
    console().print(report.class_table(surveys))
  for line in (note for s in surveys for note in report.notes(s)):
    print(line)
  for paragraph in report.paragraphs(found):
    print(f'\n{paragraph}')
  print(f'\n{report.summary(surveys, found)}')
