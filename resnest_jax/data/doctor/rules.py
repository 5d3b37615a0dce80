"""The table of all rules, and their application.

A rule is a function of the survey of a split, or of the training split and
another one. It returns a `Finding`, or None if nothing is wrong.
"""

import dataclasses
from collections.abc import Callable, Sequence

from resnest_jax.data.doctor import content, files, values
from resnest_jax.data.doctor.observe import Survey
from resnest_jax.findings import Finding

ERROR, WARNING = 'error', 'warning'


@dataclasses.dataclass(frozen=True)
class Rule:
  """A kind of fault.

  Attributes:
    check: takes a `Survey`, or two (training and another) if `compares`.
    severity: `ERROR` stops a training.
    meaning: what it finds; docs/doctor.md lists it.
    unless: checks that explain the same fault better. If one of them has a
      finding in the split, this rule is skipped.
    compares: whether the check takes two splits.
  """

  check: Callable[..., Finding | None]
  severity: str
  meaning: str
  unless: tuple[Callable[..., Finding | None], ...] = ()
  compares: bool = False

  @property
  def name(self) -> str:
    return self.check.__name__


# Rules that explain why masks hold values without a class. They silence the
# bare statement that such values exist, and what follows from it.
_MEANINGS = (
  values.off_by_one,
  values.wrong_ade20k_release,
  values.train_ids,
  values.label_ids,
  values.stretched_masks,
)
_NUMBERS = (*_MEANINGS, values.unknown_values)

# Order matters: `unless` only sees the rules above. The most specific
# explanation comes first, errors before warnings.
RULES = (
  Rule(
    values.class_count,
    ERROR,
    'the network has another number of classes than the data set',
  ),
  Rule(
    files.unreadable,
    ERROR,
    'missing, truncated or damaged images and masks',
  ),
  Rule(files.image_depth, ERROR, '16-bit images'),
  Rule(
    files.mask_depth, ERROR, 'masks of 16 bits, or of numbers with fractions'
  ),
  Rule(files.size_mismatch, ERROR, 'masks of another size than their image'),
  Rule(
    values.wrong_ade20k_release,
    ERROR,
    "masks of ADE20K's full release or its instance masks",
  ),
  # The full release and the instance masks of ADE20K are also coloured.
  Rule(
    files.colour_masks,
    ERROR,
    'RGB or palette masks instead of class numbers',
    unless=(values.wrong_ade20k_release,),
  ),
  Rule(
    files.grey_masks_in_colour,
    ERROR,
    'class numbers repeated in several channels',
    unless=(values.wrong_ade20k_release,),
  ),
  Rule(
    values.stretched_masks,
    ERROR,
    'class numbers multiplied to be visible: 0 and 255 instead of 0 and 1, or '
    'any other step',
    unless=(values.wrong_ade20k_release,),
  ),
  Rule(
    values.off_by_one,
    ERROR,
    'masks that count from 0 where 1 is meant, or the reverse',
  ),
  Rule(
    values.label_ids,
    ERROR,
    "Cityscapes' label ids where train ids are meant",
  ),
  Rule(
    values.train_ids,
    ERROR,
    "Cityscapes' train ids where label ids are meant",
  ),
  Rule(
    values.unknown_values,
    ERROR,
    'values that no class has',
    unless=_MEANINGS,
  ),
  Rule(
    content.no_labels,
    ERROR,
    'not one labelled pixel',
    unless=_NUMBERS,
  ),
  Rule(
    content.identical_masks,
    ERROR,
    'all images have the same mask',
    unless=(content.no_labels,),
  ),
  # Warnings: these are legitimate in some data sets, so training starts.
  Rule(
    files.damaged_jpeg,
    WARNING,
    'JPEGs that the decoder complains about: perhaps damaged inside',
  ),
  Rule(
    values.maybe_off_by_one,
    WARNING,
    'all values except the last or the first occur: perhaps off by one',
    unless=_NUMBERS,
  ),
  Rule(
    content.ignored_share,
    WARNING,
    'more than half of the pixels are ignored',
    unless=(*_NUMBERS, content.no_labels, values.maybe_off_by_one),
  ),
  Rule(
    content.unlabelled_masks,
    WARNING,
    'at least 5 % of the masks have no labelled pixel',
    unless=(*_NUMBERS, content.no_labels),
  ),
  Rule(
    content.constant_masks,
    WARNING,
    'at least half of the masks have a single value',
    unless=(content.no_labels, content.identical_masks),
  ),
  Rule(
    content.misaligned_masks,
    WARNING,
    'masks of other images, or mirrored masks: their borders miss the edges',
    unless=(content.identical_masks,),
  ),
  Rule(
    content.absent_classes,
    WARNING,
    'up to a third of the classes do not occur in training (all samples '
    'examined); if more are absent, the split is a part of a data set and a '
    'note says so',
    unless=(
      *_NUMBERS,
      content.no_labels,
      content.identical_masks,
      values.maybe_off_by_one,
    ),
  ),
  Rule(
    content.untrained_classes,
    WARNING,
    'classes of the evaluation split that training never shows (all samples '
    'examined)',
    unless=_NUMBERS,
    compares=True,
  ),
  Rule(content.duplicates, WARNING, 'the same image twice in a split'),
  Rule(
    content.leaked,
    WARNING,
    'images of the evaluation split that are also in training',
    compares=True,
  ),
)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """A finding with the rule that made it and the split it is about."""

  rule: Rule
  split: str
  finding: Finding


def diagnose(surveys: Sequence[Survey]) -> list[Diagnosis]:
  """Applies all rules to the splits of one data set, in the table's order."""
  train = [s for s in surveys if s.for_training]
  found = []
  for rule in RULES:
    for s in surveys:
      arguments = [s]
      if rule.compares:
        # Without the training split there is nothing to compare with.
        if not train or s.for_training:
          continue
        arguments = [train[0], s]
      # A rule about two splits is silenced by an explanation in either.
      concerned = {a.split for a in arguments}
      explained = any(
        d.rule.check in rule.unless and d.split in concerned for d in found
      )
      finding = None if explained else rule.check(*arguments)
      # `class_count` finds the same in every split: reported once.
      if finding and all(d.finding != finding for d in found):
        found.append(Diagnosis(rule, s.split, finding))
  return found
