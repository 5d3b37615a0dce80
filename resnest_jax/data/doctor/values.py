"""Rules about the meaning of the numbers in the masks."""

from collections.abc import Iterable

import numpy as np

from resnest_jax.data.doctor.files import REWRITE
from resnest_jax.data.doctor.observe import Survey, names
from resnest_jax.findings import Finding
from resnest_jax.labels import ADE20K, CITYSCAPES, IGNORE
from resnest_jax.text import listed, plural, share_of

_INSTANCE_CLASSES = 100  # Of ADE20K's instance masks, which hold things alone.
_MOST_PROPOSED = 50  # Values that are proposed as classes.
_LABEL_IDS = 33  # The highest of Cityscapes.
# Of unknown pixels that lie in strips, where masks were smoothed.
_SMOOTHED = 0.5
_FEWEST_STRIPS = 100
# Of the pixels of a class that lies nowhere else; corners are in no strip.
_OF_BORDERS = 0.75


def class_count(s: Survey) -> Finding | None:
  """the network has another number of classes than the data set"""
  classes = len(s.labels.classes)
  if s.num_outputs in (0, classes):  # 0: as many as the data has.
    return None
  why = ''
  if s.num_outputs == classes + 1 and s.classes_file:
    why = f' A background that is to be learnt has a line in {s.classes_file}.'
  elif s.num_outputs == classes + 1:
    why = ' Pixels of no class ("other", "background") are ignored.'
  return Finding(
    f'config.model.num_classes is {s.num_outputs}, but {s.data} has '
    f'{plural(classes, "class")}.{why}',
    (),
    f'Add --config.model.num_classes={classes}, or 0 to follow the data.',
  )


def _counts_from(s: Survey) -> int | None:
  """The first class's value; None for gaps or several values per class."""
  first, last = s.class_values.min(), s.class_values.max()
  gapless = last - first + 1 == len(s.class_values) == len(s.labels.classes)
  return int(first) if gapless else None


def off_by_one(s: Survey) -> Finding | None:
  """masks that count from 0 where 1 is meant, or the reverse"""
  classes, first = len(s.labels.classes), _counts_from(s)
  # Exactly one value too many, the number of classes itself, is the sign.
  if first == 0 and s.unknown_values.tolist() == [classes]:
    bad = s.having(s.unknown_values)
    return Finding(
      f'{share_of(bad, s.index_masks, "mask", "have")} the value {classes}: '
      f'they count the {classes} classes from 1, but {s.data} counts from 0 '
      f'(0 to {classes - 1}).',
      names(bad),
      _count_from_1(s),
    )
  # The release has no pixel of 255. Masks that were already lowered by one
  # (MMSegmentation's reduce_zero_label) have it where "other" was.
  lowered = s.values.size and s.values.max() < classes
  if _is_ade20k(s) and IGNORE in s.histogram and lowered:
    bad = s.having(np.array([IGNORE]))
    return Finding(
      f'{share_of(bad, s.index_masks, "mask", "have")} the value {IGNORE}, and '
      f'none has {classes}: they count the classes from 0 (0 to {classes - 1}, '
      f'{IGNORE} for "other"), but {s.data} counts from 1 (0 is "other"). '
      'Every class would be taken for the one before it, and '
      f'{s.labels.classes[0]} would be ignored.',
      names(bad),
      'Prepare the release itself, whose masks count from 1 (python -m '
      'resnest_jax.data.prepare ade20k), or add 1 to the masks: 255 becomes 0.',
    )
  return None


def _count_from_1(s: Survey) -> str:
  """The remedy for masks in which 0 is no class, or the background."""
  if not s.classes_file:
    return (
      'Give the values in the classes file of your own data ("1: name" for '
      'each class, and "ignore: 0"; docs/own-data.md), or write mask - 1, '
      f'with {IGNORE} where the mask is 0.'
    )
  named = _lines(enumerate(_named(s), 1))
  without = f'is no class, replace the lines by:\n  ignore: 0\n{named}'
  if 'background' in s.labels.classes:
    return (
      f'In {s.classes_file}, if the last class is missing, add a line for it:\n'
      f'  {len(s.labels.classes)}: its name\nIf 0 {without}'
    )
  return (
    f'In {s.classes_file}, if 0 is the background, add a line for it in front, '
    f'so that the lines are:\n  0: background\n{named}\nIf 0 {without}'
  )


def _lines(facts: Iterable[tuple[object, object]]) -> str:
  return '\n'.join(f'  {key}: {value}' for key, value in facts)


