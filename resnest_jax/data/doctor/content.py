"""Rules about the content of images and masks, and about their splits."""

from collections.abc import Sequence

import numpy as np

from resnest_jax.data.doctor.observe import Observation, Survey, names
from resnest_jax.findings import Finding
from resnest_jax.text import listed, plural, share_of

# Training images that should show a class, by its rate in the evaluation
# split. If none does, chance is no explanation: exp(-8) is 1 in 3000.
_EXPECTED = 8
# Enough to tell the share of clean data, nearly 1, from that of others, 0.5.
_ALIGNMENT_SAMPLES = 20
_ALIGNED_SHARE = 0.65


def no_labels(s: Survey) -> Finding | None:
  """not one labelled pixel"""
  if not s.index_masks or s.class_counts[0][:-1].any():
    return None
  return Finding(
    f'No pixel of {plural(len(s.index_masks), "mask")} has a class: the masks '
    f'hold the values {listed(s.histogram)}, the classes have '
    f'{listed(s.class_values)}.',
    names(s.index_masks),
    "Compare both lists. Splits for a test server, such as Cityscapes' test, "
    'come without labels: train and evaluate on other splits.',
  )


def ignored_share(s: Survey) -> Finding | None:
  """more than half of the pixels are ignored"""
  pixels = s.class_counts[0]
  if not pixels.sum() or pixels[-1] / pixels.sum() <= 0.5:
    return None
  most = max(s.ignored, key=s.ignored.get)
  line = s.conversion.naming(most) if s.conversion else f'"{most}: name"'
  return Finding(
    f'{pixels[-1] / pixels.sum():.0%} of the pixels are ignored, '
    f'{s.ignored[most] / pixels.sum():.0%} have the value {most}.',
    names(
      o
      for o in s.index_masks
      if 2 * o.counts[s.labelled(o)].sum() < o.counts.sum()
    ),
    f'If the value {most} is a class, such as a background, name it in the '
    f'classes file ({line}; docs/own-data.md). Otherwise nothing is wrong.',
  )


def unlabelled_masks(s: Survey) -> Finding | None:
  """at least 5 % of the masks have no labelled pixel"""
  bad = [o for o in s.index_masks if not s.labelled(o).any()]
  if len(bad) < max(0.05 * len(s.index_masks), 1):
    return None
  return Finding(
    f'{share_of(bad, s.index_masks, "mask", "have")} no labelled pixel.',
    names(bad),
    'Remove these samples or label them: training learns nothing from them.',
  )


def constant_masks(s: Survey) -> Finding | None:
  """at least half of the masks have a single value"""
  bad = [o for o in s.index_masks if len(o.values) == 1]
  if len(s.index_masks) < 5 or 2 * len(bad) < len(s.index_masks):
    return None
  values = sorted({int(o.values[0]) for o in bad})
  return Finding(
    f'{share_of(bad, s.index_masks, "mask", "have")} a single value: '
    f'{listed(values)}.',
    names(bad),
    'If the images of these masks show more than one class, the masks were '
    'written wrongly. If not, keep fewer of them.',
  )


def identical_masks(s: Survey) -> Finding | None:
  """all images have the same mask"""
  masks = {o.mask_hash for o in s.readable}
  images = {o.image_hash for o in s.readable}
  # One or two images may share a mask legitimately.
  if len(masks) > 1 or len(images) < 3:
    return None
  return Finding(
    f'{len(images)} different images have the same mask, pixel for pixel.',
    names(s.readable),
    'Correct the program that wrote them, and write the masks again.',
  )


def duplicates(s: Survey) -> Finding | None:
  """the same image twice in a split"""
  by_hash: dict[bytes, list[Observation]] = {}
  for o in s.readable:
    by_hash.setdefault(o.image_hash, []).append(o)
  groups = [group for group in by_hash.values() if len(group) > 1]
  if not groups:
    return None
  differing = sum(len({o.mask_hash for o in x}) > 1 for x in groups)
  return Finding(
    f'Images that occur more than once: {len(groups)}, in '
    f'{sum(map(len, groups))} samples. The masks of {differing} differ.',
    _pairs(groups),
    'Keep one sample of each image, the one with the better mask.',
  )


