"""The part of the input pipeline that runs on the accelerator.

Photometric distortion, normalisation, and zeros where an image is padded. The
distortion is mmsegmentation's `PhotoMetricDistortion`, except that hue and
saturation are not rounded (less than one grey level on average).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resnest_jax.bands import has_colours, network_order
from resnest_jax.models.layers import true_pixels

# Of ImageNet, in grey levels, as in the published weights and mmsegmentation.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class Normalization(NamedTuple):
  """How grey levels become a network's input: minus mean, over std.

  `order` is that of the network's channels and of both tuples. With `bands`
  images are not 8-bit RGB but have these, of type `dtype`; both tuples are in
  their order, the network's channels in that of `network_order`.
  """

  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD
  order: str = 'RGB'  # or 'BGR'
  bands: tuple[str, ...] = ()
  dtype: str = 'uint8'  # or 'uint16', 'float32'; '' before it is measured

  @classmethod
  def of(cls, described: Mapping[str, Any]) -> 'Normalization':
    """The inverse of `described`."""
    given = ((k, described[k]) for k in cls._fields if k in described)
    return cls(**{k: tuple(x) if type(x) is list else x for k, x in given})

  def described(self) -> dict[str, Any]:
    """For JSON; of RGB without the keys of bands."""
    keys = ('order', 'mean', 'std', *('bands', 'dtype') * bool(self.bands))
    values = ((key, getattr(self, key)) for key in keys)
    return {k: [*x] if type(x) is tuple else x for k, x in values}


IMAGENET = Normalization()


def _scale_and_shift(x, factor=1.0, shift=0.0):
  # Rounds as OpenCV's 8-bit steps: down here, to nearest after the HSV part.
  return jnp.floor(jnp.clip(x * factor + shift, 0, 255))


def _scale_saturation_shift_hue(x, saturation, hue):
  # Element-wise and without a conversion to HSV: it fuses into a few loops.
  # With V the largest and m the smallest channel, S is (V - m) / V. Scaling it
  # keeps V and the hue and scales V - m, which S <= 1 bounds by V. A channel is
  # then V - (V - m) * t where t, in [0, 1], is a function of the hue only.
  r, g, b = x[..., 0:1], x[..., 1:2], x[..., 2:3]
  high = jnp.maximum(jnp.maximum(r, g), b)
  chroma = high - jnp.minimum(jnp.minimum(r, g), b)
  divisor = jnp.where(chroma > 0, chroma, 1)
  # Hue in sixths of the circle; of grey pixels it is multiplied by chroma 0.
  sixths = jnp.where(
    high == r,
    (g - b) / divisor,
    jnp.where(high == g, (b - r) / divisor + 2, (r - g) / divisor + 4),
  )
  sixths = sixths + hue / 30  # 60 degrees are 30 units of OpenCV.
  chroma = jnp.minimum(chroma * saturation, high)

  def channel(offset):
    k = offset + sixths
    k = k - 6 * jnp.floor(k / 6)  # k mod 6; jnp.mod is far slower on the CPU.
    return high - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

  # The offsets place red, green and blue on the hue circle.
  return jnp.round(jnp.concatenate([channel(5), channel(3), channel(1)], -1))


def photometric_distortion(
  images: jax.Array, parameters: jax.Array
) -> jax.Array:
  """Distorts float (B, H, W, 3) RGB of whole numbers 0..255, as is the result.

  `parameters` are (B, 5): brightness shift in grey levels; contrast factor
  applied first; saturation factor; hue shift in OpenCV's units of 2 degrees;
  contrast factor applied last. 0, 1, 1, 0, 1 is the identity.
  """
  parameters = parameters.astype(images.dtype).reshape(-1, 5, 1, 1, 1)
  brightness, contrast_first, saturation, hue, contrast_last = (
    parameters[:, i] for i in range(5)
  )
  x = _scale_and_shift(images, shift=brightness)
  x = _scale_and_shift(x, factor=contrast_first)
  x = _scale_saturation_shift_hue(x, saturation, hue)
  return _scale_and_shift(x, factor=contrast_last)


def resize(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Resizes uint8 (B, H, W, C) as OpenCV does, bit for bit: (B, H', W', C).

  Other types become float32 by the same weights, without its rounding. `rows`,
  int32 (B, H', 4), and `columns` are from `resize.bilinear_taps`; 0 gives 0,
  for padding.
  """
  return jax.vmap(resize_one)(images, rows, columns)


def resize_one(image: Any, rows: Any, columns: Any) -> Any:
  """`resize` of an image (H, W, C); arrays may be NumPy's."""
  # Fixed point, as in OpenCV: weights have 11 fractional bits, so columns leave
  # 11, of which 4 are dropped; rows make that 18, and both products are
  # truncated to 2 bits each before they are added and rounded.
  fixed = image.dtype == np.uint8
  low, high, low_weight, high_weight = columns.T[..., None]
  image = image.astype(np.int32 if fixed else np.float32)
  wide = image[:, low[:, 0]] * low_weight + image[:, high[:, 0]] * high_weight
  wide = wide >> 4 if fixed else wide / 2**22  # (H, W', C)
  low, high, low_weight, high_weight = rows.T[..., None, None]
  upper = wide[low[:, 0, 0]] * low_weight
  lower = wide[high[:, 0, 0]] * high_weight
  if not fixed:
    return upper + lower
  return (((upper >> 16) + (lower >> 16) + 2) >> 2).astype(np.uint8)


def preprocess(
  images: jax.Array,
  size: jax.Array,
  photometric: jax.Array | None = None,
  dtype: jnp.dtype = jnp.float32,
  normalization: Normalization = IMAGENET,
  shift: jax.Array | None = None,
) -> jax.Array:
  """Normalises a batch; it becomes 0 outside `size`.

  Args:
    images: uint8 (B, H, W, 3) RGB, or as `normalization` has bands.
    size: int (B, 2), height and width before padding.
    photometric: (B, 5), see `photometric_distortion`; None: not distorted. Of
      bands only red, green and blue are.
    dtype: of the result; computed in float32 unless it is float64.
    shift: (B, 3), added to all pixels in the unit of 0..1; None: nothing.
  """
  compute = jnp.float64 if dtype == jnp.float64 else jnp.float32
  x = images.astype(compute)
  mean, std = (jnp.array(part, compute) for part in normalization[:2])
  if bands := normalization.bands:
    order = np.array(network_order(bands))
    x, mean, std = (part[..., order] for part in (x, mean, std))
    if photometric is not None and has_colours(bands):
      x = _distort_colours(x, photometric, mean[:3], std[:3])
  elif photometric is not None:
    x = photometric_distortion(x, photometric)
  if shift is not None:
    x = x + 255 * shift.astype(compute)[:, None, None]
  if normalization.order == 'BGR':
    x = x[..., ::-1]
  inside = true_pixels(size, images.shape[1:3])
  return jnp.where(inside, (x - mean) / std, 0).astype(dtype)


def _distort_colours(
  x: jax.Array, photometric: jax.Array, mean: jax.Array, std: jax.Array
) -> jax.Array:
  """Distorts the first three bands, whatever their depth."""
  # As grey levels of a picture of ImageNet's mean and deviation, which those of
  # 8 bits are. The change is added, so that no digit of others is lost.
  scale = std / jnp.array(STD, std.dtype)
  colours, others = x[..., :3], x[..., 3:]
  grey = jnp.round((colours - mean) / scale + jnp.array(MEAN, mean.dtype))
  grey = jnp.clip(grey, 0, 255)
  change = photometric_distortion(grey, photometric) - grey
  return jnp.concatenate([colours + change * scale, others], -1)
