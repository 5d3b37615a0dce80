"""Training augmentation: pure functions of an image, its label and a draw.

The transforms, their order, their rounding and their distributions are those
of mmsegmentation 1.2.2's ADE20K and Cityscapes training pipelines: keep-ratio
resize at a random ratio, random crop that avoids crops of a single class,
horizontal flip, photometric distortion, padding. Given the same draw the
result is equal to its result, bit for bit. What no crop shows is not computed:
the crop is chosen on the label alone, pixel by pixel, before anything else.

What deviates is where the random numbers come from: `draw_augmentation` makes
all of one sample's numbers before the sample is looked at, so that a sample's
augmentation depends on nothing but its random generator. The photometric
distortion is only drawn here; the accelerator applies it
(`resnest_jax.data.preprocess`).

Images are uint8 (H, W, 3) RGB, labels uint8 (H, W) of train ids with 255 for
ignored pixels. Sizes are (height, width) in pixels.
"""

import dataclasses

import cv2
import numpy as np

from resnest_jax.data.resize import (
  Window,
  resize_image_window,
  resize_label_window,
  resized_size,
)
from resnest_jax.errors import UserError
from resnest_jax.labels import IGNORE

# The first crop and ten more when the one before it is refused.
CROP_TRIES = 11


@dataclasses.dataclass(frozen=True)
class PhotometricDraw:
  """Which distortions an image gets, in the order they are applied.

  `None` means not applied.

  Attributes:
    brightness: added to every channel, grey levels, [-32, 32).
    contrast_first: factor on every channel, [0.5, 1.5).
    saturation: factor on the HSV saturation, [0.5, 1.5).
    hue: added to the hue in OpenCV's unit of 2 degrees, integer in [-18, 17].
    contrast_last: as `contrast_first`; at most one of the two is drawn.
  """

  brightness: float | None = None
  contrast_first: float | None = None
  saturation: float | None = None
  hue: int | None = None
  contrast_last: float | None = None

  def parameters(self) -> np.ndarray:
    """Returns the five values as float32 (5,), identity where not drawn."""
    identity = (0.0, 1.0, 1.0, 0.0, 1.0)
    drawn = dataclasses.astuple(self)
    return np.array(
      [i if d is None else d for d, i in zip(drawn, identity, strict=True)],
      np.float32,
    )


@dataclasses.dataclass(frozen=True)
class AugmentationDraw:
  """All random numbers of one training sample.

  Attributes:
    ratio: factor on the configured image scale.
    crop_offsets: (11, 2) uniform in [0, 1): where in the room left by the crop
      each try puts its top and its left edge.
    flip: whether the sample is mirrored left to right.
    photometric: the photometric distortion.
  """

  ratio: float
  crop_offsets: np.ndarray
  flip: bool
  photometric: PhotometricDraw


def draw_photometric(rng: np.random.Generator) -> PhotometricDraw:
  """Draws a distortion: each of the four with probability 0.5.

  Contrast comes first or last with equal probability. The number of values
  taken from `rng` is always the same.
  """
  applied = rng.random(4) < 0.5
  contrast_is_first = rng.random() < 0.5
  brightness = rng.uniform(-32.0, 32.0)
  contrast, saturation = rng.uniform(0.5, 1.5, size=2)
  hue = int(rng.integers(-18, 18))
  contrast = float(contrast) if applied[1] else None
  return PhotometricDraw(
    brightness=brightness if applied[0] else None,
    contrast_first=contrast if contrast_is_first else None,
    saturation=float(saturation) if applied[2] else None,
    hue=hue if applied[3] else None,
    contrast_last=None if contrast_is_first else contrast,
  )


def draw_augmentation(
  rng: np.random.Generator,
  *,
  scale_range: tuple[float, float] = (0.5, 2.0),
  flip_probability: float = 0.5,
  photometric: bool = True,
) -> AugmentationDraw:
  """Draws everything one training sample needs.

  Args:
    rng: the sample's own generator. Every draw consumes the same amount of it,
      so that switching one augmentation off leaves the others as they were.
    scale_range: bounds of the uniform resize ratio.
    flip_probability: probability of mirroring.
    photometric: whether to distort colours at all.

  Returns:
    The draw.
  """
  low, high = scale_range
  ratio = float(rng.random() * (high - low) + low)
  crop_offsets = rng.random((CROP_TRIES, 2))
  flip = bool(rng.random() < flip_probability)
  distortion = draw_photometric(rng)
  return AugmentationDraw(
    ratio=ratio,
    crop_offsets=crop_offsets,
    flip=flip,
    photometric=distortion if photometric else PhotometricDraw(),
  )


