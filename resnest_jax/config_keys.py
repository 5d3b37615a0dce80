"""Configuration keys: accepted values, and which keys may change in a run.

configs/common.py has meanings and defaults, ConfigDict checks types, and
`config.validate` how values depend on each other.
"""

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from resnest_jax import bands

# Protocol -> the parameters it depends on, in the order of results.
PROTOCOLS = {
  'whole': ('image_scale',),
  'slide': ('image_scale', 'crop', 'stride'),
  'ms_flip_0x': ('image_scale', 'scales', 'flip'),
  'ms_flip_1x': ('scales', 'flip'),
  'encoding': ('image_scale', 'crop', 'stride', 'scales', 'flip'),
}
# `config.model.head` of a network that gives each image one class.
CLASSIFIER = 'classifier'
# By which evaluations are compared: of segmentors, of classifiers.
MAIN_SCORES = ('mIoU', 'top1')
CENTER_CROPS = ('encoding', 'gluon')
SAMPLINGS = ('uniform', 'repeat_factor', 'class_balanced')
WEIGHINGS = ('inverse_sqrt', 'median_frequency')
# Steps and counts on the devices are int32.
MOST = 2**31 - 1
MOST_PIXELS = MOST_IMAGES = MOST_CHANNELS = 2**16  # Of an edge, a batch.
# Numbers become float32, and their squares float64.
LARGEST = 1e30


class Accepted(NamedTuple):
  words: str
  holds: Callable[[Any], bool]
  names: Collection[str] = ()  # Candidates for "did you mean".

  def said_of(self, value: Any) -> str:
    near = difflib.get_close_matches(str(value), self.names, 1)
    return self.words + (f' (did you mean {near[0]}?)' if near else '')


def at_least(minimum: int, why: str = '', most: float = MOST) -> Accepted:
  words = f'at least {minimum}{why} and at most {most}'
  return Accepted(words, lambda x: minimum <= x <= most)


def one_of(names: Collection[str]) -> Accepted:
  return Accepted(f'one of {", ".join(names)}', lambda x: x in names, names)


def _are_positive(
  values: tuple, kinds: tuple = (int, float), most: float = LARGEST
) -> bool:
  # `type` instead of isinstance: bool is a subclass of int.
  return all(type(x) in kinds and 0 < x <= most for x in values)


def whole_numbers(length: int, most: int = MOST_PIXELS) -> Accepted:
  return Accepted(
    f'{length} positive whole numbers of at most {most}',
    lambda x: len(x) == length and _are_positive(x, (int,), most),
  )


# NaN fails each of these comparisons.
NOT_NEGATIVE = at_least(0, most=LARGEST)
POSITIVE = Accepted(
  f'above 0 and at most {LARGEST}', lambda x: 0 < x <= LARGEST
)
SEED = at_least(0, most=2**63 - 1)
COUNT, COUNT_OR_0 = at_least(1), at_least(0)
CHANNELS = at_least(1, most=MOST_CHANNELS)
SHARE = Accepted('from 0 to 1', lambda x: 0 <= x <= 1)
SHARE_BELOW_1 = Accepted('at least 0 and below 1', lambda x: 0 <= x < 1)
SHARE_ABOVE_0 = Accepted('above 0 and at most 1', lambda x: 0 < x <= 1)
BETWEEN_0_AND_1 = Accepted('above 0 and below 1', lambda x: 0 < x < 1)
SECONDS = Accepted('above 0 and at most 10,000,000', lambda x: 0 < x <= 10**7)
# Beyond it all probabilities would be 0 or 1, or alike.
TEMPERATURE = Accepted('from 0.01 to 100', lambda x: 0.01 <= x <= 100)
DEVICES = Accepted(
  'at least 1, or -1: all devices', lambda x: x >= 1 or x == -1
)
CLASSES = Accepted(
  f'at least 2, or 0: as many as the data has; at most {MOST_CHANNELS}',
  lambda x: 2 <= x <= MOST_CHANNELS or x == 0,
)
SIZE = whole_numbers(2)
LONG_AND_SHORT = Accepted(
  f'two positive whole numbers of at most {MOST_PIXELS}: (long edge, short '
  'edge) in pixels',
  lambda x: SIZE.holds(x) and x[0] >= x[1],
)
RANGE = Accepted(
  'two positive numbers of at most 100, the smaller first',
  lambda x: _are_positive(x, most=100) and len(x) == 2 and x[0] <= x[1],
)
FOLDER = Accepted("a folder, '.' for this one", bool)
SCALES = Accepted(
  'one or more positive numbers of at most 100',
  lambda x: bool(x) and _are_positive(x, most=100),
)
BANDS = Accepted(
  f'up to {bands.MOST} names, each once, as red,green,blue,nir; none: RGB',
  lambda x: (
    type(x) in (list, tuple)
    and all(type(y) is str and 0 < len(y) < 100 and y == y.strip() for y in x)
    and len({*x}) == len(x) <= bands.MOST
  ),
)
WEIGHTS = Accepted(
  f'numbers of at least 0, not all 0, at most {LARGEST}, or '
  f'{" or ".join(WEIGHINGS)}',
  lambda x: (
    x in WEIGHINGS or (any(x) and all(y == 0 or _are_positive((y,)) for y in x))
  ),
  WEIGHINGS,
)


