"""Batches of pictures that keep the order of a stream."""

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


def unlabelled(
  image: np.ndarray, name: str = '', *, classify: bool = False
) -> dict[str, Any]:
  # The pipeline wants a label. A broadcast scalar takes no memory.
  label = np.broadcast_to(np.uint8(IGNORE), image.shape[:2])
  label = -1 if classify else label
  return {'image': image, 'label': label, 'name': name}


def batches_in_order(
  images: Iterable[np.ndarray],
  *,
  image_scale: tuple[int, int] | None,
  batch_size: int,
  bucket: int,
  center_crop: str = '',
) -> Iterator[dict[str, Any]]:
  """Batches of neighbours, in the format of `make_eval_iterator`.

  Images are uint8 (H, W, 3), at best of one size; at most a batch is read
  ahead. `image_scale` is the long and short edge; with None images keep their
  size; with `center_crop` it is that of a classifier's crops. Empty slots fill
  up the last batch.
  """
  samples = (
    resize_sample(
      index,
      unlabelled(image, classify=bool(center_crop)),
      image_scale=image_scale,
      center_crop=center_crop,
    )
    for index, image in enumerate(images)
  )
  # `make_eval_iterator` would sort pictures into groups of one padded shape.
  while group := list(itertools.islice(samples, batch_size)):
    yield make_eval_batch(group, batch_size, *padded_shapes(group, bucket))
