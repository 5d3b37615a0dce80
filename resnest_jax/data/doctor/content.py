"""Rules about the content of images and masks, and about their splits."""

from collections.abc import Sequence

import numpy as np

from resnest_jax.data.doctor.observe import Observation, Survey, names
from resnest_jax.findings import Finding
from resnest_jax.text import listed, plural, share_of

# Training images that should show a class, by its rate in the evaluation
# split. If there should be 8 and there is none, the class is missing rather
# than rare: chance leaves out one such class in 3000 (exp(-8)).
_EXPECTED = 8
# The share of aligned masks is nearly 1 in clean data and about 0.5 for masks
# of other images, so 20 measured masks suffice to tell the two apart.
_ALIGNMENT_SAMPLES = 20
_ALIGNED_SHARE = 0.65


def no_labels(s: Survey) -> Finding | None:
  # The last count is of ignored pixels.
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
  pixels = s.class_counts[0]
  if not pixels.sum() or pixels[-1] / pixels.sum() <= 0.5:
    return None
  # The value with the most ignored pixels is the one worth naming.
  ignored = {
    value: count
    for value, count in s.histogram.items()
    if value not in s.class_values
  }
  most = max(ignored, key=ignored.get)
  return Finding(
    f'{pixels[-1] / pixels.sum():.0%} of the pixels are ignored, '
    f'{ignored[most] / pixels.sum():.0%} have the value {most}.',
    names(o for o in s.index_masks if _ignored(s, o) > 0.5),
    f'If the network should learn the value {most} as a class, such as a '
    'background, name it in the classes '
    f'file ("{most}: name"; docs/own-data.md). Otherwise nothing is wrong, '
    'but most of the computation goes to pixels that do not train.',
  )


def _ignored(s: Survey, o: Observation) -> float:
  return 1 - o.counts[s.labelled(o)].sum() / o.counts.sum()


def unlabelled_masks(s: Survey) -> Finding | None:
  bad = [o for o in s.index_masks if not s.labelled(o).any()]
  # A few unlabelled masks cost little time and are not reported.
  if len(bad) < max(0.05 * len(s.index_masks), 1):
    return None
  return Finding(
    f'{share_of(bad, s.index_masks, "mask", "have")} no labelled pixel.',
    names(bad),
    'Remove these samples or label them: training spends time on them '
    'and learns nothing.',
  )


def constant_masks(s: Survey) -> Finding | None:
  # A mask of one class is legitimate; half of the masks like this are not.
  bad = [o for o in s.index_masks if len(o.values) == 1]
  if len(s.index_masks) < 5 or 2 * len(bad) < len(s.index_masks):
    return None
  values = sorted({int(o.values[0]) for o in bad})
  return Finding(
    f'{share_of(bad, s.index_masks, "mask", "have")} a single value: '
    f'{listed(values)}.',
    names(bad),
    'Open some of these masks: if their images show more than one class, the '
    'masks were written wrongly. If not, keep fewer of them.',
  )


def identical_masks(s: Survey) -> Finding | None:
  masks = {o.mask_hash for o in s.readable}
  images = {o.image_hash for o in s.readable}
  # One or two images may share a mask legitimately.
  if len(masks) > 1 or len(images) < 3:
    return None
  return Finding(
    f'{len(images)} different images have the same mask, pixel for pixel.',
    names(s.readable),
    'The program that wrote the masks wrote the same one each time. Correct '
    'it and write them again.',
  )


def duplicates(s: Survey) -> Finding | None:
  # Hashes are of decoded pixels: copies are found under any file name, and
  # not after another round of JPEG.
  groups: dict[bytes, list[Observation]] = {}
  for o in s.readable:
    groups.setdefault(o.image_hash, []).append(o)
  groups = [group for group in groups.values() if len(group) > 1]
  if not groups:
    return None
  differing = sum(len({o.mask_hash for o in group}) > 1 for group in groups)
  masks = 'their masks are the same as well'
  if differing:
    masks = f'the masks of {differing} of them differ'
  return Finding(
    f'Images that occur more than once: {len(groups)}, in '
    f'{sum(map(len, groups))} samples; {masks}.',
    _pairs(groups),
    'Keep one sample of each'
    + (' image, the one with the better mask.' if differing else ' image.'),
  )


def leaked(train: Survey, other: Survey) -> Finding | None:
  known = {o.image_hash: o for o in train.readable}
  groups = [
    (o, known[o.image_hash]) for o in other.readable if o.image_hash in known
  ]
  if not groups:
    return None
  return Finding(
    f'{share_of(groups, other.readable, "image")} of {other.split} '
    f'{"is" if len(groups) == 1 else "are"} also in {train.split}: scores '
    'on them say nothing about new images.',
    _pairs(groups),
    f'Remove them from {train.split}. If all images are shared, both splits '
    'read the same files: check config.data.train_split and eval_split.',
  )


def _pairs(groups: Sequence[Sequence[Observation]]) -> tuple[str, ...]:
  # `report._faults` splits at ' = ' to find the samples again.
  return tuple(' = '.join(o.name for o in group) for group in groups)


def absent_classes(s: Survey) -> Finding | None:
  classes = len(s.labels.classes)
  absent = np.flatnonzero(s.class_counts[1][:-1] == 0)
  # Samples that were not read may have the class.
  if not (s.complete and s.for_training and s.index_masks):
    return None
  # If more are absent, the split is a small part of a data set, such as the
  # drawn scenes with 15 of ADE20K's 150 classes; `report.notes` mentions it.
  if not 0 < len(absent) <= max(classes // 3, 1):
    return None
  missing = [s.labels.classes[k] for k in absent]
  return Finding(
    f'{share_of(absent, s.labels.classes, "class", "do")} not occur in '
    f'{s.split}: '
    f'{listed(missing, 20)}.',
    (),
    'Compare the values in the masks with the values of the classes. A class '
    'without pixels cannot be learnt: add images that show it, or remove the '
    'class.',
  )


def untrained_classes(train: Survey, other: Survey) -> Finding | None:
  if not train.complete or not other.index_masks:
    return None
  # Images with each class, (C,). Only `train` has to be complete: the rates of
  # `other` are an estimate anyway.
  images, others = train.class_counts[1][:-1], other.class_counts[1][:-1]
  expected = len(train.index_masks) * others / len(other.index_masks)
  missing = np.flatnonzero((images == 0) & (expected >= _EXPECTED))
  if not missing.size:
    return None
  counts = [f'{train.labels.classes[k]} ({others[k]})' for k in missing]
  concerned = [
    o for o in other.index_masks if np.isin(_train_ids(other, o), missing).any()
  ]
  return Finding(
    f'{plural(missing.size, "class", "are")} in {other.split} (counts are out '
    f'of {plural(len(other.index_masks), "image")}) but not in {train.split}: '
    f'{listed(counts, 20)}.',
    names(concerned),
    'The network cannot learn them. Draw the splits anew, or check whether '
    'the masks of both use the same numbers.',
  )


def _train_ids(s: Survey, o: Observation) -> np.ndarray:
  return s.labels.to_train_id[o.values[s.labelled(o)]]


def misaligned_masks(s: Survey) -> Finding | None:
  # The borders of a mask lie where its image is steep, and the borders of its
  # mirror image do so less. That holds for nearly all masks of clean data, for
  # about half of the masks that belong to other images, and for hardly any
  # masks that are themselves mirrored or upside down.
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
