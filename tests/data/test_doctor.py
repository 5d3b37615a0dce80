"""The doctor's rules: each finds its fault, and nothing in clean data."""

import functools
import re
from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest
from data.small_archives import encode

from resnest_jax.data.datasets import PreparedSplit
from resnest_jax.data.doctor import observe, report
from resnest_jax.data.doctor.rules import RULES, diagnose
from resnest_jax.data.images import decode_image
from resnest_jax.errors import UserError
from resnest_jax.labels import CITYSCAPES, LabelSet

COLOURS = np.random.default_rng(0).integers(1, 256, (256, 3), np.uint8)
IDS = CITYSCAPES.to_train_id


@dataclass
class Samples:
  """A split in memory; a string in place of a sample is an error."""

  split: str
  labels: LabelSet
  samples: list
  name: str = 'mine'

  def __len__(self):
    return len(self.samples)

  def raw(self, index):
    if isinstance(self.samples[index], str):
      raise UserError(self.samples[index])
    return self.samples[index]

  def changed(self, change, which=(), labels=None, key='mask'):
    """A copy with `change(mask)` for the masks of `which`, or for all."""
    samples = self.samples.copy()
    for i in which or range(len(samples)):
      samples[i] = samples[i] | {key: change(samples[i][key])}
    return replace(self, samples=samples, labels=labels or self.labels)

  def put(self, i, new):
    """A copy with other parts of a sample, or an error."""
    samples = self.samples.copy()
    samples[i] = new if isinstance(new, str) else samples[i] | new
    return replace(self, samples=samples)


def counted(number, first=0):
  """The labels of `number` classes whose values count from `first`."""
  to_train_id = np.full(256, 255, np.uint8)
  to_train_id[first : first + number] = np.arange(number)
  classes = tuple(f'class {k}' for k in range(number))
  return LabelSet('own', classes, COLOURS[:number], to_train_id)


def in_memory(*where):
  split = PreparedSplit(*where)
  samples = [split.raw(i) for i in range(len(split))]
  return Samples(split.split, split.labels, samples)


@pytest.fixture(scope='module')
def clean(mini_data_dir, mini_cityscapes_data_dir):
  """Pairs of clean splits, by name."""
  pairs = {'ade20k': mini_data_dir, 'cityscapes': mini_cityscapes_data_dir}
  for name, folder in pairs.items():
    of_splits = functools.partial(in_memory, f'{name}_mini', folder)
    pairs[name] = list(map(of_splits, ('train', 'validation')))
  streets = pairs['cityscapes']
  # Train ids of all classes, and of those that occur: ten, 0 to 9.
  pairs['19'] = both(lambda m: IDS[m], labels=counted(19))(streets)
  values = np.unique([s['mask'] for s in streets[0].samples])
  table = np.full(256, 255, np.uint8)
  table[values[IDS[values] != 255]] = np.arange(10)
  pairs['10'] = both(lambda m: table[m], labels=counted(10))(streets)
  pairs['2'] = both(lambda m: np.uint8(m == 3), labels=counted(2))(pairs['10'])
  return pairs


def surveys_of(pair, outputs=None):
  outputs = outputs or len(pair[0].labels.classes)
  look = functools.partial(observe.survey, num_outputs=outputs)
  return [look(split, for_training=split is pair[0]) for split in pair]


def examine(pair, outputs=None):
  return diagnose(surveys_of(pair, outputs))


@pytest.mark.parametrize('name', ['ade20k', 'cityscapes', '19', '10', '2'])
def test_clean_data_has_no_findings(clean, name):
  assert examine(clean[name]) == []


def both(change, labels=None):
  return lambda pair: [x.changed(change, labels=labels) for x in pair]


def train(change):
  return lambda pair: [change(pair[0]), pair[1]]


def first(change, *which, key='mask'):
  """Changes the masks of some training samples; of all, if none is named."""
  return train(lambda split: split.changed(change, which, key=key))


def widened(image):
  return np.uint16(image) * 257


