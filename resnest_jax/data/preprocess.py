"""The part of the input pipeline that runs on the accelerator.

Takes the uint8 batches of `resnest_jax.data.pipeline`: photometric distortion,
normalisation, and zeros where a picture is padded. Everything is element-wise
with per-image parameters (no branches, no gathers), so under jit it fuses into
a few loops and a batch sharded over devices stays where it is.

The distortion follows mmsegmentation's `PhotoMetricDistortion` as it runs in
8-bit OpenCV, and so does the rounding: down after brightness and contrast, to
nearest after the HSV part. What it does not follow is OpenCV's rounding of
hue to 2 degrees and of saturation to 1/255, nor a second trip through 8-bit
HSV: that loses colours for no benefit. The difference is below one grey level
on average.
"""

import jax
import jax.numpy as jnp

# ImageNet statistics of RGB channels in grey levels, as the published weights
# and mmsegmentation's configs have them.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def _scale_and_shift(x, factor=1.0, shift=0.0):
  return jnp.floor(jnp.clip(x * factor + shift, 0, 255))


def _scale_saturation_shift_hue(x, saturation, hue):
  """HSV arithmetic without leaving RGB but for the hue, on (B, H, W, 3).

  With V the largest and m the smallest channel, S is (V - m) / V. Scaling it
  keeps V and the hue and scales V - m, which S <= 1 bounds by V. A channel is
  then V - (V - m) * t where t, in [0, 1], is a function of the hue only.
  """
  r, g, b = x[..., 0:1], x[..., 1:2], x[..., 2:3]
  high = jnp.maximum(jnp.maximum(r, g), b)
  chroma = high - jnp.minimum(jnp.minimum(r, g), b)
  divisor = jnp.where(chroma > 0, chroma, 1)
  # In sixths of the circle; grey pixels have chroma 0, so theirs is not seen.
  sixths = jnp.where(
    high == r,
    (g - b) / divisor,
    jnp.where(high == g, (b - r) / divisor + 2, (r - g) / divisor + 4),
  )
  sixths = sixths + hue / 30
  chroma = jnp.minimum(chroma * saturation, high)

  def channel(offset):
    k = offset + sixths
    k = k - 6 * jnp.floor(k / 6)  # On the CPU far faster than jnp.mod.
    return high - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

  # Red, green, blue.
  return jnp.round(jnp.concatenate([channel(5), channel(3), channel(1)], -1))


def photometric_distortion(
  images: jax.Array, parameters: jax.Array
) -> jax.Array:
  """Distorts brightness, contrast, saturation and hue.

  Args:
    images: float (B, H, W, 3) RGB with the whole numbers 0..255.
    parameters: (B, 5): brightness shift in grey levels; contrast factor applied
      first; saturation factor; hue shift in OpenCV's units of 2 degrees;
      contrast factor applied last. 0, 1, 1, 0, 1 returns the image unchanged.

  Returns:
    Like `images`, whole numbers again.
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
  """Resizes a batch in OpenCV's 8-bit arithmetic, equal bit for bit.

  Args:
    images: uint8 (B, H, W, 3).
    rows: int32 (B, H', 4), of `resize.bilinear_taps`; where all four are 0 the
      result is 0.
    columns: int32 (B, W', 4), likewise.

  Returns:
    uint8 (B, H', W', 3).
  """

  def resize_one(image, rows, columns):
    low, high, low_weight, high_weight = columns.T[..., None]
    image = image.astype(jnp.int32)
    wide = image[:, low[:, 0]] * low_weight + image[:, high[:, 0]] * high_weight
    wide = wide >> 4
    low, high, low_weight, high_weight = rows.T[..., None, None]
    upper = (wide[low[:, 0, 0]] * low_weight) >> 16
    lower = (wide[high[:, 0, 0]] * high_weight) >> 16
    return ((upper + lower + 2) >> 2).astype(jnp.uint8)

  return jax.vmap(resize_one)(images, rows, columns)


def valid_mask(size: jax.Array, height: int, width: int) -> jax.Array:
  """Returns bool (B, height, width, 1), true within `size` (B, 2)."""
  rows = jnp.arange(height).reshape(1, height, 1, 1)
  columns = jnp.arange(width).reshape(1, 1, width, 1)
  size = size.reshape(-1, 2, 1, 1, 1)
  return (rows < size[:, 0]) & (columns < size[:, 1])


def preprocess(
  images: jax.Array,
  size: jax.Array,
  photometric: jax.Array | None = None,
  dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
  """Turns a uint8 batch into what the network takes.

  Args:
    images: uint8 (B, H, W, 3) RGB.
    size: int (B, 2), height and width of the part that is picture.
    photometric: (B, 5) parameters of `photometric_distortion`, or None.
    dtype: of the result. Computed in float64 for float64, in float32 otherwise.

  Returns:
    (B, H, W, 3), normalised by `MEAN` and `STD`, 0 outside `size`.
  """
  compute = jnp.float64 if dtype == jnp.float64 else jnp.float32
  x = images.astype(compute)
  if photometric is not None:
    x = photometric_distortion(x, photometric)
  mean = jnp.array(MEAN, compute).reshape(1, 1, 1, 3)
  std = jnp.array(STD, compute).reshape(1, 1, 1, 3)
  mask = valid_mask(size, images.shape[1], images.shape[2])
  return jnp.where(mask, (x - mean) / std, 0).astype(dtype)
