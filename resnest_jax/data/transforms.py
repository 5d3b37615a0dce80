"""Training augmentation: pure functions of an image, its label and a draw.

Transforms, order, rounding and distributions follow mmsegmentation 1.2.2's
ADE20K and Cityscapes training pipelines (`augment`) or PyTorch-Encoding's
(`augment_encoding`), bit for bit for the same draw. But all random numbers are
drawn before the sample is read, and the accelerator applies the photometric
distortion (`resnest_jax.data.preprocess`).

Images are uint8 (H, W, 3) RGB, or of other bands with `data.bands`, labels
uint8 (H, W) of train ids with 255 for ignored pixels. Sizes are (height,
width).
"""

from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from resnest_jax.data import resize
from resnest_jax.errors import UserError
from resnest_jax.labels import IGNORE

UNDISTORTED = (0, 1, 1, 0, 1)
RGB = 'uint8', 3  # Type and channels of an image.
CROP_TRIES = 11  # As mmsegmentation: one, and ten more while refused.


class AugmentationDraw(NamedTuple):
  scale: float  # In [0, 1): place within the configured range of scales.
  # (11, 2) in [0, 1): top and left of each try, as a fraction of the room.
  crop_offsets: np.ndarray
  flip: bool
  photometric: np.ndarray  # As of `draw_photometric`.


def draw_photometric(rng: np.random.Generator) -> np.ndarray:
  """Draws the parameters of `preprocess.photometric_distortion`: float32 (5,).

  Brightness, saturation, hue and one of the contrasts are applied with a
  probability of 0.5 each.
  """
  # All values are drawn, applied or not: every image takes as many from `rng`.
  brightens, contrasts, saturates, turns = rng.random(4) < 0.5
  first = rng.random() < 0.5
  brightness = rng.uniform(-32.0, 32.0)
  contrast, saturation = rng.uniform(0.5, 1.5, size=2)
  drawn = brightness, contrast, saturation, rng.integers(-18, 18), contrast
  contrasts = contrasts & first, contrasts & (not first)
  applied = brightens, contrasts[0], saturates, turns, contrasts[1]
  return np.where(applied, drawn, UNDISTORTED).astype(np.float32)


def draw_augmentation(
  rng: np.random.Generator,
  *,
  flip_probability: float = 0.5,
  photometric: bool = True,
) -> AugmentationDraw:
  # The order is part of every run's result. Options do not change the amount
  # drawn: switching one augmentation off leaves the others as they were.
  scale = rng.random()
  crop_offsets = rng.random((CROP_TRIES, 2))
  flip = bool(rng.random() < flip_probability)
  distortion = draw_photometric(rng)
  if not photometric:
    distortion = np.float32(UNDISTORTED)
  return AugmentationDraw(scale, crop_offsets, flip, distortion)


def is_diverse(label: np.ndarray, cat_max_ratio: float) -> bool:
  """Whether a crop has two classes, none with a share of `cat_max_ratio`."""
  # Six times as fast as np.bincount; float32, which is exact to 2**24 pixels.
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
) -> tuple[resize.Window, np.ndarray]:
  """Chooses where to crop a label that is resized to `size`.

  `offsets` are as in `AugmentationDraw`; each class must stay below a share of
  `cat_max_ratio` of the valid pixels. A side that is shorter than the crop is
  taken whole. Returns rows and columns, and the resized label's pixels there.
  """
  room = np.maximum(np.subtract(size, crop_size), 0) + 1
  origins = [(int(y * room[0]), int(x * room[1])) for y, x in offsets]
  refused = set()  # With little room, tries repeat the same origin.
  for number, (top, left) in enumerate(origins, 1):
    # The last try is taken unseen, as in mmsegmentation.
    if number < CROP_TRIES and (top, left) in refused:
      continue
    window = (
      slice(top, min(top + crop_size[0], size[0])),
      slice(left, min(left + crop_size[1], size[1])),
    )
    crop = resize.resize_label_window(label, size, window)
    # 1.0 is mmsegmentation's switch for no check.
    unchecked = number == CROP_TRIES or cat_max_ratio >= 1.0
    if unchecked or is_diverse(crop, cat_max_ratio):
      break
    refused.add((top, left))
  return window, crop