def leaked(train: Survey, other: Survey) -> Finding | None:
  """images of the evaluation split that are also in training"""
  known = {o.image_hash: o for o in train.readable}
  if not (same := [o for o in other.readable if o.image_hash in known]):
    return None
  groups = [(o, known[o.image_hash]) for o in same]
  return Finding(
    f'{share_of(same, other.readable, "image", "are")} in {other.split} and in '
    f'{train.split}: scores on them say nothing about new images.',
    _pairs(groups),
    f'Remove them from {train.split}. If all images are shared, both splits '
    'read the same files: check config.data.train_split and eval_split.',
  )


def _pairs(groups: Sequence[Sequence[Observation]]) -> tuple[str, ...]:
  # `report._faults` splits at ' = ' to find the samples again.
  return tuple(' = '.join(o.name for o in group) for group in groups)


def absent_classes(s: Survey) -> Finding | None:
  """up to a third of the classes do not occur in training (all samples
  examined); if more are absent, the split is a part of a data set and a note
  says so
  """
  # Samples that were not read may have the class.
  if not (s.complete and s.for_training and s.index_masks):
    return None
  classes, images = s.labels.classes, s.class_counts[1]
  absent = [name for k, name in enumerate(classes) if not images[k]]
  # The drawn scenes have 15 of ADE20K's 150 classes, which is no fault.
  if not 0 < len(absent) <= max(len(classes) // 3, 1):
    return None
  return Finding(
    f'{share_of(absent, classes, "class", "do")} not occur in {s.split}: '
    f'{listed(absent, 20)}.',
    (),
    'Compare the values in the masks with those of the classes. To learn a '
    'class add images that show it, or remove the class.',
  )


def untrained_classes(train: Survey, other: Survey) -> Finding | None:
  """classes of the evaluation split that training never shows (all samples
  examined)
  """
  if not train.complete or not other.index_masks:
    return None
  # (C,). `other` need not be complete, as its rates are an estimate anyway.
  images, others = train.class_counts[1][:-1], other.class_counts[1][:-1]
  expected = len(train.index_masks) * others / len(other.index_masks)
  missing = np.flatnonzero((images == 0) & (expected >= _EXPECTED))
  if not missing.size:
    return None
  counts = [f'{train.labels.classes[k]} ({others[k]})' for k in missing]
  concerned = np.flatnonzero(np.isin(other.labels.to_train_id, missing))
  return Finding(
    f'{plural(missing.size, "class", "are")} in {other.split} (counts are out '
    f'of {plural(len(other.index_masks), "image")}) but not in {train.split}: '
    f'{listed(counts, 20)}.',
    names(other.having(concerned)),
    'The network cannot learn them. Draw the splits anew, or check whether '
    'the masks of both use the same numbers.',
  )


def misaligned_masks(s: Survey) -> Finding | None:
  """masks of other images, or mirrored masks: their borders miss the edges"""
  # Borders of a mask lie where its image is steep, more than those of its
  # mirror image: nearly always in clean data, for half of the masks of other
  # images, for hardly any that are themselves mirrored or upside down.
  for place, mirror in ((1, 'mirrored'), (2, 'upside down')):
    # Symmetrical masks have two equal values and prove nothing.
    measured = [
      o for o in s.readable if o.edges and o.edges[0] != o.edges[place]
    ]
    bad = [o for o in measured if o.edges[0] < o.edges[place]]
    share = 1 - len(bad) / max(len(measured), 1)
    if len(measured) >= _ALIGNMENT_SAMPLES and share < _ALIGNED_SHARE:
      return Finding(
        f'Only {share:.0%} of {len(measured)} masks follow the edges of their '
        f'image better than the same masks {mirror}; in clean data nearly all '
        'do.',
        names(bad),
        'Look at the contact sheet (--out DIR draws it). Lists that were '
        'sorted differently pair images with the masks of others; an '
        'augmentation of the images alone leaves masks mirrored.',
      )
  return None