def _named(s: Survey) -> list[str]:
  """'leaf 34 139 34': the classes as they stand in the classes file."""
  chosen = s.conversion.classes.chosen
  both = zip(s.labels.classes, s.labels.palette.tolist(), strict=True)
  return [x if x in chosen else f'{x} {r} {g} {b}' for x, (r, g, b) in both]


def _is_ade20k(s: Survey) -> bool:
  return s.labels.classes == ADE20K.classes and _counts_from(s) == 1


def maybe_off_by_one(s: Survey) -> Finding | None:
  """all values except the last or the first occur: perhaps off by one"""
  classes, first, values = len(s.labels.classes), _counts_from(s), {*s.values}
  last, missing = classes - 1, s.labels.classes[-1]
  # If one of these is missing, the first or last may be for the same reason.
  if classes < 3 or not values.issuperset(range(1, last)):
    return None
  remedy = 'give the right values in the classes file (docs/own-data.md).'
  ignored = s.having(np.array([IGNORE]))
  most = 2 * len(ignored) > len(s.index_masks)
  if first == 0 and values == {*range(last)} and most:
    what = (
      f'from 0 to {last - 1} occur and {last} does not, and {len(ignored)} '
      f'have {IGNORE}, as if 1 had been subtracted from correct masks, which '
      f'turns 0 into {IGNORE}.'
    )
    remedy = f'add 1 to the masks, as uint8: {IGNORE} becomes 0.'
  elif first == 1 and {0, last} <= values and classes not in values:
    what = (
      f'from 0 to {last} occur and {classes} does not, as if masks counted '
      f'from 0; {s.data} counts from 1 and ignores 0.'
    )
  elif first == 0 and last in values and 0 not in values:
    missing = s.labels.classes[0]
    what = (
      f'from 1 to {last} occur and 0 does not, as if masks counted from 1; '
      f'{s.data} counts from 0.'
    )
  else:
    return None
  return Finding(
    f'In {plural(len(s.index_masks), "mask")} all values {what}',
    (),
    'Look at the names in the contact sheet (--out DIR draws it). If they are '
    f'right, {missing!r} simply does not occur; if all are one class off, '
    f'{remedy}',
  )


def wrong_ade20k_release(s: Survey) -> Finding | None:
  """masks of ADE20K's full release or its instance masks"""
  if not _is_ade20k(s):
    return None
  classes = len(s.labels.classes)
  bad = [o for o in s.readable if len(o.colours)]
  colours = [o.colours for o in bad]
  if beyond := s.having(s.unknown_values):
    bad = beyond
    what = (
      f'values up to {s.unknown_values.max()}, which only the full release '
      f'with thousands of classes has; {classes} is the highest here'
    )
  # Red holds the class (1 to 100), green the object, blue 0.
  elif colours and all(
    not c[:, 2].any() and 0 < c[:, 0].max() <= _INSTANCE_CLASSES
    for c in colours
  ):
    what = (
      f'the colours of instance masks: {_INSTANCE_CLASSES} classes of things '
      'in the red channel, the number of the object in the green channel'
    )
  # The class is red / 10 * 256 + green, blue holds the object.
  elif colours and all(not (c[:, 0] % 10).any() and c.any() for c in colours):
    what = (
      'the colours of the full release (*_seg.png), which encodes thousands of '
      'classes'
    )
  else:
    return None
  return Finding(
    f'{share_of(bad, s.readable, "mask", "have")} {what}.',
    names(bad),
    f'The {classes} classes are in the masks of the scene parsing release, '
    'annotations/ of ADEChallengeData2016.zip: python -m '
    'resnest_jax.data.prepare ade20k downloads and checks it. If these masks '
    'are from it, they were saved as JPEG or resized with interpolation.',
  )


def train_ids(s: Survey) -> Finding | None:
  """Cityscapes' train ids where label ids are meant, or positions of classes
  where the classes file has other values
  """
  classes = len(s.labels.classes)
  if s.classes_file:
    return _positions(s)
  # 13 of Cityscapes' 19 classes; masks of train ids have none of them.
  higher = s.class_values[s.class_values >= classes]
  few = s.values.size < max(classes / 3, 3) or 2 * higher.size < classes
  if few or s.values.max() >= classes:
    return None
  bad = s.having(np.arange(classes))
  return Finding(
    f'No mask has a value above {s.values.max()} (except {IGNORE}), but '
    f'{higher.size} of the {classes} classes have higher values, up to '
    f'{higher.max()}: these are train ids (0 to {classes - 1}), but '
    f'{s.data} has label ids.',
    names(bad),
    'Use the masks of label ids (*_gtFine_labelIds.png) from the official '
    'gtFine_trainvaltest.zip: python -m resnest_jax.data.prepare '
    'cityscapes --archive_dir FOLDER.',
  )


