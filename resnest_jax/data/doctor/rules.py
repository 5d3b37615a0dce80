"""The table of all rules, and their application.

A rule is a function of the survey of a split, or of the training split and
another one. It returns a `Finding`, or None if nothing is wrong. Its docstring
is its row in docs/doctor.md.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from resnest_jax.data.doctor import content, files, values
from resnest_jax.data.doctor.observe import Survey
from resnest_jax.findings import Finding

Check = Callable[..., Finding | None]
ERROR, WARNING = 'error', 'warning'


@dataclasses.dataclass(frozen=True)
class Rule:
  """A kind of fault."""

  check: Check
  severity: str  # `ERROR` stops a training.
  unless: tuple[Check, ...] = ()  # Explain more: skipped if one finds a fault.
  compares: bool = False  # Takes two surveys, of training and of another split.

  @property
  def name(self) -> str:
    return self.check.__name__


# Rules that explain why masks hold values without a class. They silence the
# bare statement that such values exist, and what follows from it.
_RELEASE = (values.wrong_ade20k_release,)
_EXPLAINED = (
  *(*_RELEASE, values.off_by_one, values.train_ids),
  *(values.label_ids, values.stretched_masks),
)
_MEANINGS = (*_EXPLAINED, values.smoothed_masks)
_NUMBERS = (*_MEANINGS, values.unknown_values)
_FILES = (
  *(files.image_depth, files.mask_depth, files.size_mismatch),
  *(files.colour_masks, files.grey_masks_in_colour),
)
_UNIFORM = (content.no_labels, content.identical_masks)
_UNSURE = (*_NUMBERS, values.maybe_off_by_one)

# Order matters: `unless` only sees the rules above. The most specific
# explanation comes first, errors before warnings.
RULES = (
  Rule(values.class_count, ERROR),
  Rule(files.unreadable, ERROR),
  Rule(files.image_depth, ERROR),
  Rule(files.mask_depth, ERROR),
  Rule(files.size_mismatch, ERROR),
  Rule(values.wrong_ade20k_release, ERROR),
  # The full release and the instance masks of ADE20K are also coloured.
  Rule(files.colour_masks, ERROR, _RELEASE),
  Rule(files.grey_masks_in_colour, ERROR, _RELEASE),
  Rule(values.stretched_masks, ERROR, (*_RELEASE, files.mask_depth)),
  Rule(values.off_by_one, ERROR),
  Rule(values.label_ids, ERROR),
  Rule(values.train_ids, ERROR),
  Rule(values.smoothed_masks, ERROR, _EXPLAINED),
  Rule(values.unknown_values, ERROR, _MEANINGS),
  Rule(content.no_labels, ERROR, _NUMBERS),
  Rule(content.identical_masks, ERROR, (content.no_labels,)),
  Rule(files.refused, ERROR, (*_FILES, *_NUMBERS, *_UNIFORM)),
  # Warnings: these are legitimate in some data sets, so training starts.
  Rule(files.damaged_jpeg, WARNING),
  Rule(files.image_channels, WARNING),
  Rule(values.maybe_smoothed, WARNING, _NUMBERS),
  Rule(values.maybe_off_by_one, WARNING, _NUMBERS),
  Rule(content.ignored_share, WARNING, (*_UNSURE, content.no_labels)),
  Rule(content.unlabelled_masks, WARNING, (*_NUMBERS, content.no_labels)),
  Rule(content.constant_masks, WARNING, _UNIFORM),
  Rule(content.misaligned_masks, WARNING, (content.identical_masks,)),
  Rule(content.absent_classes, WARNING, (*_UNSURE, *_UNIFORM)),
  Rule(content.untrained_classes, WARNING, _NUMBERS, compares=True),
  Rule(content.duplicates, WARNING),
  Rule(content.leaked, WARNING, compares=True),
)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """A finding with the rule that made it and the split it is about."""

  rule: Rule
  split: str
  finding: Finding


def diagnose(surveys: Sequence[Survey]) -> list[Diagnosis]:
  """Applies all rules to the splits of one data set, in the table's order."""
  train = [s for s in surveys if s.for_training][:1]
  others = [s for s in surveys if not s.for_training]
  found = []
  for rule in RULES:
    # Without the training split there is nothing to compare with.
    of = itertools.product(train, others) if rule.compares else zip(surveys)
    for arguments in of:
      # A rule about two splits is silenced by an explanation in either.
      concerned = {a.split for a in arguments}
      explained = any(
        d.rule.check in rule.unless and d.split in concerned for d in found
      )
      finding = None if explained else rule.check(*arguments)
      # `class_count` finds the same in every split: reported once.
      new = finding and all(d.finding != finding for d in found)
      if new or (finding and finding.samples):
        found.append(Diagnosis(rule, arguments[-1].split, finding))
  return found