class Key(NamedTuple):
  """Facts about a key, or about all keys of a section."""

  accepted: Accepted | None = None  # Next to None; None: all of its type.
  # May change when a run resumes: neither result nor checkpoints depend on it.
  free: bool = False
  per_host: bool = False  # May differ between the hosts of a run.


def _all(
  section: str, names: str, accepted: Accepted | None = None, **facts: bool
) -> dict[str, Key]:
  """Keys of a section that have the same facts; names are separated by spaces.

  Without accepted values: switches, and names checked where they are used.
  """
  key = Key(accepted, **facts)
  return {f'{section}.{name}': key for name in names.split()}


_HERE = {'free': True, 'per_host': True}
_PLACES = 'image_suffix mask_suffix image_prefix mask_prefix lists'
_WIDTHS = 'stem_width width radix groups base_width head_channels aux_channels'
_STEPS = 'log_steps eval_steps checkpoint_steps'
_NAMES = 'backbone output_stride dilation_rule head frozen_bn dtype'

KEYS = {
  'name': Key(),
  'seed': Key(SEED),
  'pretrained': Key(),
  **_all('model', f'{_NAMES} biased_variance'),
  **_all('model', 'stage_sizes', whole_numbers(4, 1000)),
  **_all('model', _WIDTHS, CHANNELS),
  **_all('model', 'num_classes', CLASSES),
  **_all('model', 'dropout dropblock', SHARE_BELOW_1),
  **_all('data', 'name train_split photometric'),
  **_all('data', 'data_dir', FOLDER, **_HERE),
  **_all('data.folder', f'classes images masks {_PLACES}'),
  **_all('data.folder', 'eval_fraction', BETWEEN_0_AND_1),
  **_all('data.folder', 'split_seed', SEED),
  **_all('data', 'eval_split skip_unreadable', free=True),
  **_all('data', 'bands', BANDS),
  **_all('model', 'in_channels', at_least(1, most=bands.MOST)),
  **_all('data', 'sampling', one_of(SAMPLINGS)),
  **_all('data', 'augmentation', one_of(('mmseg', 'encoding', 'imagenet'))),
  **_all('data', 'image_scale', LONG_AND_SHORT),
  **_all('data', 'scale_range', RANGE),
  **_all('data', 'crop_size', SIZE),
  **_all('data', 'cat_max_ratio', SHARE_ABOVE_0),
  **_all('data', 'repeat_threshold flip_probability color_jitter', SHARE),
  **_all('data', 'vertical_flip_probability lighting', SHARE),
  **_all('data', 'blur_probability erase_probability', SHARE),
  **_all('data', 'rotation', at_least(0, most=180)),
  **_all('data', 'quarter_turns transform'),
  **_all('data', 'policy', one_of(('autoaugment', 'randaugment', 'none'))),
  **_all('data', 'random_crop', one_of(('resized', 'encoding'))),
  **_all('data', 'interpolation', one_of(('bilinear', 'bicubic'))),
  **_all('data', 'center_crop', one_of(CENTER_CROPS), free=True),
  **_all('data', 'doctor_samples', COUNT_OR_0, free=True),
  **_all('data', 'max_pixels', at_least(1, most=2**40), free=True),
  **_all('data', 'num_workers num_threads', at_least(0, most=4096), **_HERE),
  **_all('data', 'prefetch', COUNT, **_HERE),
  **_all('data', 'timeout', SECONDS, free=True),
  **_all('loss.terms', 'cross_entropy ohem focal dice lovasz', NOT_NEGATIVE),
  **_all('loss', 'aux_weight mixup focal_gamma', NOT_NEGATIVE),
  **_all('loss', 'avg_non_ignore lovasz_per_image'),
  **_all('loss', 'class_weights', WEIGHTS),
  **_all('loss', 'label_smoothing', SHARE_BELOW_1),
  **_all('loss', 'ohem_threshold focal_alpha', SHARE),
  **_all('loss', 'ohem_min_kept', COUNT),
  **_all('loss', 'focal_activation', one_of(('sigmoid', 'softmax'))),
  **_all('optimizer', 'name', one_of(('sgd', 'adamw'))),
  **_all('optimizer', 'schedule', one_of(('poly', 'cosine'))),
  **_all('optimizer', 'min_learning_rate weight_decay', NOT_NEGATIVE),
  **_all('optimizer', 'warmup_steps', COUNT_OR_0),
  **_all('optimizer', 'warmup_ratio', SHARE),
  **_all('optimizer', 'momentum beta1 beta2', SHARE_BELOW_1),
  **_all('optimizer', 'nesterov decay_norm_bias'),
  **_all('optimizer', 'first_count', at_least(0, most=1)),
  **_all('optimizer', 'layer_decay', SHARE_ABOVE_0),
  **_all('optimizer', 'learning_rate power epsilon', POSITIVE),
  **_all('optimizer', 'head_multiplier clip_norm', POSITIVE),
  'mesh': Key(free=True),
  **_all('mesh', 'data', DEVICES),
  **_all('mesh', 'spatial', COUNT),
  **_all('train', 'total_steps total_epochs', COUNT),
  # Split attention has 1x1 maps, and a single value has no variance.
  **_all(
    'train', 'batch_size', at_least(2, ' (batch normalisation)', MOST_IMAGES)
  ),
  **_all('train', f'{_STEPS} keep_checkpoints', COUNT, free=True),
  **_all('train', 'pictures early_stop', COUNT_OR_0, free=True),
  **_all('train', 'micro_batch_size norm_group', COUNT_OR_0),
  # Recomputation changes a result by rounding at most.
  **_all('train', 'wandb remat', free=True),
  **_all('train', 'freeze', Accepted('from 0 to 5', lambda x: 0 <= x <= 5)),
  **_all('train', 'freeze_norms'),
  **_all('train', 'ema_decay', SHARE_BELOW_1),
  'eval': Key(free=True),
  **_all('eval', 'batch_size', at_least(1, most=MOST_IMAGES)),
  **_all('eval', 'bucket', at_least(1, most=MOST_PIXELS)),
  **_all('eval', 'overlays report_images', COUNT_OR_0),
  **_all('eval', 'boundary_iou flip'),
  **_all('eval', 'fscore_beta', POSITIVE),
  **_all('eval', 'protocol', one_of(PROTOCOLS)),
  **_all('eval', 'slide_crop slide_stride', SIZE),
  **_all('eval', 'scales', SCALES),
}
# A section stands for all of its keys, those of earlier versions included.
FREE_KEYS = tuple(name for name, key in KEYS.items() if key.free)
HOST_KEYS = tuple(name for name, key in KEYS.items() if key.per_host)


def classifies(config: Any) -> bool:
  """Whether a configuration is of a classifier, not of a segmentor."""
  return config['model']['head'] == CLASSIFIER


def main_score(config: Any) -> str:
  """The score of `MAIN_SCORES` by which a run's best checkpoint is chosen."""
  return MAIN_SCORES[classifies(config)]


def main_score_in(scores: Mapping[str, Any]) -> Any:
  """The main score among others, of whatever network; None: there is none."""
  return next((scores[x] for x in MAIN_SCORES if x in scores), None)