def _positions(s: Survey) -> Finding | None:
  classes, others = len(s.labels.classes), s.values[s.values > 0]
  # Where another value than 0 is a class, the file rather lacks some.
  unknown = others.size and np.isin(others, s.unknown_values).all()
  if not unknown or others.max() >= classes:
    return None
  bad = s.having(others)
  return Finding(
    f'{share_of(bad, s.index_masks, "mask", "have")} only values from 0 to '
    f'{others.max()}: the positions of the classes in {s.classes_file} rather '
    f'than their values ({listed(s.class_values)}).',
    names(bad),
    f'If so, replace the lines of {s.classes_file} by:\n'
    f'{_lines(enumerate(_named(s)))}',
  )


def label_ids(s: Survey) -> Finding | None:
  """Cityscapes' label ids where train ids are meant"""
  ids = np.flatnonzero(CITYSCAPES.to_train_id != IGNORE)
  if len(s.labels.classes) != len(ids) or _counts_from(s) != 0:
    return None
  if s.unknown_values.size < 2 or s.unknown_values.max() > _LABEL_IDS:
    return None
  if s.classes_file and set(s.labels.classes) != set(CITYSCAPES.classes):
    return None
  bad = s.having(s.unknown_values)
  return Finding(
    f'{share_of(bad, s.index_masks, "mask", "have")} values up to '
    f"{s.unknown_values.max()}: these are Cityscapes' label ids (0 to "
    f'{_LABEL_IDS}), but {s.data} has train ids (0 to {len(ids) - 1}).',
    names(bad),
    'Prepare the official archives, whose label ids are converted (python -m '
    'resnest_jax.data.prepare cityscapes --archive_dir FOLDER), or use masks '
    'of train ids: csCreateTrainIdLabelImgs of cityscapesScripts writes them.',
  )


def stretched_masks(s: Survey) -> Finding | None:
  """class numbers multiplied to be visible: 0 and 255 instead of 0 and 1, or
  any other step
  """
  values = np.array(list(s.histogram))
  # A classes file may give 255 to a class; then such values are no accident.
  if values.size < 2 or IGNORE in s.class_values:
    return None
  unknown = values[values > s.class_values.max()]
  if not (step := _step(s, values, unknown)):
    return None
  multiples = values[values % step == 0]
  but = f' but {IGNORE}' if len(multiples) < len(values) else ''
  return Finding(
    f'All values{but} are multiples of {step} ({listed(values)}): the masks '
    f'were stretched to be visible. {IGNORE} is ignored.',
    names(s.having(unknown)),
    _unstretch(s, step, multiples),
  )