def is_diverse(label: np.ndarray, cat_max_ratio: float) -> bool:
  """Whether a crop has two classes and none at or above `cat_max_ratio`.

  Ignored pixels count neither as a class nor in the ratio.
  """
  # Six times as fast as np.bincount. Its float32 counts are exact to 2**24.
  counts = cv2.calcHist([label], [0], None, [IGNORE + 1], [0, 256])
  counts = counts[:IGNORE].astype(np.int64)
  if np.count_nonzero(counts) < 2:
    return False
  return bool(counts.max() / counts.sum() < cat_max_ratio)


def random_crop(
  label: np.ndarray,
  size: tuple[int, int],
  offsets: np.ndarray,
  crop_size: tuple[int, int],
  cat_max_ratio: float,
) -> tuple[Window, np.ndarray]:
  """Chooses where to crop the label that was resized to `size`.

  The tries are taken in order until one is diverse; the last one is taken
  unseen, so that a label of a single class can be cropped too. A side shorter
  than the crop starts at 0.

  Args:
    label: uint8 (H, W), before it is resized.
    size: height and width that it is resized to.
    offsets: (11, 2) uniform numbers in [0, 1) for top and left.
    crop_size: height and width of the crop.
    cat_max_ratio: share of valid pixels one class must stay below; 1.0 or more
      takes the first try.

  Returns:
    Rows and columns of the resized label, at most `crop_size` of them, and
    these pixels, uint8.
  """
  room = [
    max(length - crop, 0) + 1
    for length, crop in zip(size, crop_size, strict=True)
  ]
  origins = [(int(y * room[0]), int(x * room[1])) for y, x in offsets]
  refused = set()  # A small room gives the same origin again.
  for number, (top, left) in enumerate(origins, 1):
    if number < CROP_TRIES and (top, left) in refused:
      continue
    window = (
      slice(top, min(top + crop_size[0], size[0])),
      slice(left, min(left + crop_size[1], size[1])),
    )
    crop = resize_label_window(label, size, window)
    if number == CROP_TRIES or cat_max_ratio >= 1.0:
      break
    if is_diverse(crop, cat_max_ratio):
      break
    refused.add((top, left))
  return window, crop


def random_flip(array: np.ndarray, flip: bool) -> np.ndarray:
  """Mirrors an image or a label left to right if `flip`."""
  return cv2.flip(array, 1) if flip else array


def pad_bottom_right(
  array: np.ndarray, size: tuple[int, int], value: int
) -> np.ndarray:
  """Copies `array` into the top left corner of one of `size` and `value`.

  Args:
    array: (h, w, ...) not larger than `size`.
    size: height and width of the result.
    value: fills the rest.

  Returns:
    A contiguous array (size[0], size[1], ...): `array` itself if it is one.
  """
  height, width = array.shape[:2]
  if (height, width) == tuple(size):
    return np.ascontiguousarray(array)
  padded = np.empty((*size, *array.shape[2:]), array.dtype)
  padded[:height, :width] = array
  padded[height:] = value
  padded[:height, width:] = value
  return padded


def check_sizes(image: np.ndarray, label: np.ndarray, name: str) -> None:
  """Raises `UserError` unless image and label have the same size."""
  if image.shape[:2] != label.shape:
    raise UserError(
      f'sample {name!r}: the image is {image.shape[1]}x{image.shape[0]} '
      f'pixels but its label is {label.shape[1]}x{label.shape[0]}. Both must '
      'have the same size: repair or remove the pair and prepare the data '
      'again.'
    )


def augment(
  image: np.ndarray,
  label: np.ndarray,
  draw: AugmentationDraw,
  *,
  image_scale: tuple[int, int],
  crop_size: tuple[int, int],
  cat_max_ratio: float,
) -> dict[str, np.ndarray]:
  """Makes one training sample of fixed size.

  Args:
    image: uint8 (H, W, 3) RGB.
    label: uint8 (H, W).
    draw: the sample's random numbers.
    image_scale: long and short edge at ratio 1, pixels.
    crop_size: height and width of the sample.
    cat_max_ratio: see `random_crop`.

  Returns:
    `image` uint8 (crop height, crop width, 3), 0 where padded; `label` uint8
    (crop height, crop width), 255 where padded; `size` int32 (2,), height and
    width before padding; `photometric` float32 (5,), the distortion left to
    the accelerator.
  """
  # The label decides where to crop; then only that much of the image is made.
  size = resized_size(*label.shape, draw.ratio, image_scale)
  window, label = random_crop(
    label, size, draw.crop_offsets, crop_size, cat_max_ratio
  )
  image = resize_image_window(image, size, window)
  image = random_flip(image, draw.flip)
  label = random_flip(label, draw.flip)
  return {
    'image': pad_bottom_right(image, crop_size, 0),
    'label': pad_bottom_right(label, crop_size, IGNORE),
    'size': np.array(label.shape, np.int32),
    'photometric': draw.photometric.parameters(),
  }