def replaced(changes):
  """Writes another value for each of some values of a mask."""
  table = np.arange(256, dtype=np.uint8)
  table[list(changes)] = list(changes.values())
  return lambda mask: table[mask]


same = replaced({})


STRIPES = np.uint8(np.arange(192) // 6 * 7 % 10)


def painted(value, *where):
  """Changes a part of a mask to the value."""

  def change(mask):
    mask = mask.copy()
    mask[where] = value
    return mask

  return change


dot = painted(77, 4, 6)


def copied(*parts):
  """A sample gets parts of another."""
  return train(lambda s: s.put(5, {key: s.samples[2][key] for key in parts}))


class Jpegs(Samples):
  """A copy whose images are decoded from JPEGs; two are damaged inside."""

  def raw(self, index):
    sample = self.samples[index]
    encoded = encode(sample['image'][..., ::-1], '.jpg')
    if index in (3, 7):
      # The decoder takes the marker for the end, and invents the rest.
      middle = len(encoded) // 2
      encoded = encoded[:middle] + b'\xff\xd9' * 20 + encoded[middle + 40 :]
    return sample | {'image': decode_image(encoded, cv2.IMREAD_COLOR_RGB)}


class Choosy(Samples):
  """A copy of which training refuses a sample."""

  def labelled(self, index, sample):
    if index == 7:
      raise UserError('it is odd.\nMake it even, or remove it.')


def interpolated(mask):
  """Made larger with another interpolation than that for masks."""
  small = cv2.resize(mask, None, fx=0.5, fy=0.5, interpolation=0)
  small[small == 255] = 0
  return cv2.resize(small, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)


WHITE = np.uint8(255)
# Rule: (clean pair, function that spoils it, samples concerned in the training
# split, or in the other where a rule compares both).
FAULTS = {
  'class_count': ('10', list, 0),
  'unreadable': ('10', train(lambda s: s.put(3, 'a.png is cut off')), 1),
  'image_depth': ('ade20k', first(widened, 2, key='image'), 1),
  'mask_depth': ('10', first(np.uint16, 1, 2), 2),
  'size_mismatch': ('cityscapes', first(lambda m: m.T, 5), 1),
  'wrong_ade20k_release': ('ade20k', both(lambda m: (m > 0) * (m + 140)), 24),
  'colour_masks': ('10', both(lambda m: COLOURS[m][..., ::-1]), 12),
  'grey_masks_in_colour': ('10', both(lambda m: np.dstack([m, m, m])), 12),
  'stretched_masks': ('2', both(lambda m: m * WHITE), 12),
  'off_by_one': ('ade20k', both(lambda m: m - np.uint8(1)), None),
  'label_ids': ('cityscapes', both(same, labels=counted(19)), 12),
  'train_ids': ('cityscapes', both(lambda m: IDS[m]), 12),
  'smoothed_masks': ('2', first(lambda m: cv2.blur(m * WHITE, (5, 5))), 12),
  'unknown_values': ('10', first(dot, 4, 8), 2),
  'no_labels': ('cityscapes', both(lambda m: m * np.uint8(0)), 12),
  'identical_masks': ('10', both(lambda m: m * 0 + STRIPES), 12),
  'refused': ('10', train(lambda s: Choosy(**vars(s))), 1),
  'damaged_jpeg': ('10', train(lambda s: Jpegs(**vars(s))), 2),
  'image_channels': ('10', train(lambda s: s.put(3, {'channels': 4})), 1),
  'maybe_smoothed': ('10', first(interpolated), 12),
  'maybe_off_by_one': ('10', both(lambda m: m % 255, labels=counted(10, 1)), 0),
  'ignored_share': ('10', first(painted(255, ..., slice(115))), 12),
  'unlabelled_masks': ('10', first(lambda m: m | np.uint8(255), 0, 9), 2),
  'constant_masks': ('10', first(lambda m: m * np.uint8(0), *range(7)), 7),
  'misaligned_masks': ('ade20k', first(np.fliplr), None),
  'absent_classes': ('10', both(same, labels=counted(12)), 0),
  'untrained_classes': ('ade20k', first(replaced({3: 0})), None),
  'duplicates': ('10', copied('image', 'mask'), 1),
  'leaked': ('10', lambda p: [p[0], p[1].put(1, p[0].samples[7])], 1),
}
# What some of them have to name.
NAMED = {
  'smoothed_masks': 'between a lower and a higher value',
  'refused': 'Training refuses 1 of 12 samples: it is odd.',
  'image_channels': '1 of 12 images has 4 channels, of which the first 3 are',
  'mask_depth': '2 of 12 masks are uint16; masks have 8 bits',
  'size_mismatch': '192 x 96, mask 96 x 192',
  'maybe_off_by_one': 'from 0 to 9 occur and 10 does not',
  'absent_classes': '2 of 12 classes do not occur in train: class 10, class 11',
  'untrained_classes': 'sky',
}


def spoil(clean, name):
  pair, change, *_ = FAULTS[name]
  return change(clean[pair])


@pytest.mark.parametrize('name', FAULTS)
def test_fault_is_found_and_named(clean, name):
  outputs = 11 if name == 'class_count' else None
  found = examine(spoil(clean, name), outputs)
  assert {d.rule.name for d in found} == {name}
  compares = found[0].rule.compares
  assert found[0].split == ('validation' if compares else 'train')
  finding = found[0].finding
  assert FAULTS[name][2] in (None, len(finding.samples))
  assert NAMED.get(name, '') in finding.what
  assert len(finding.remedy) > 20


def test_every_rule_has_a_fault_and_is_documented(root):
  assert [rule.name for rule in RULES] == list(FAULTS)
  text = (root / 'docs' / 'doctor.md').read_text()
  rows = re.findall(r'^\| `(\w+)` \| (\w+) \| (.*) \|$', text, re.M)
  meaning = {r: ' '.join(r.check.__doc__.split()) for r in RULES}
  assert rows == [(r.name, r.severity, meaning[r]) for r in RULES]


def steps(mask):
  return np.uint8(mask % 4 * 80)


def and_255(mask):
  return np.where(mask == 9, 255, steps(mask)).astype(np.uint8)


def lowered(mask):
  """Masks that count from 0, from which 1 was subtracted."""
  return np.where(mask == 255, mask, mask - np.uint8(1))


def coloured(code):
  table = np.array([code(k) for k in range(256)]).astype(np.uint8)
  return both(lambda m: table[m][..., ::-1])


def of_the_next(pair):
  """Masks in another order; those of another size do not count."""
  order = sorted(pair[0].samples, key=lambda s: s['mask'].shape)
  samples = [
    s | {'mask': np.resize(other['mask'], s['mask'].shape)}
    for s, other in zip(order, order[1:] + order[:1], strict=True)
  ]
  return [replace(pair[0], samples=samples), pair[1]]


def lowered_of_one_class(pair):
  return both(lowered)(first(painted(0, ..., slice(115)))(pair))


# Red and green hold the class, blue the object.
FULL_RELEASE = coloured(lambda k: (k // 15 * 10, k % 15 * 17, k))
# Red holds the class, green the object.
INSTANCES = coloured(lambda k: (min(k, 100), 3, 0))


VARIANTS = [
  ('10', first(lambda m: np.where(m < 10, m + 1, 255)), 'off_by_one', '10'),
  ('10', both(steps, labels=counted(4)), 'stretched_masks', r'240.*mask //'),
  ('10', both(and_255, labels=counted(4)), 'stretched_masks', r'240.*\] //='),
  # One class more than there are.
  ('10', both(steps, labels=counted(3)), 'unknown_values', '240'),
  # Two classes of which one has any value.
  ('2', both(lambda m: m * np.uint8(128)), 'stretched_masks', r'\(0, 128'),
  ('10', both(lowered), 'maybe_off_by_one', '0 to 8 occur and 9 does not'),
  # Most pixels had the first class: that they are ignored is not said.
  ('10', lowered_of_one_class, 'maybe_off_by_one', '0 to 8'),
  # Perhaps masks that count from 1, in which the last class is missing.
  ('10', both(replaced({0: 255})), 'maybe_off_by_one', ''),
  ('10', both(replaced({9: 0, 255: 0})), 'absent_classes', '1 of 10 class'),
  ('10', copied('image'), 'duplicates', 'masks of 1 differ'),
  ('ade20k', FULL_RELEASE, 'wrong_ade20k_release', '_seg.png'),
  ('ade20k', INSTANCES, 'wrong_ade20k_release', 'instance masks'),
  ('ade20k', first(np.flipud), 'misaligned_masks', 'upside down'),
  ('ade20k', of_the_next, 'misaligned_masks', ''),
  ('10', first(lambda m: m.T, 5), 'size_mismatch', r'0 of 1 image .*mask\.T'),
  # Label ids without a class are known.
  ('cityscapes', first(replaced({7: 29}), 2), None, ''),
  ('cityscapes', first(replaced({7: 34}), 2), 'unknown_values', '34'),
]


@pytest.mark.parametrize(('pair', 'spoil', 'rule', 'named'), VARIANTS)
def test_variants(clean, pair, spoil, rule, named):
  found = examine(spoil(clean[pair]))
  assert {d.rule.name for d in found} == ({rule} if rule else set())
  text = ''.join(f'{d.finding.what} {d.finding.remedy}' for d in found)
  assert re.search(named, text, re.DOTALL)


def test_masks_of_other_sizes_are_drawn_in_colour(clean, tmp_path):
  turned, _ = first(lambda m: m.T)(clean['10'])
  report.draw(tmp_path, [turned], surveys_of([turned]), [])
  picture = cv2.imread(str(tmp_path / 'doctor.png'))[..., ::-1]
  assert (picture == COLOURS[0]).all(-1).sum() > 1000


DRAWN = 'image_depth', 'size_mismatch', 'colour_masks', 'duplicates'


@pytest.mark.parametrize('name', ['unreadable', *DRAWN])
def test_faulty_samples_are_drawn_and_marked(clean, name, tmp_path):
  pair, pictures = spoil(clean, name), []
  surveys = surveys_of(pair)
  for found in ([], diagnose(surveys)):
    report.draw(tmp_path, pair, surveys, found)
    pictures.append((tmp_path / 'doctor.png').read_bytes())
  # What cannot be read cannot be shown.
  assert (pictures[0] == pictures[1]) == (name == 'unreadable')


def test_what_two_splits_share_is_described_once(clean):
  found = examine(first(dot, 4)(clean['10']))
  other = replace(found[0], split='validation')
  (text,) = report.paragraphs([*found, other])
  assert text.startswith('error: unknown_values (train and validation)\n')
  assert 'Samples: {0}, {0}\n'.format(*found[0].finding.samples) in text


SEEN = {'absent_classes': 11, 'untrained_classes': 23}


@pytest.mark.parametrize(('name', 'seen'), SEEN.items())
def test_few_samples_do_not_prove_absence(clean, name, seen):
  # What is absent in some samples may be in the others.
  train, rest = surveys_of(spoil(clean, name))
  assert diagnose([replace(train, seen=train.seen[:seen]), rest]) == []


def test_counts_of_a_survey(clean):
  masks = [sample['mask'] for sample in clean['cityscapes'][0].samples]
  s = surveys_of(clean['cityscapes'])[0]
  values, counts = np.unique(np.concatenate(masks), return_counts=True)
  assert s.histogram == dict(zip(values.tolist(), counts, strict=True))
  pixels, images = s.class_counts
  for k, expected in enumerate((*range(19), 255)):
    assert pixels[k] == sum((IDS[m] == expected).sum() for m in masks)
    assert images[k] == sum((IDS[m] == expected).any() for m in masks)
