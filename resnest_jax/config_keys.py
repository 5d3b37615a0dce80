"""Configuration keys: accepted values, and which keys may change in a run.

configs/common.py has meanings and defaults, ConfigDict checks types, and
`config.validate` how values depend on each other.
"""

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

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
# Steps and counts on the devices are int32.
MOST = 2**31 - 1
MOST_PIXELS = 2**16  # Of an edge.
MOST_IMAGES = 2**16  # Of a batch.
MOST_CHANNELS = 2**16
# Numbers become float32, and their squares float64.
LARGEST = 1e30


class Accepted(NamedTuple):
  words: str
  holds: Callable[[Any], bool]
  names: Collection[str] = ()  # Candidates for "did you mean".

  def said_of(self, value: Any) -> str:
    near = difflib.get_close_matches(value, self.names, 1) if self.names else ()
    return self.words + (f' (did you mean {near[0]}?)' if near else '')


def at_least(minimum: int, why: str = '', most: int = MOST) -> Accepted:
  return Accepted(
    f'at least {minimum}{why} and at most {most}',
    lambda x: minimum <= x <= most,
  )


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
NOT_NEGATIVE = Accepted(
  f'at least 0 and at most {LARGEST}', lambda x: 0 <= x <= LARGEST
)
POSITIVE = Accepted(
  f'above 0 and at most {LARGEST}', lambda x: 0 < x <= LARGEST
)
SEED = at_least(0, most=2**63 - 1)
CHANNELS = at_least(1, most=MOST_CHANNELS)
BATCH = at_least(1, most=MOST_IMAGES)
WORKERS = at_least(0, most=4096)
SHARE = Accepted('from 0 to 1', lambda x: 0 <= x <= 1)
SHARE_BELOW_1 = Accepted('at least 0 and below 1', lambda x: 0 <= x < 1)
SHARE_ABOVE_0 = Accepted('above 0 and at most 1', lambda x: 0 < x <= 1)
BETWEEN_0_AND_1 = Accepted('above 0 and below 1', lambda x: 0 < x < 1)
STAGES = Accepted('from 0 to 5', lambda x: 0 <= x <= 5)
DEVICES = Accepted(
  'at least 1, or -1: all devices', lambda x: x >= 1 or x == -1
)
CLASSES = Accepted(
  f'at least 2, or 0: as many as the data has; at most {MOST_CHANNELS}',
  lambda x: 2 <= x <= MOST_CHANNELS or x == 0,
)
LONG_AND_SHORT = Accepted(
  f'two positive whole numbers of at most {MOST_PIXELS}: (long edge, short '
  'edge) in pixels',
  lambda x: whole_numbers(2).holds(x) and x[0] >= x[1],
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
WEIGHTS = Accepted(
  f'numbers of at least 0, not all 0, at most {LARGEST}',
  lambda x: any(x) and all(y == 0 or _are_positive((y,)) for y in x),
)


class Key(NamedTuple):
  """Facts about a key, or about all keys of a section.

  Attributes:
    accepted: values next to None; None: all of the key's type.
    free: may change when a run resumes, because neither the result nor the
      checkpoints depend on it.
    per_host: may differ between the hosts of a run.
  """

  accepted: Accepted | None = None
  free: bool = False
  per_host: bool = False


# Without accepted values: switches, and names checked where they are used.
KEYS = {
  'name': Key(),
  'seed': Key(SEED),
  'pretrained': Key(),
  'model.backbone': Key(),
  'model.stage_sizes': Key(whole_numbers(4, 1000)),
  'model.stem_width': Key(CHANNELS),
  'model.width': Key(CHANNELS),
  'model.radix': Key(CHANNELS),
  'model.groups': Key(CHANNELS),
  'model.base_width': Key(CHANNELS),
  'model.output_stride': Key(),
  'model.dilation_rule': Key(),
  'model.head': Key(),
  'model.head_channels': Key(CHANNELS),
  'model.aux_channels': Key(CHANNELS),
  'model.num_classes': Key(CLASSES),
  'model.dropout': Key(SHARE_BELOW_1),
  'model.frozen_bn': Key(),
  'model.biased_variance': Key(),
  'model.dropblock': Key(SHARE_BELOW_1),
  'model.dtype': Key(),
  'data.name': Key(),
  'data.data_dir': Key(FOLDER, free=True, per_host=True),
  'data.folder.classes': Key(),
  'data.folder.images': Key(),
  'data.folder.masks': Key(),
  'data.folder.image_suffix': Key(),
  'data.folder.mask_suffix': Key(),
  'data.folder.image_prefix': Key(),
  'data.folder.mask_prefix': Key(),
  'data.folder.lists': Key(),
  'data.folder.eval_fraction': Key(BETWEEN_0_AND_1),
  'data.folder.split_seed': Key(SEED),
  'data.train_split': Key(),
  'data.eval_split': Key(free=True),
  'data.sampling': Key(one_of(SAMPLINGS)),
  'data.repeat_threshold': Key(SHARE),
  'data.augmentation': Key(one_of(('mmseg', 'encoding', 'imagenet'))),
  'data.image_scale': Key(LONG_AND_SHORT),
  'data.scale_range': Key(RANGE),
  'data.crop_size': Key(whole_numbers(2)),
  'data.cat_max_ratio': Key(SHARE_ABOVE_0),
  'data.flip_probability': Key(SHARE),
  'data.photometric': Key(),
  'data.policy': Key(one_of(('autoaugment', 'randaugment', 'none'))),
  'data.random_crop': Key(one_of(('resized', 'encoding'))),
  'data.interpolation': Key(one_of(('bilinear', 'bicubic'))),
  'data.color_jitter': Key(SHARE),
  'data.lighting': Key(SHARE),
  'data.center_crop': Key(one_of(CENTER_CROPS), free=True),
  'data.doctor_samples': Key(at_least(0), free=True),
  'data.skip_unreadable': Key(free=True),
  'data.max_pixels': Key(at_least(1, most=2**40), free=True),
  'data.num_workers': Key(WORKERS, free=True, per_host=True),
  'data.num_threads': Key(WORKERS, free=True, per_host=True),
  'data.prefetch': Key(at_least(1), free=True, per_host=True),
  'data.timeout': Key(
    Accepted('above 0 and at most 10,000,000', lambda x: 0 < x <= 10**7),
    free=True,
  ),
  'loss.terms.cross_entropy': Key(NOT_NEGATIVE),
  'loss.terms.ohem': Key(NOT_NEGATIVE),
  'loss.terms.focal': Key(NOT_NEGATIVE),
  'loss.terms.dice': Key(NOT_NEGATIVE),
  'loss.terms.lovasz': Key(NOT_NEGATIVE),
  'loss.aux_weight': Key(NOT_NEGATIVE),
  'loss.avg_non_ignore': Key(),
  'loss.class_weights': Key(WEIGHTS),
  'loss.label_smoothing': Key(SHARE_BELOW_1),
  'loss.mixup': Key(NOT_NEGATIVE),
  'loss.ohem_threshold': Key(SHARE),
  'loss.ohem_min_kept': Key(at_least(1)),
  'loss.focal_gamma': Key(NOT_NEGATIVE),
  'loss.focal_alpha': Key(SHARE),
  'loss.focal_activation': Key(one_of(('sigmoid', 'softmax'))),
  'loss.lovasz_per_image': Key(),
  'optimizer.name': Key(one_of(('sgd', 'adamw'))),
  'optimizer.learning_rate': Key(POSITIVE),
  'optimizer.min_learning_rate': Key(NOT_NEGATIVE),
  'optimizer.schedule': Key(one_of(('poly', 'cosine'))),
  'optimizer.power': Key(POSITIVE),
  'optimizer.warmup_steps': Key(at_least(0)),
  'optimizer.warmup_ratio': Key(SHARE),
  'optimizer.momentum': Key(SHARE_BELOW_1),
  'optimizer.nesterov': Key(),
  'optimizer.first_count': Key(at_least(0, most=1)),
  'optimizer.beta1': Key(SHARE_BELOW_1),
  'optimizer.beta2': Key(SHARE_BELOW_1),
  'optimizer.epsilon': Key(POSITIVE),
  'optimizer.weight_decay': Key(NOT_NEGATIVE),
  'optimizer.decay_norm_bias': Key(),
  'optimizer.layer_decay': Key(SHARE_ABOVE_0),
  'optimizer.head_multiplier': Key(POSITIVE),
  'optimizer.clip_norm': Key(POSITIVE),
  'mesh': Key(free=True),
  'mesh.data': Key(DEVICES),
  'mesh.spatial': Key(at_least(1)),
  'train.total_steps': Key(at_least(1)),
  # Split attention has 1x1 maps, and a single value has no variance.
  'train.batch_size': Key(at_least(2, ' (batch normalisation)', MOST_IMAGES)),
  'train.log_steps': Key(at_least(1), free=True),
  'train.eval_steps': Key(at_least(1), free=True),
  'train.checkpoint_steps': Key(at_least(1), free=True),
  'train.keep_checkpoints': Key(at_least(1), free=True),
  'train.pictures': Key(at_least(0), free=True),
  'train.wandb': Key(free=True),
  'train.micro_batch_size': Key(at_least(0)),
  'train.norm_group': Key(at_least(0)),
  # Recomputation changes a result by rounding at most.
  'train.remat': Key(free=True),
  'train.freeze': Key(STAGES),
  'train.freeze_norms': Key(),
  'train.ema_decay': Key(SHARE_BELOW_1),
  'eval': Key(free=True),
  'eval.batch_size': Key(BATCH),
  'eval.bucket': Key(at_least(1, most=MOST_PIXELS)),
  'eval.overlays': Key(at_least(0)),
  'eval.report_images': Key(at_least(0)),
  'eval.boundary_iou': Key(),
  'eval.fscore_beta': Key(POSITIVE),
  'eval.protocol': Key(one_of(PROTOCOLS)),
  'eval.slide_crop': Key(whole_numbers(2)),
  'eval.slide_stride': Key(whole_numbers(2)),
  'eval.scales': Key(SCALES),
  'eval.flip': Key(),
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
