"""The doctor's rules: each finds its fault, and nothing in clean data."""

import dataclasses
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from resnest_jax.data.checks import report
from resnest_jax.data.checks.observe import (
  Observation,
  Survey,
  known_values,
  survey,
)
from resnest_jax.data.checks.rules import RULES, diagnose
from resnest_jax.data.datasets import open_split
from resnest_jax.data.images import decode_image
from resnest_jax.data.labels import CITYSCAPES, LabelSet
from resnest_jax.errors import UserError

DOCS = Path(__file__).parents[2] / 'docs' / 'doctor.md'
COLOURS = np.random.default_rng(0).integers(1, 256, (256, 3), np.uint8)
IDS = CITYSCAPES.to_train_id


@dataclasses.dataclass
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

  def masks(self, change, which=None, labels=None):
    """A copy with `change(mask)` for the masks of `which`, or for all."""
    samples = [
      s | {'mask': change(s['mask'])} if which is None or i in which else s
      for i, s in enumerate(self.samples)
    ]
    return Samples(self.split, labels or self.labels, samples)

  def put(self, index, sample):
    """A copy with another sample, or with other parts of it."""
    if isinstance(sample, dict):
      sample = self.samples[index] | sample
    samples = [*self.samples[:index], sample, *self.samples[index + 1 :]]
    return Samples(self.split, self.labels, samples)


def counted(number, first=0):
  """The labels of `number` classes whose values count from `first`."""
  to_train_id = np.full(256, 255, np.uint8)
  to_train_id[first : first + number] = np.arange(number)
  classes = tuple(f'class {k}' for k in range(number))
  return LabelSet('own', classes, COLOURS[:number], to_train_id)


@pytest.fixture(scope='module')
def clean(mini_data_dir, mini_cityscapes_data_dir):
  """Pairs of clean splits, by name."""
  pairs = {}
  for name, folder in (
    ('ade20k', mini_data_dir),
    ('cityscapes', mini_cityscapes_data_dir),
  ):
    splits = [
      open_split(f'{name}_mini', folder, split)
      for split in ('train', 'validation')
    ]
    pairs[name] = [
      Samples(s.split, s.labels, [s.raw(i) for i in range(len(s))])
      for s in splits
    ]
  streets = pairs['cityscapes']
  # Train ids of all classes, and of those that occur: ten, 0 to 9.
  pairs['19'] = [s.masks(lambda m: IDS[m], None, counted(19)) for s in streets]
  values = np.unique([s['mask'] for s in streets[0].samples])
  values = values[IDS[values] != 255]
  assert len(values) == 10
  table = np.full(256, 255, np.uint8)
  table[values] = np.arange(10)
  pairs['10'] = [
    s.masks(lambda m: table[m], None, counted(10)) for s in streets
  ]
  pairs['2'] = [
    s.masks(lambda m: np.uint8(m == 3), None, counted(2)) for s in pairs['10']
  ]
  return pairs


def examine(pair, num_outputs=None):
  """What is found in a training and an evaluation split."""
  surveys = [
    survey(
      split,
      for_training=split is pair[0],
      num_outputs=num_outputs or len(split.labels.classes),
    )
    for split in pair
  ]
  return diagnose(surveys)


@pytest.mark.parametrize('name', ['ade20k', 'cityscapes', '19', '10', '2'])
def test_clean_data_has_no_findings(clean, name):
  assert examine(clean[name]) == []


# ---- A fault for each rule -------------------------------------------------
# Rule: (clean pair, function that spoils it, samples concerned in the training
# split, or in the other where a rule compares both, words of the finding).


def both(change, **options):
  return lambda pair: [split.masks(change, **options) for split in pair]


def first(change, **options):
  return lambda pair: [pair[0].masks(change, **options), pair[1]]


def put(index, make):
  """Puts `make(sample)` in the place of a sample of the training split."""
  return lambda pair: [
    pair[0].put(index, make(pair[0].samples[index])),
    pair[1],
  ]


def sixteen_bits(pixels):
  return pixels.astype(np.uint16) * 257


def without_sky(mask):
  return np.where(mask == 3, 0, mask)


def repeated_mask(pair):
  mask = pair[0].samples[0]['mask']
  return both(lambda _: mask)(pair)


