"""Training augmentation: pure functions of an image, its label and a draw.

The transforms, their order, their rounding and their distributions are those
of mmsegmentation 1.2.2's ADE20K and Cityscapes training pipelines: keep-ratio
resize at a random ratio, random crop that avoids crops of a single class,
horizontal flip, photometric distortion, padding. Given the same draw the
result is equal to its result, bit for bit.

What deviates is where the random numbers come from: `draw_augmentation` makes
all of one sample's numbers before the sample is looked at, so that a sample's
augmentation depends on nothing but its random generator. Training applies the
photometric distortion on the accelerator (`resnest_jax.data.device`); the
function here does it in 8-bit host arithmetic and is what that one is held
against.

Images are uint8 (H, W, 3) RGB, labels uint8 (H, W) of train ids with 255 for
ignored pixels. Sizes are (height, width) in pixels.
"""

import dataclasses

import cv2
import numpy as np

from resnest_jax.errors import UserError

IGNORE_LABEL = 255
# The first crop and ten more when the one before it is refused.
CROP_TRIES = 11


@dataclasses.dataclass(frozen=True)
class PhotometricDraw:
  """Which distortions an image gets, in the order they are applied.

  `None` means not applied. A drawn value that changes nothing, such as a hue
  shift of 0, still rounds the image to 8-bit HSV and back on the host.

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


def keep_ratio_size(
  height: int, width: int, long_edge: int, short_edge: int
) -> tuple[int, int]:
  """Returns the largest (height, width) of the same aspect within two edges.

  Args:
    height: the image's height.
    width: the image's width.
    long_edge: bound on the longer side.
    short_edge: bound on the shorter side.

  Returns:
    Height and width, each rounded half up and at least 1.
  """
  scale = min(long_edge / max(height, width), short_edge / min(height, width))
  return (
    max(int(height * scale + 0.5), 1),
    max(int(width * scale + 0.5), 1),
  )


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes an image to `size` (height, width), bilinear in OpenCV's sense."""
  return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes a label to `size` (height, width), nearest in OpenCV's sense."""
  return cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST)


def random_resize(
  image: np.ndarray,
  label: np.ndarray,
  ratio: float,
  image_scale: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
  """Resizes both to `image_scale` (two edges, any order) times `ratio`."""
  edges = [int(edge * ratio) for edge in image_scale]
  height, width = image.shape[:2]
  size = keep_ratio_size(height, width, max(edges), min(edges))
  return resize_image(image, size), resize_label(label, size)


def is_diverse(label: np.ndarray, cat_max_ratio: float) -> bool:
  """Whether a crop has two classes and none at or above `cat_max_ratio`.

  Ignored pixels count neither as a class nor in the ratio.
  """
  counts = np.bincount(label.ravel(), minlength=IGNORE_LABEL + 1)
  counts[IGNORE_LABEL] = 0
  if np.count_nonzero(counts) < 2:
    return False
  return bool(counts.max() / counts.sum() < cat_max_ratio)


def crop_origin(
  label: np.ndarray,
  offsets: np.ndarray,
  crop_size: tuple[int, int],
  cat_max_ratio: float,
) -> tuple[int, int]:
  """Chooses where to crop.

  The tries are taken in order until one is diverse; the last one is taken
  unseen, so that a label of a single class can be cropped too. A side shorter
  than the crop starts at 0.

  Args:
    label: uint8 (H, W).
    offsets: (11, 2) uniform numbers in [0, 1) for top and left.
    crop_size: height and width of the crop.
    cat_max_ratio: share of valid pixels one class must stay below; 1.0 or more
      takes the first try.

  Returns:
    Top row and left column.
  """
  room = [
    max(length - crop, 0) + 1
    for length, crop in zip(label.shape, crop_size, strict=True)
  ]
  origins = [(int(y * room[0]), int(x * room[1])) for y, x in offsets]
  if cat_max_ratio >= 1.0:
    return origins[0]
  height, width = crop_size
  for top, left in origins[:-1]:
    crop = label[top : top + height, left : left + width]
    if is_diverse(crop, cat_max_ratio):
      return top, left
  return origins[-1]


def random_crop(
  image: np.ndarray,
  label: np.ndarray,
  offsets: np.ndarray,
  crop_size: tuple[int, int],
  cat_max_ratio: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
  """Crops both at `crop_origin`; smaller where the image is smaller."""
  top, left = crop_origin(label, offsets, crop_size, cat_max_ratio)
  rows = slice(top, top + crop_size[0])
  columns = slice(left, left + crop_size[1])
  return image[rows, columns], label[rows, columns]


def random_flip(
  image: np.ndarray, label: np.ndarray, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Mirrors both left to right if `flip`."""
  if not flip:
    return image, label
  return image[:, ::-1], label[:, ::-1]


def pad_bottom_right(
  array: np.ndarray, size: tuple[int, int], value: int
) -> np.ndarray:
  """Copies `array` into the top left corner of one of `size` and `value`.

  Args:
    array: (h, w, ...) not larger than `size`.
    size: height and width of the result.
    value: fills the rest.

  Returns:
    A new contiguous array (size[0], size[1], ...).
  """
  height, width = array.shape[:2]
  padded = np.empty((*size, *array.shape[2:]), array.dtype)
  padded[:height, :width] = array
  padded[height:] = value
  padded[:height, width:] = value
  return padded


def _scale_and_shift(
  image: np.ndarray, factor: float = 1.0, shift: float = 0.0
) -> np.ndarray:
  """Returns image * factor + shift in float32, clipped and truncated."""
  changed = image.astype(np.float32) * np.float32(factor) + np.float32(shift)
  return np.clip(changed, 0, 255).astype(np.uint8)


def _scale_saturation(image: np.ndarray, factor: float) -> np.ndarray:
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
  hsv[..., 1] = _scale_and_shift(hsv[..., 1], factor=factor)
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _shift_hue(image: np.ndarray, shift: int) -> np.ndarray:
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
  hsv[..., 0] = (hsv[..., 0].astype(int) + shift) % 180
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def photometric_distortion(
  image: np.ndarray, draw: PhotometricDraw
) -> np.ndarray:
  """Distorts colours in 8-bit arithmetic, rounding after each step.

  Args:
    image: uint8 (H, W, 3) RGB; left as it is.
    draw: what to apply.

  Returns:
    uint8 (H, W, 3) RGB.
  """
  if draw.brightness is not None:
    image = _scale_and_shift(image, shift=draw.brightness)
  if draw.contrast_first is not None:
    image = _scale_and_shift(image, factor=draw.contrast_first)
  if draw.saturation is not None:
    image = _scale_saturation(image, draw.saturation)
  if draw.hue is not None:
    image = _shift_hue(image, draw.hue)
  if draw.contrast_last is not None:
    image = _scale_and_shift(image, factor=draw.contrast_last)
  return image


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
    cat_max_ratio: see `crop_origin`.

  Returns:
    `image` uint8 (crop height, crop width, 3), 0 where padded; `label` uint8
    (crop height, crop width), 255 where padded; `size` int32 (2,), height and
    width before padding; `photometric` float32 (5,), the distortion left to
    the accelerator.
  """
  image, label = random_resize(image, label, draw.ratio, image_scale)
  image, label = random_crop(
    image, label, draw.crop_offsets, crop_size, cat_max_ratio
  )
  image, label = random_flip(image, label, draw.flip)
  return {
    'image': pad_bottom_right(image, crop_size, 0),
    'label': pad_bottom_right(label, crop_size, IGNORE_LABEL),
    'size': np.array(label.shape, np.int32),
    'photometric': draw.photometric.parameters(),
  }
