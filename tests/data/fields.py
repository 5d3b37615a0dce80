"""Drawn fields whose two crops differ in a fourth band alone."""

import numpy as np
import tifffile
from data.small_archives import encode

BANDS = ('nir', 'red', 'green', 'blue')
NAMES = ('soil', 'wheat', 'barley')


def write_fields(root, bands=BANDS, dtype=np.uint16, number=12, size=48):
  """Images as TIFFs of these bands, the last quarter for evaluation."""
  rng = np.random.default_rng(0)
  root.mkdir(parents=True, exist_ok=True)
  (root / 'classes.txt').write_text('\n'.join(NAMES))
  for index in range(number):
    part = 'val' if 4 * index >= 3 * number else 'train'
    ids = np.zeros((size, size), np.uint8)
    for k in (1, 2, 1, 2):
      y, x = rng.integers(0, size // 2, 2)
      ids[y : y + size // 2, x : x + size // 2] = k
    colour = np.array([[80, 70, 60], [60, 160, 50], [60, 160, 50]])
    levels = {'nir': np.array([40, 60, 200])[ids]}
    levels |= {x: colour[ids, i] for i, x in enumerate(BANDS[1:])}
    image = np.stack([levels[x] for x in bands], -1)
    image = image + rng.integers(-12, 13, image.shape)
    image = (image * (1 if dtype == np.uint8 else 16)).astype(dtype)
    for folder in ('images', 'masks'):
      (root / folder / part).mkdir(parents=True, exist_ok=True)
    path = root / 'images' / part / f'{index}.tif'
    tifffile.imwrite(path, image, compression='deflate', **CONTIGUOUS)
    (root / 'masks' / part / f'{index}.png').write_bytes(encode(ids))
  return root


CONTIGUOUS = {'planarconfig': 'contig', 'photometric': 'minisblack'}