def half_unlabelled(mask):
  mask = mask.copy()
  mask[:, : mask.shape[1] * 3 // 5] = 255
  return mask


def dot(mask):
  mask = mask.copy()
  mask[4, 6] = 77
  return mask


def copied(pair):
  train = pair[0]
  parts = {key: train.samples[2][key] for key in ('image', 'mask')}
  return [train.put(5, parts), pair[1]]


def leaking(pair):
  return [pair[0], pair[1].put(1, pair[0].samples[7])]


FAULTS = {
  'class_count': ('10', lambda pair: pair, 0, 'num_classes is 11'),
  'unreadable': (
    *('10', put(3, lambda s: 'a.png is damaged\nMend it or take it away'), 1),
    '1 of 12 samples cannot be read',
  ),
  'image_depth': (
    *('ade20k', put(2, lambda s: {'image': sixteen_bits(s['image'])}), 1),
    '1 of 24 images is uint16',
  ),
  'mask_depth': (
    *('10', first(lambda m: m.astype(np.uint16), which=(1, 2)), 2),
    '2 of 12 masks are uint16 with values from 0 to 255',
  ),
  'size_mismatch': (
    *('cityscapes', first(lambda m: m.T, which=(5,)), 1),
    'image 192 x 96, mask 96 x 192',
  ),
  'wrong_ade20k_release': (
    *('ade20k', both(lambda m: m + np.uint8(140) * (m > 0)), 24),
    'values up to 163',
  ),
  'colour_masks': (
    *('10', both(lambda m: COLOURS[m][..., ::-1]), 12),
    '12 of 12 masks are colour pictures',
  ),
  'grey_masks_in_colour': (
    *('10', both(lambda m: np.repeat(m[..., None], 3, 2)), 12),
    '12 of 12 masks have 3 channels',
  ),
  'stretched_masks': (
    *('2', both(lambda m: m * np.uint8(255)), 12),
    'multiples of 255 (0, 255)',
  ),
  'off_by_one': (
    *('ade20k', both(lambda m: m - np.uint8(1)), None),
    'they count the classes from 0',
  ),
  'label_ids': (
    *('19', None, 12),
    "Cityscapes' label ids",
  ),
  'train_ids': ('cityscapes', both(lambda m: IDS[m]), 12, 'train ids'),
  'unknown_values': (
    *('10', first(dot, which=(4, 8)), 2),
    '2 of 12 masks have values that no class has: 77',
  ),
  'no_labels': (
    *('cityscapes', both(lambda m: m * np.uint8(0)), 12),
    'No pixel of 12 masks has a class',
  ),
  'identical_masks': ('10', repeated_mask, 12, '12 different images'),
  'damaged_jpeg': (
    *('10', lambda pair: [Jpegs(pair[0], damaged=(3, 7)), pair[1]], 2),
    'of 2 of 12 samples can be decoded, but the decoder complains',
  ),
  'maybe_off_by_one': (
    *('10', both(lambda m: np.where(m < 10, m, 0), labels=counted(10, 1)), 0),
    'all values from 0 to 9 occur and 10 does not',
  ),
  'ignored_share': ('10', first(half_unlabelled), 12, 'have the value 255'),
  'unlabelled_masks': (
    *('10', first(lambda m: m | np.uint8(255), which=(0, 9)), 2),
    '2 of 12 masks have no labelled pixel',
  ),
  'constant_masks': (
    *('10', first(lambda m: m * np.uint8(0), which=range(7)), 7),
    '7 of 12 masks have one value all over: 0',
  ),
  'misaligned_masks': (
    *('ade20k', first(lambda m: np.ascontiguousarray(m[:, ::-1])), None),
    'of 24 masks follow the edges',
  ),
  'absent_classes': (
    *('10', both(lambda m: m, labels=counted(12)), 0),
    '2 of 12 classes do not occur in train: class 10, class 11',
  ),
  'untrained_classes': ('ade20k', first(without_sky), None, 'sky'),
  'duplicates': ('10', copied, 1, 'more than once: 1, in 2 samples'),
  'leaked': ('10', leaking, 1, '1 of 4 images of validation is in train'),
}


class Jpegs(Samples):
  """A copy whose images are decoded from JPEGs; some are damaged inside."""

  def __init__(self, of, damaged):
    super().__init__(of.split, of.labels, of.samples)
    self.damaged = damaged

  def raw(self, index):
    sample = self.samples[index]
    encoded = cv2.imencode('.jpg', sample['image'][..., ::-1])[1].tobytes()
    if index in self.damaged:
      encoded = damage(encoded)
    return sample | {'image': decode_image(encoded, cv2.IMREAD_COLOR_RGB)}


def damage(jpeg):
  """The decoder takes the marker for the end, and invents the rest."""
  middle = len(jpeg) // 2
  return jpeg[:middle] + b'\xff\xd9' * 20 + jpeg[middle + 40 :]


def spoil(clean, name):
  pair, change, _, _ = FAULTS[name]
  if name == 'label_ids':
    return [
      s.masks(lambda m: m, None, counted(19)) for s in clean['cityscapes']
    ]
  return change(clean[pair])


def test_every_rule_has_a_fault():
  assert [rule.name for rule in RULES] == list(FAULTS)


@pytest.mark.parametrize('name', FAULTS)
def test_fault_is_found_and_named(clean, name):
  found = examine(
    spoil(clean, name), num_outputs=11 if name == 'class_count' else None
  )
  assert {d.rule.name for d in found} == {name}
  rule = found[0].rule
  assert found[0].split == ('validation' if rule.compares else 'train')
  finding = found[0].finding
  *_, number, words = FAULTS[name]
  assert words in finding.what
  if number is not None:
    assert len(finding.samples) == number
  assert len(finding.remedy) > 20


def test_the_documentation_lists_the_rules():
  rows = re.findall(r'^\| `(\w+)` \| (\w+) \| (.*) \|$', DOCS.read_text(), re.M)
  assert rows == [(r.name, r.severity, r.meaning) for r in RULES]


# ---- Which samples, and what to do ------------------------------------------


def test_samples_concerned_are_named(clean):
  train, other = clean['10']
  names = [sample['name'] for sample in train.samples]
  (found,) = examine([train.masks(dot, (4, 8)), other])
  assert found.finding.samples == (names[4], names[8])
  (found,) = examine(copied(clean['10']))
  assert found.finding.samples == (f'{names[2]} = {names[5]}',)
  assert 'masks are the same' in found.finding.what
  (found,) = examine(
    put(3, lambda s: 'a.png is damaged\nMend it or take it away')(
      (train, other)
    )
  )
  assert found.finding.samples == ('a.png is damaged',)
  assert found.finding.remedy == 'Mend it or take it away'


def test_rotated_photographs_are_recognised(clean):
  (found,) = examine(spoil(clean, 'size_mismatch'))
  # These are in no files: both may be the reason.
  assert 'Perhaps the camera' in found.finding.remedy
  assert 'mogrify -auto-orient' in found.finding.remedy
  assert 'Or the mask is transposed: mask.T' in found.finding.remedy
  pair = first(lambda m: m[:50], which=(5,))(clean['cityscapes'])
  (found,) = examine(pair)
  assert 'EXIF' not in found.finding.remedy
  assert 'transposed' not in found.finding.remedy


def test_masks_of_other_sizes_are_drawn_in_colour(clean, tmp_path):
  train, _ = first(lambda m: m.T, which=(5,))(clean['10'])
  shown = Samples(train.split, train.labels, [train.samples[5]])
  s = survey(shown, for_training=True, num_outputs=10)
  report.draw(tmp_path, [shown], [s], [])
  picture = cv2.imread(str(tmp_path / 'doctor.png'))[..., ::-1]
  values = np.unique(shown.samples[0]['mask'])
  for k in values[values < 10]:
    assert (picture == COLOURS[k]).all(-1).sum() > 4


def test_masks_that_count_from_one(clean):
  pair = first(lambda m: np.where(m < 10, m + 1, 255))(clean['10'])
  found = examine(pair)
  assert [d.rule.name for d in found] == ['off_by_one']
  assert 'they count the 10 classes from 1' in found[0].finding.what


@pytest.mark.parametrize('ignored', [False, True])
def test_class_numbers_times_any_step(clean, ignored):
  def stretch(mask):
    return np.where((mask == 9) & ignored, 255, mask % 4 * 80).astype(np.uint8)

  pair = both(stretch, labels=counted(4))(clean['10'])
  found = examine(pair)
  assert {d.rule.name for d in found} == {'stretched_masks'}
  assert 'multiples of 80 (0, 80, 160, 240' in found[0].finding.what
  assert ('All values but 255' in found[0].finding.what) == ignored
  remedy = found[0].finding.remedy
  assert ('mask[mask != 255] //= 80' in remedy) == ignored
  assert ('cv2.imwrite(path, mask // 80)' in remedy) != ignored
  # One class more than there are.
  found = examine(both(stretch, labels=counted(3))(clean['10']))
  assert {d.rule.name for d in found} == {'unknown_values'}


def test_two_classes_of_which_one_has_any_value(clean):
  found = examine(both(lambda m: m * np.uint8(128))(clean['2']))
  assert {d.rule.name for d in found} == {'stretched_masks'}
  assert 'multiples of 128 (0, 128)' in found[0].finding.what


def test_many_pixels_of_unknown_values_are_not_to_be_ignored(clean):
  change = first(lambda m: np.where(m == 0, 77, m).astype(np.uint8))
  found = examine(change(clean['10']))
  assert [d.rule.name for d in found] == ['unknown_values']
  assert found[0].finding.remedy.startswith('Name the values in the classes')
  found = examine(first(dot, which=(4,))(clean['10']))
  assert found[0].finding.remedy.startswith('Write 255 where there is no class')


def lowered(mask):
  return np.where(mask == 255, mask, mask - np.uint8(1))


def test_masks_from_which_one_was_subtracted(clean):
  """They counted from 0 already, and class 0 has become 255."""
  pair = both(lowered)(clean['10'])
  found = examine(pair)
  assert {d.rule.name for d in found} == {'maybe_off_by_one'}
  assert 'all values from 0 to 8 occur and 9 does not' in found[0].finding.what
  assert "'class 9' just does not occur" in found[0].finding.remedy
  assert 'add 1 to the masks' in found[0].finding.remedy
  # Most of the pixels had the first class: that they are ignored is not said.
  most = np.arange(192) < 115
  mostly = first(lambda m: np.where(most, 0, m))(clean['10'])
  train = mostly[0].masks(lowered)
  assert np.mean([s['mask'] == 255 for s in train.samples]) > 0.5
  found = [d for d in examine([train, pair[1]]) if d.split == 'train']
  assert {d.rule.name for d in found} == {'maybe_off_by_one'}
  # A last class that is absent alone says nothing.
  rare = both(lambda m: np.where(m >= 9, 0, m))(clean['10'])
  assert 'maybe_off_by_one' not in {d.rule.name for d in examine(rare)}


def test_first_class_that_never_occurs(clean):
  """Perhaps masks that count from 1, in which the last class is missing."""
  pair = both(lambda m: np.where(m == 0, 255, m))(clean['10'])
  assert [d.rule.name for d in examine(pair)] == ['maybe_off_by_one'] * 2


def test_image_whose_copies_have_different_masks(clean):
  train, other = clean['10']
  pair = [train.put(5, {'image': train.samples[2]['image']}), other]
  (found,) = examine(pair)
  assert 'the masks of 1 of them differ' in found.finding.what


@pytest.mark.parametrize(
  ('code', 'words'),
  [
    # The full release: red and green hold the class, blue the object.
    (lambda k: (k // 15 * 10, k % 15 * 17, k), 'full release (*_seg.png)'),
    # The instances: red holds the class, green the object.
    (lambda k: (min(k, 100), 3, 0), 'instance masks'),
  ],
)
def test_coloured_masks_of_other_releases(clean, code, words):
  table = np.array([code(k) for k in range(256)]).astype(np.uint8)
  found = examine(both(lambda m: table[m][..., ::-1])(clean['ade20k']))
  assert {d.rule.name for d in found} == {'wrong_ade20k_release'}
  assert words in found[0].finding.what


def test_many_masks_without_the_upper_classes(clean):
  """As in instance masks of one channel: 100 classes."""
  labels = clean['ade20k'][0].labels
  values = np.arange(1, 101)

  def seen(number, values):
    samples = tuple(
      Observation(
        i,
        f'{i}',
        image_size=(10, 15),
        image_type='uint8',
        image_hash=bytes([i % 256, i // 256]),
        mask_shape=(10, 15),
        mask_type='uint8',
        mask_hash=bytes([i % 256, i // 256]),
        values=values,
        counts=np.ones_like(values),
      )
      for i in range(number)
    )
    known = known_values(labels)
    return Survey('ade', 'train', labels, 10**4, samples, True, 150, known)

  (found,) = diagnose([seen(500, values)])
  assert found.rule.name == 'wrong_ade20k_release'
  assert diagnose([seen(499, values)]) == []
  assert diagnose([seen(500, values[:60])]) == []
  assert diagnose([seen(500, np.arange(1, 151))]) == []


def test_masks_of_other_images_and_upside_down(clean):
  train, other = clean['ade20k']
  order = sorted(train.samples, key=lambda s: s['mask'].shape)
  flipped = train.masks(lambda m: np.ascontiguousarray(m[::-1]))
  (found,) = examine([flipped, other])
  assert found.rule.name == 'misaligned_masks'
  assert 'upside down' in found.finding.what
  # Shifted by one in the list; those of another size do not count.
  shifted = [
    a | {'mask': np.resize(b['mask'], a['mask'].shape)}
    for a, b in zip(order, order[1:] + order[:1], strict=True)
  ]
  (found,) = examine([Samples('train', train.labels, shifted), other])
  assert found.rule.name == 'misaligned_masks'


@pytest.mark.parametrize(
  'name',
  [
    *('unreadable', 'image_depth', 'mask_depth', 'size_mismatch'),
    *('colour_masks', 'grey_masks_in_colour', 'duplicates'),
  ],
)
def test_faulty_samples_are_drawn_and_marked(clean, name, tmp_path):
  pair = spoil(clean, name)
  surveys = [
    survey(s, for_training=s is pair[0], num_outputs=len(s.labels.classes))
    for s in pair
  ]
  pictures = []
  for found in ([], diagnose(surveys)):
    report.draw(tmp_path, pair, surveys, found)
    pictures.append(cv2.imread(str(tmp_path / 'doctor.png')))
  unmarked, marked = pictures
  # What cannot be read cannot be shown.
  assert np.array_equal(marked, unmarked) == (name == 'unreadable')


def test_one_of_something_is_singular(clean):
  train, other = clean['10']
  (found,) = examine([train.masks(dot, (4,)), other])
  assert found.finding.what.startswith('1 of 12 masks has values that no')
  alone = Samples('train', train.labels, [train.samples[4]])
  s = survey(alone, for_training=True, num_outputs=10)
  assert report.summary([s], []) == '1 of 1 sample of train: nothing wrong'
  one = Samples('train', counted(1), [train.samples[4]]).masks(
    lambda m: m * np.uint8(0)
  )
  (found,) = examine([one, one], num_outputs=7)
  assert 'mine has 1 class.' in found.finding.what
  (found,) = examine(both(without_sky)(clean['10']))
  assert '1 of 10 classes does not occur' in found.finding.what


def test_what_two_splits_share_is_described_once(clean):
  train, _ = clean['10']
  same = Samples('validation', train.labels, train.samples[:4])
  short = Samples('train', train.labels, train.samples[4:8])
  found = examine([s.masks(dot, (1,)) for s in (short, same)])
  assert [d.rule.name for d in found] == ['unknown_values'] * 2
  texts = report.paragraphs(found)
  whats = {d.finding.what for d in found}
  assert len(texts) == len(whats)
  # Also where the shares of pixels are the same.
  (text,) = report.paragraphs(
    [
      dataclasses.replace(
        d, finding=dataclasses.replace(d.finding, what='The same.')
      )
      for d in found
    ]
  )
  assert text.startswith('error: unknown_values (train and validation)\n')
  names = [s.samples[1]['name'] for s in (short, same)]
  assert f'Samples: {names[0]}, {names[1]}\n' in text


# ---- What is no fault -------------------------------------------------------


def test_few_samples_do_not_prove_absence(clean):
  """What is absent in some samples may be in the others."""
  train = clean['10'][0].masks(lambda m: m, None, counted(12))
  s = survey(train, range(11), for_training=True, num_outputs=12)
  assert not s.complete
  assert diagnose([s]) == []
  pair = first(without_sky)(clean['ade20k'])
  seen = survey(pair[0], range(23), for_training=True, num_outputs=150)
  rest = survey(pair[1], for_training=False, num_outputs=150)
  assert diagnose([seen, rest]) == []


def test_ignored_values_between_the_classes_are_known(clean):
  """Label ids without a class, and 255."""
  change = first(lambda m: np.where(m == 7, 29, m), which=(2,))
  assert examine(change(clean['cityscapes'])) == []
  change = first(lambda m: np.where(m == 7, 255, m), which=(2,))
  assert examine(change(clean['cityscapes'])) == []
  (found,) = examine(
    first(lambda m: np.where(m == 7, 34, m), which=(2,))(clean['cityscapes'])
  )
  assert found.rule.name == 'unknown_values'


def test_split_that_says_which_values_it_knows(clean):
  train, other = clean['cityscapes']
  train.known_values = np.isin(np.arange(256), [1, 3, *range(7, 34)])
  try:
    (found,) = examine([train, other])
  finally:
    del train.known_values
  assert found.rule.name == 'unknown_values'
  assert found.finding.samples == tuple(
    s['name'] for s in train.samples if (s['mask'] == 0).any()
  )
  assert 'that no class has: 0, on' in found.finding.what


def test_counts_of_a_survey(clean):
  train, _ = clean['cityscapes']
  s = survey(train, for_training=True, num_outputs=19)
  masks = [sample['mask'] for sample in train.samples]
  assert s.histogram == {
    int(v): sum((m == v).sum() for m in masks) for v in np.unique(masks)
  }
  pixels, images = s.class_counts
  for k, expected in enumerate((*range(19), 255)):
    assert pixels[k] == sum((IDS[m] == expected).sum() for m in masks)
    assert images[k] == sum((IDS[m] == expected).any() for m in masks)
