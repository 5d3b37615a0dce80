"""Checks what weights say of themselves, before anything is built of it."""

from collections.abc import Mapping
from typing import Any

from resnest_jax import bands
from resnest_jax.config_keys import (
  BANDS,
  CENTER_CROPS,
  LONG_AND_SHORT,
  SHARE_BELOW_1,
  TEMPERATURE,
  Accepted,
  one_of,
)
from resnest_jax.errors import UserError
from resnest_jax.models import segmentor
from resnest_jax.models.resnest import BACKBONES, DILATION_RULES
from resnest_jax.text import listed
from resnest_jax.untrusted import (
  OBJECT,
  check_fields,
  list_of,
  numbers,
  or_none,
  up_to,
)

TASKS = ('segmentor', 'classifier', 'backbone')
MOST_PIXELS = 2**26  # Of an image scale: 8192 x 8192.

_MODEL = {
  'backbone': one_of(BACKBONES),
  'output_stride': Accepted(
    f'one of {listed(segmentor.OUTPUT_STRIDES)}',
    lambda x: type(x) is int and x in segmentor.OUTPUT_STRIDES,
  ),
  'dilation_rule': one_of(DILATION_RULES),
  'dtype': one_of(segmentor.DTYPES),
}
_OF_TASK = {
  'segmentor': {
    'head': one_of(segmentor.HEADS),
    'head_channels': up_to(2**14),
    'aux_channels': or_none(up_to(2**14)),
    'num_classes': up_to(2**16, 2),
    'dropout': SHARE_BELOW_1,
  },
  'classifier': {'num_classes': up_to(2**20), 'dropout': SHARE_BELOW_1},
  'backbone': {},
}
# Keys that vary the backbone; they may be missing.
_VARIED = {
  'stage_sizes': numbers(
    '4 whole numbers from 1 to 256', 4, int, low=1, high=256
  ),
  **dict.fromkeys(('stem_width', 'width', 'base_width'), up_to(2**12)),
  **dict.fromkeys(('radix', 'groups'), up_to(2**8)),
  **dict.fromkeys(
    ('avd_first', 'biased_variance'),
    Accepted('true or false', lambda x: type(x) is bool),
  ),
  'frozen_bn': one_of(segmentor.FROZEN_BN),
  'in_channels': up_to(bands.MOST),
}
_COLOUR = numbers('a colour', 3, int, low=0, high=255)
CLASSES = list_of('a list of names', lambda x: type(x) is str and len(x) < 1000)
PALETTE = list_of(
  'a list of colours, three whole numbers from 0 to 255', _COLOUR.holds
)
_ABOUT = {
  'task': one_of(TASKS),
  'model': OBJECT,
  'classes': or_none(CLASSES),
  'palette': or_none(PALETTE),
  'normalization': OBJECT,
  'provenance': OBJECT,
}
_ORDER = {'order': one_of(('RGB', 'BGR'))}
_BANDS = {'bands': BANDS, 'dtype': one_of(('uint8', 'uint16', 'float32'))}
_EDGES = numbers('', 2, int, low=1, high=2**15)
# Older descriptions lack them.
_SIZES = {
  'image_scale': or_none(
    Accepted(
      f'{LONG_AND_SHORT.words}, with at most {MOST_PIXELS} pixels',
      lambda x: _EDGES.holds(x) and x[1] <= x[0] <= MOST_PIXELS / x[1],
    )
  ),
  'crop_size': or_none(
    numbers('two whole numbers from 1 to 8192', 2, int, low=1, high=8192)
  ),
  'center_crop': or_none(one_of(CENTER_CROPS)),
  'temperature': TEMPERATURE,
}


def check_description(about: Mapping[str, Any], where: str) -> None:
  """Checks `Weights.about`, or that of a file: types, lengths and ranges.

  Raises a `UserError` that begins with `where` and says what is accepted.
  """
  check_fields(about, _ABOUT, where)
  check_network(about['model'], about['task'], f'{where}, model,')
  _check_normalization(about, f'{where}, normalization,')
  check_fields(about, {k: v for k, v in _SIZES.items() if k in about}, where)
  known = about['provenance'].get('backbone_known', True)
  if type(known) is not bool:
    raise UserError(f'{where} is damaged: backbone_known is no yes or no.')


def _check_normalization(about: Mapping[str, Any], where: str) -> None:
  given, channels = about['normalization'], about['model'].get('in_channels')
  check_fields(given, _ORDER | (_BANDS if 'bands' in given else {}), where)
  names = given.get('bands', ())
  number, most = len(names) or 3, 1e30 if names else 1e6
  said, kinds = f'{number} numbers', (number, int, float)
  mean = numbers(said, *kinds, low=-most, high=most)
  std = numbers(f'{said} above 0', *kinds, low=1 / most, high=most)
  check_fields(given, {'mean': mean, 'std': std}, where)
  if number != (channels or 3):
    raise UserError(f'{where} is of {number} bands, the network of {channels}.')


def check_network(model: Mapping[str, Any], task: str, where: str) -> None:
  """As `check_description`, of the keys of `config.model` alone."""
  fields = _MODEL | _OF_TASK[task]
  fields |= {k: or_none(v) for k, v in _VARIED.items() if k in model}
  check_fields(model, fields, where)
