"""Names and order of the bands of images that are not plain RGB.

`config.data.bands` names all bands of a file in its order; () is 8-bit RGB.
"""

from collections.abc import Sequence

import numpy as np

COLOURS = ('red', 'green', 'blue')
MOST = 16
ARRAY = '.npy'  # The ending of images that are arrays of bands.


def has_colours(bands: Sequence[str]) -> bool:
  """Whether red, green and blue are among them; of plain RGB they are."""
  return not bands or {*COLOURS} <= {*bands}


def network_order(bands: Sequence[str]) -> list[int]:
  """Places of the bands as the network sees them: the colours come first."""
  first = [bands.index(x) for x in COLOURS] if has_colours(bands) else []
  return first + [i for i in range(len(bands)) if i not in first]


def shown(image: np.ndarray, bands: Sequence[str]) -> np.ndarray:
  """Red, green and blue, or the first three bands, as uint8 (H, W, 3).

  Other depths than 8 bits are stretched: of each band 2 % become black and 2 %
  white.
  """
  if not bands:
    return image
  places = network_order(bands)[:3]
  picture = image[..., [*places, *2 * places[-1:]][:3]]
  if picture.dtype == np.uint8:
    return np.ascontiguousarray(picture)
  step = max(max(picture.shape[:2]) // 512, 1)
  low, high = np.percentile(picture[::step, ::step], (2, 98), axis=(0, 1))
  levels = (picture - low) / np.maximum(high - low, 1e-30)
  return (255 * np.clip(levels, 0, 1)).astype(np.uint8)
