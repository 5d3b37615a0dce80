"""AutoAugment and RandAugment as ResNeSt's authors trained with them.

Operations on whole 8-bit RGB pictures, bit for bit as in the authors' own code
(zhanghang1989/ResNeSt, `transforms.py` and `autoaug.py`): SolarizeAdd inverts
all bright pixels, and RandAugment leaves out half of what it draws.

Cubuk et al., AutoAugment, CVPR 2019; RandAugment, NeurIPS 2020.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

# Uniform numbers that a policy takes, in [0, 1): one for the choice of a
# sub-policy, then for each of two operations its name, a threshold, whether it
# is applied, and two of its own.
UNITS = 1 + 2 * 5
_CUTOUT = (125, 123, 114)  # The mean colour of ImageNet.


def _affine(picture: Image.Image, *coefficients: float) -> Image.Image:
  kind, cubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
  return picture.transform(picture.size, kind, coefficients, cubic)


def _solarize_add(picture: Image.Image, value: float) -> Image.Image:
  pixels = np.clip(np.asarray(picture) + np.float64(value), 0, 255)
  return ImageOps.solarize(Image.fromarray(pixels.astype(np.uint8)), 128)


def _cutout(picture: Image.Image, side: float, x: float, y: float):
  size = np.array(picture.size)
  start = np.maximum(0, np.multiply((x, y), size) - side / 2).astype(int)
  end = np.minimum(size, start + side)
  picture = picture.copy()
  ImageDraw.Draw(picture).rectangle((*start, *end), _CUTOUT)
  return picture


# With a picture, a value, and what is drawn for it.
_OPERATIONS: dict[str, Callable[..., Image.Image]] = {
  'AutoContrast': lambda x, v: ImageOps.autocontrast(x),
  'Equalize': lambda x, v: ImageOps.equalize(x),
  'Invert': lambda x, v: ImageOps.invert(x),
  'Rotate': lambda x, v: x.rotate(v),
  'Posterize': lambda x, v: ImageOps.posterize(x, int(v)),
  'Solarize': lambda x, v: ImageOps.solarize(x, v),
  'SolarizeAdd': _solarize_add,
  'Color': lambda x, v: ImageEnhance.Color(x).enhance(v),
  'Contrast': lambda x, v: ImageEnhance.Contrast(x).enhance(v),
  'Brightness': lambda x, v: ImageEnhance.Brightness(x).enhance(v),
  'Sharpness': lambda x, v: ImageEnhance.Sharpness(x).enhance(v),
  'ShearX': lambda x, v: _affine(x, 1, v, 0, 0, 1, 0),
  'ShearY': lambda x, v: _affine(x, 1, 0, 0, v, 1, 0),
  'Cutout': _cutout,
  'TranslateX': lambda x, v: _affine(x, 1, 0, v, 0, 1, 0),
  'TranslateY': lambda x, v: _affine(x, 1, 0, 0, 0, 1, v),
}
# Half of the time in the other direction.
_SIGNED = {'Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY'}


def operate(
  picture: Image.Image, name: str, value: float, own: np.ndarray
) -> Image.Image:
  """Applies an operation; `own` are two uniform numbers, for sign or place."""
  if name in _SIGNED:
    return _OPERATIONS[name](picture, -value if own[0] > 0.5 else value)
  return _OPERATIONS[name](picture, value, *(own if name == 'Cutout' else ()))


# (name, probability, value): degrees, least inverted value, bits that are kept,
# factor or share.
_EQUALIZE = ('Equalize', 0.6, 0)
AUTO_AUGMENT = (
  (('Posterize', 0.4, 1), ('Rotate', 0.6, 27)),
  (('Solarize', 0.6, 128), ('AutoContrast', 0.6, 0)),
  (('Equalize', 0.8, 0), _EQUALIZE),
  (('Posterize', 0.6, 2), ('Posterize', 0.6, 2)),
  (('Equalize', 0.4, 0), ('Solarize', 0.2, 154)),
  (('Equalize', 0.4, 0), ('Rotate', 0.8, 24)),
  (('Solarize', 0.6, 180), _EQUALIZE),
  (('Posterize', 0.8, 2), ('Equalize', 1.0, 0)),
  (('Rotate', 0.2, 9), ('Solarize', 0.6, 52)),
  (_EQUALIZE, ('Posterize', 0.4, 2)),
  (('Rotate', 0.8, 24), ('Color', 0.4, 0.1)),
  (('Rotate', 0.4, 27), _EQUALIZE),
  (('Equalize', 0.0, 0), ('Equalize', 0.8, 0)),
  (('Invert', 0.6, 0), ('Equalize', 1.0, 0)),
  (('Color', 0.6, 0.82), ('Contrast', 1.0, 1.54)),
  (('Rotate', 0.8, 24), ('Color', 1.0, 0.1)),
  (('Color', 0.8, 1.54), ('Solarize', 0.8, 77)),
  (('Sharpness', 0.4, 1.36), ('Invert', 0.6, 0)),
  (('ShearX', 0.6, 0.15), ('Equalize', 1.0, 0)),
  (('Color', 0.4, 0.1), _EQUALIZE),
)
AUTO_AUGMENT += tuple(AUTO_AUGMENT[i] for i in (4, 1, 13, 14, 2))  # Again.

# From the smallest to the largest value, which has the magnitude 30.
RANGES = {
  **dict.fromkeys(('AutoContrast', 'Equalize', 'Invert'), (0, 1)),
  **{'Rotate': (0, 30), 'Posterize': (0, 4), 'Solarize': (0, 256)},
  **{'SolarizeAdd': (0, 110), 'Color': (0.1, 1.9), 'Contrast': (0.1, 1.9)},
  **{'Brightness': (0.1, 1.9), 'Sharpness': (0.1, 1.9), 'ShearX': (0, 0.3)},
  **{'ShearY': (0, 0.3), 'Cutout': (0, 40), 'TranslateX': (0, 100)},
  'TranslateY': (0, 100),
}
MAGNITUDE = 12


def auto_augment(picture: Image.Image, units: np.ndarray) -> Image.Image:
  """Applies one of the 25 sub-policies of ImageNet; `units` (11,)."""
  chosen = AUTO_AUGMENT[int(units[0] * len(AUTO_AUGMENT))]
  of_each = units[1:].reshape(2, 5)
  for (name, probability, value), unit in zip(chosen, of_each, strict=True):
    if unit[2] <= probability:
      picture = operate(picture, name, value, unit[3:])
  return picture


def rand_augment(picture: Image.Image, units: np.ndarray) -> Image.Image:
  """Applies up to two of the 16 operations; `units` (11,)."""
  for unit in units[1:].reshape(2, 5):
    name = list(RANGES)[int(unit[0] * len(RANGES))]
    low, high = RANGES[name]
    if unit[2] <= 0.2 + 0.6 * unit[1]:
      value = MAGNITUDE / 30 * (high - low) + low
      picture = operate(picture, name, value, unit[3:])
  return picture


POLICIES: dict[str, Callable[[Image.Image, np.ndarray], Image.Image]] = {
  'autoaugment': auto_augment,
  'randaugment': rand_augment,
  'none': lambda picture, units: picture,
}