def _step(s: Survey, values: np.ndarray, unknown: np.ndarray) -> int:
  """The step whose multiples explain the values; 0 if there is none."""
  classes = len(s.labels.classes)
  if (s.unknown_values > s.class_values.max()).any():
    step = int(np.gcd.reduce(s.values))
    explained = step > 1 and s.values.max() // step < classes
    # A single value, a multiple of itself, proves nothing, except for two
    # classes: 0 and 128. A step of 2 is rather off by one.
    several = np.count_nonzero(s.values) > 1
    if explained and (several or (classes == 2 and step > 2)):
      return step
  # 1, 2 or 4 bits as decoders spread them over 8, or classes over all levels.
  for step in (255, 85, 17, 255 // max(classes - 1, 1), 255 // classes):
    spread = step > 1 and not (values % step).any()
    # Masks of 0 and 255 look like one class and ignored pixels.
    beyond = unknown[unknown != IGNORE].size or values.tolist() == [0, IGNORE]
    if spread and beyond and values.max() // step <= classes:
      return step
  return 0


def _unstretch(s: Survey, step: int, multiples: np.ndarray) -> str:
  """The remedy, in the classes file if there is one, or in the masks."""
  if s.classes_file:
    train_ids, names = s.labels.to_train_id[multiples // step], _named(s)
    lines = (
      ('ignore', value) if k == IGNORE else (value, names[k])
      for value, k in zip(multiples, train_ids, strict=True)
    )
    return (
      f'If the values mean these classes, write in {s.classes_file} '
      f'(docs/own-data.md):\n{_lines(lines)}'
    )
  if len(multiples) == len(s.histogram):
    return f'{REWRITE}cv2.imwrite(new, mask // {step}).'
  return f'{REWRITE}mask[mask != {IGNORE}] //= {step}; cv2.imwrite(new, mask).'


def unknown_values(s: Survey) -> Finding | None:
  """values that no class has"""
  if not s.unknown_values.size:
    return None
  bad, largest = s.having(s.unknown_values), s.class_values.max()
  pixels = sum(s.histogram[value] for value in s.unknown_values.tolist())
  share = pixels / sum(s.histogram.values())
  first = s.unknown_values[0]
  line = s.conversion.naming(first) if s.conversion else f'"{first}: name"'
  ignored = f', and {IGNORE} for pixels to ignore' if s.ignores_255 else ''
  return Finding(
    f'{share_of(bad, s.index_masks, "mask", "have")} values that no class has: '
    f'{listed(s.unknown_values)}, on {share:.2%} of the pixels. {s.data} has '
    f'values up to {largest}{ignored}.',
    names(bad),
    f'Name them in {s.classes_file or "the classes file of your own data"} '
    f'({line}, or "ignore: {first}"; docs/own-data.md). Values at borders of '
    'objects alone come from JPEG or from interpolation; use the originals, or '
    f'resize them with cv2.INTER_NEAREST.{_proposal(s)}',
  )


def _proposal(s: Survey) -> str:
  """The lines of a classes file that has all values; '' where none would do."""
  if not s.conversion or s.unknown_values.size > _MOST_PROPOSED:
    return ''
  own, named = s.conversion.classes, _named(s)
  if len(s.values) == len(named) and own.values == (*zip(range(len(named))),):
    lines = [*zip(s.values, named, strict=True)]
    why = 'If the values mean the classes in their order, it'
  else:
    values = (' '.join(map(str, x)) for x in own.values)
    lines = [*zip(values, named, strict=True)]
    lines += [(value, f'class_{value}') for value in s.unknown_values]
    why = 'With all values, whose new names you change, it'
  lines += [('ignore', value) for value in own.ignored]
  return f'\n{why} is:\n{_lines(lines)}'


def smoothed_masks(s: Survey) -> Finding | None:
  """borders that were smoothed: values that no class has, between those of
  the classes
  """
  pixels = sum(s.histogram[value] for value in s.unknown_values.tolist())
  thin = s.summed('between')
  between = sum(thin[value] for value in s.unknown_values.tolist())
  # A single value is rather a class that the file lacks.
  if s.unknown_values.size < 3 or between < _SMOOTHED * pixels:
    return None
  bad = s.having(s.unknown_values)
  remedy = (
    'The classes of these pixels are lost: use the masks before they were '
    'resized, rotated or blurred, and do that with cv2.INTER_NEAREST.'
  )
  if s.classes_file and len(s.class_values) == 2:
    middle = (min(s.histogram) + max(s.histogram) + 1) // 2
    remedy += (
      ' Or divide them in the middle: mask = cv2.imread(old, '
      f'cv2.IMREAD_UNCHANGED); cv2.imwrite(new, np.where(mask < {middle}, '
      f'{listed(s.class_values)}).astype(np.uint8)).'
    )
  return Finding(
    f'{share_of(bad, s.index_masks, "mask", "have")} smoothed borders: '
    f'{between / pixels:.0%} of the pixels with values that no class has '
    f'({listed(s.unknown_values)}) lie in thin strips between a lower and a '
    'higher value.',
    names(bad),
    remedy,
  )


def maybe_smoothed(s: Survey) -> Finding | None:
  """borders that pass through the numbers in between, as after smoothing"""
  between = s.summed('between')
  strips = {
    value: number
    for value, number in s.summed('ramps').items()
    # A class that lies nowhere else is one of borders.
    if between[value] < _OF_BORDERS * s.histogram[value]
  }
  ramps = sum(strips.values())
  jumps = sum(o.jumps for o in s.index_masks)
  if ramps < _FEWEST_STRIPS or ramps < jumps:
    return None
  most = max(strips, key=strips.get)
  bad = [o for o in s.index_masks if o.ramps.sum() > o.jumps]
  return Finding(
    f'{ramps / (ramps + jumps):.0%} of the borders between classes whose '
    'numbers are not neighbours pass through a number in between, in a strip '
    f'of a few pixels, mostly {most} '
    f'({s.labels.classes[s.labels.to_train_id[most]]}).',
    names(bad),
    'Masks that were resized with interpolation look so: use the originals, '
    'and resize them with cv2.INTER_NEAREST. If the classes are steps of one '
    'quantity, such as height, nothing is wrong.',
  )
