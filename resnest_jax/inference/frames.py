"""Batches of pictures that come one after the other, in their order."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from resnest_jax.data.pipeline import (
  make_eval_batch,
  padded_shapes,
  resize_sample,
)
from resnest_jax.labels import IGNORE


def unlabelled(image: np.ndarray, name: str = '') -> dict[str, Any]:
  """A sample of a picture without ground truth, which takes no memory."""
  label = np.broadcast_to(np.uint8(IGNORE), image.shape[:2])
  return {'image': image, 'label': label, 'name': name}


def batches_in_order(
  images: Iterable[np.ndarray],
  *,
  image_scale: tuple[int, int] | None,
  batch_size: int,
  bucket: int,
) -> Iterator[dict[str, Any]]:
  """Batches as `make_eval_iterator` makes them, of neighbours.

  Meant for frames, which are of one size: pictures of different sizes share a
  padded shape that holds all of the batch.

  Args:
    images: uint8 (H, W, 3); no more than a batch is taken ahead.
    image_scale: long and short edge in pixels that images are fitted into;
      None: they keep their size.
    batch_size: rows of each batch; the last is filled up.
    bucket: padded heights and widths are multiples of this many pixels.
  """
  samples = (
    resize_sample(index, unlabelled(image), image_scale=image_scale)
    for index, image in enumerate(images)
  )
  while group := list(itertools.islice(samples, batch_size)):
    yield make_eval_batch(group, batch_size, *padded_shapes(group, bucket))