def pad_bottom_right(
  array: np.ndarray, size: tuple[int, int], value: int
) -> np.ndarray:
  """Pads an (h, w, ...) array to `size` with `value`; returns it contiguous."""
  height, width = array.shape[:2]
  if (height, width) == tuple(size):
    return np.ascontiguousarray(array)
  # Not np.full: most pixels would be written twice.
  padded = np.empty((*size, *array.shape[2:]), array.dtype)
  padded[:height, :width] = array
  padded[height:] = value
  padded[:height, width:] = value
  return padded


def check_sizes(
  image: np.ndarray, label: np.ndarray | int, name: str, kind: tuple = RGB
) -> None:
  """Raises `UserError` unless they fit, and the image is of a kind: `RGB`."""
  classify = isinstance(label, int)  # One class for the whole image.
  kinds = [('image', image, kind), ('label', label, RGB[:1])]
  for what, array, (dtype, *last) in kinds[: 1 if classify else 2]:
    if (array.dtype, *array.shape[2:]) != (dtype, *last):
      raise UserError(
        f'sample {name!r}: the {what} is {array.dtype} {array.shape}; it has '
        f'to be {dtype} (H, W{"".join(f", {x}" for x in last)}).'
      )
  if not classify and image.shape[:2] != label.shape:
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
  scale_range: tuple[float, float],
  crop_size: tuple[int, int],
  cat_max_ratio: float,
) -> dict[str, np.ndarray]:
  """Makes a training sample of fixed size (h, w), as mmsegmentation does.

  `image_scale` has the long and short edge at ratio 1, in pixels; the ratio is
  uniform in `scale_range`. Returns `image` uint8 (h, w, 3), 0 where padded;
  `label` uint8 (h, w), 255 where padded; `size` int32 (2,), height and width
  before padding; `photometric` float32 (5,), see `draw_photometric`.
  """
  low, high = scale_range
  ratio = draw.scale * (high - low) + low
  # The label decides where to crop, so only the crop of the image is resized.
  size = resize.resized_size(*label.shape, ratio, image_scale)
  window, label = random_crop(
    label, size, draw.crop_offsets, crop_size, cat_max_ratio
  )
  image = resize.resize_image_window(image, size, window)
  if draw.flip:
    image, label = cv2.flip(image, 1), cv2.flip(label, 1)
  image = image.reshape(*label.shape, -1)  # OpenCV drops one channel's axis.
  return _sample(image, label, label.shape, crop_size, draw)


def long_edge_at(
  scale: float, base_size: int, scale_range: tuple[float, float]
) -> int:
  """Maps [0, 1) to the whole numbers of a range, both of its ends included."""
  low, high = (int(base_size * factor) for factor in scale_range)
  return low + int(scale * (high - low + 1))


def augment_encoding(
  image: np.ndarray,
  label: np.ndarray,
  draw: AugmentationDraw,
  *,
  image_scale: tuple[int, int],
  scale_range: tuple[float, float],
  crop_size: tuple[int, int],
) -> dict[str, np.ndarray]:
  """As `augment`, but as PyTorch-Encoding does.

  The long edge is that of `image_scale` times `scale_range`, in whole pixels
  that are equally likely. The first of the drawn crops is taken. Padding is
  black and seen by the network: `size` is the whole crop.
  """
  if draw.flip:
    image, label = cv2.flip(image, 1), cv2.flip(label, 1)
  long_edge = long_edge_at(draw.scale, image_scale[0], scale_range)
  size = resize.long_edge_size(*label.shape, long_edge)
  # All of it: of a window alone, Pillow would round its weights apart.
  image = resize.resize_in_pillow(image, size, Image.Resampling.BILINEAR)
  label = resize.resize_in_pillow(label, size, Image.Resampling.NEAREST)
  window, label = random_crop(label, size, draw.crop_offsets, crop_size, 1.0)
  return _sample(image[window], label, crop_size, crop_size, draw)


def _sample(
  image: np.ndarray,
  label: np.ndarray,
  size: tuple[int, int],
  crop_size: tuple[int, int],
  draw: AugmentationDraw,
) -> dict[str, np.ndarray]:
  return {
    'image': pad_bottom_right(image, crop_size, 0),
    'label': pad_bottom_right(label, crop_size, IGNORE),
    'size': np.array(size, np.int32),
    'photometric': draw.photometric,
  }
