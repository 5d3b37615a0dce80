"""Rules about what is in images and masks, and how they are shared out."""

from collections.abc import Sequence

import numpy as np

from resnest_jax.data.doctor.observe import Observation, Survey, names
from resnest_jax.findings import Finding
from resnest_jax.text import listed, plural, share_of

# A class that training should have shown this many times by the evaluation
# split's rate, and has not, is missing and not just rare: chance leaves one
# out of 3000 such classes.
_EXPECTED = 8
# Of masks whose borders can be compared with the image's.
_ALIGNMENT_SAMPLES = 20
_ALIGNED_SHARE = 0.65


def no_labels(s: Survey) -> Finding | None:
  if not s.index_masks or s.class_counts[0][:-1].any():
    return None
  return Finding(
    f'No pixel of {plural(len(s.index_masks), "mask")} has a class; their '
    f'values are {listed(s.histogram)}, those of the classes '
    f'{listed(s.class_values)}.',
    names(s.index_masks),
    'Compare both lists. Splits for a test server, as that of Cityscapes, '
    'come without labels: train and evaluate on others.',
  )


def ignored_share(s: Survey) -> Finding | None:
  pixels = s.class_counts[0]
  if not pixels.sum() or pixels[-1] / pixels.sum() <= 0.5:
    return None
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
    f'If the value {most} is a class of its own, such as a background that '
    'the network should tell from the rest, give it a name in the classes '
    f'file ("{most}: name"; docs/own-data.md). Otherwise nothing is wrong, '
    'but most of the work is for pixels that teach nothing.',
  )


def _ignored(s: Survey, o: Observation) -> float:
  return 1 - o.counts[s.labelled(o)].sum() / o.counts.sum()


def unlabelled_masks(s: Survey) -> Finding | None:
  bad = [o for o in s.index_masks if not s.labelled(o).any()]
  if len(bad) < max(0.05 * len(s.index_masks), 1):
    return None
  return Finding(
    f'{share_of(bad, s.index_masks, "mask", "have")} no labelled pixel.',
    names(bad),
    'Take these samples away, or label them: training spends time on them '
    'and learns nothing.',
  )


def constant_masks(s: Survey) -> Finding | None:
  bad = [o for o in s.index_masks if len(o.values) == 1]
  if len(s.index_masks) < 5 or 2 * len(bad) < len(s.index_masks):
    return None
  values = sorted({int(o.values[0]) for o in bad})
  return Finding(
    f'{share_of(bad, s.index_masks, "mask", "have")} one value all over: '
    f'{listed(values)}.',
    names(bad),
    'Open some of these masks: if their images show more than one class, the '
    'masks were written wrongly. If not, fewer of them are enough.',
  )


def identical_masks(s: Survey) -> Finding | None:
  masks = {o.mask_hash for o in s.readable}
  images = {o.image_hash for o in s.readable}
  if len(masks) > 1 or len(images) < 3:
    return None
  return Finding(
    f'{len(images)} different images have the same mask, pixel for pixel.',
    names(s.readable),
    'The program that wrote the masks has written one and the same. Write '
    'them again.',
  )


def duplicates(s: Survey) -> Finding | None:
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
    f'Images that are there more than once: {len(groups)}, in '
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
    f'{"is" if len(groups) == 1 else "are"} in {train.split} too: scores '
    'on them say nothing about new images.',
    _pairs(groups),
    f'Take them out of {train.split}. If all of them are, both splits read '
    'the same files: look at config.data.train_split and eval_split.',
  )


def _pairs(groups: Sequence[Sequence[Observation]]) -> tuple[str, ...]:
  return tuple(' = '.join(o.name for o in group) for group in groups)


def absent_classes(s: Survey) -> Finding | None:
  """Not of a data set that has only some of its classes, as a small part."""
  classes = len(s.labels.classes)
  absent = np.flatnonzero(s.class_counts[1][:-1] == 0)
  if not (s.complete and s.for_training and s.index_masks):
    return None
  if not 0 < len(absent) <= max(classes // 3, 1):
    return None
  missing = [s.labels.classes[k] for k in absent]
  return Finding(
    f'{share_of(absent, s.labels.classes, "class", "do")} not occur in '
    f'{s.split}: '
    f'{listed(missing, 20)}.',
    (),
    'Compare the values of the masks with those of the classes. A class that '
    'really has no pixels cannot be learnt: add images with it, or take it '
    'out.',
  )


def untrained_classes(train: Survey, other: Survey) -> Finding | None:
  if not train.complete or not other.index_masks:
    return None
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
    f'{plural(missing.size, "class", "are")} in {other.split} (in so many of '
    f'{plural(len(other.index_masks), "image")}) but nowhere in {train.split}: '
    f'{listed(counts, 20)}.',
    names(concerned),
    'Nothing can be learnt about them. Draw the splits anew, or look whether '
    'the masks of both were made with the same numbers.',
  )


def _train_ids(s: Survey, o: Observation) -> np.ndarray:
  return s.labels.to_train_id[o.values[s.labelled(o)]]


def misaligned_masks(s: Survey) -> Finding | None:
  """Borders of a mask lie where its image is steep, in most images.

  They do less so in the mask's mirror image. Of masks that belong to other
  images about half fit better than their mirror images; of those that are
  mirrored themselves, or upside down, hardly any.
  """
  for place, mirror in ((1, 'mirrored'), (2, 'upside down')):
    # Masks that are symmetrical say nothing.
    measured = [
      o for o in s.readable if o.edges and o.edges[0] != o.edges[place]
    ]
    bad = [o for o in measured if o.edges[0] < o.edges[place]]
    share = 1 - len(bad) / max(len(measured), 1)
    if len(measured) >= _ALIGNMENT_SAMPLES and share < _ALIGNED_SHARE:
      return Finding(
        f'Only {share:.0%} of {len(measured)} masks follow the edges of their '
        f'image better than the same masks {mirror} do; of masks that fit, '
        'nearly all do.',
        names(bad),
        'Look at the contact sheet (--out DIR draws it). Masks of other '
        'images come from lists that were sorted differently; mirrored ones '
        'from an augmentation that changed the image alone.',
      )
  return None
