"""From a split to batches: order, randomness, parallel reading, bucketing.

Training: the position of a sample in a run, `step * batch_size + slot`, and the
seed decide everything about it, so that threads, worker processes, hosts and
resuming at any step, which is free, give the same batches.

Evaluation: images that fit the same padded shapes share a batch.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnest_jax import sharding
from resnest_jax.data import crops, resize, transforms
from resnest_jax.data.batches import (
  Batch,
  BatchIterator,
  CheckedSplit,
  Split,
  Unreadable,
  replacement,
)
from resnest_jax.data.more_augmentation import MoreAugmentation
from resnest_jax.data.sampling import Sampler, make_sampler, open_sampler
from resnest_jax.distributed import messages
from resnest_jax.errors import UserError
from resnest_jax.labels import IGNORE
from resnest_jax.progress import console
from resnest_jax.threads import thread_count


def sample_key(seed: int) -> tuple[int, int]:
  # Philox' key of a run's augmentation draws. The sampler hashes (seed, 0).
  state = np.random.SeedSequence([seed, 1]).generate_state(2, np.uint64)
  return int(state[0]), int(state[1])


def sample_rng(
  key: Sequence[int], position: int, stream: int = 0
) -> np.random.Generator:
  # The position is the highest word of the 256-bit counter: streams never meet.
  return np.random.Generator(
    np.random.Philox(key=key, counter=[0, 0, stream, position])
  )


def _init_worker(worker_index: int, num_workers: int) -> None:
  del worker_index, num_workers
  # Ctrl-C and schedulers signal the whole group; a worker that died before the
  # training process would look like a crash.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
  cv2.setNumThreads(0)  # Spawned workers do not inherit it.
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  # After SIGKILL the parent cannot end its workers, whose main thread blocks.
  multiprocessing.parent_process().join()
  os._exit(1)


def _read_options(
  num_threads: int, num_workers: int, ahead: int
) -> grain.ReadOptions:
  threads = thread_count(num_threads, max(num_workers, 1))
  return grain.ReadOptions(threads, max(ahead, threads))


def make_train_iterator(
  data_config: Any,
  split: Split,
  *,
  seed: int,
  batch_size: int,
  start_step: int = 0,
  total_steps: int,
  sampler: Sampler | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> BatchIterator:
  """Makes this host's batches of a run's steps; close after use.

  They are of `transforms.augment` or `crops.augment`, from `start_step`, any of
  which costs the same, to before `total_steps`. `batch_size` is over all hosts,
  whose number `process_count` divides it. `sampler` maps positions to samples;
  None: each once an epoch.

  Raises `UserError` on iterating for an unusable sample or a killed worker.
  """
  if batch_size % process_count:
    raise UserError(
      f'a batch of {batch_size} cannot be shared by {process_count} '
      'processes. Set train.batch_size to a multiple of their number.'
    )
  cv2.setNumThreads(0)
  in_parts = data_config.augmentation == 'mmseg' and not data_config.transform
  checked = CheckedSplit(split, data_config.skip_unreadable, in_parts)
  if sampler is None:
    sampler = make_sampler('uniform', len(split), seed)
  local_batch = batch_size // process_count

  def position(index: int) -> int:
    step, slot = divmod(index, local_batch)
    return step * batch_size + process_index * local_batch + slot

  batches = (
    # Lazy: nothing is read before the slice, so that resuming costs nothing.
    grain.MapDataset.range(max(total_steps, 1) * local_batch)
    .map(position)
    .map(_sample_maker(data_config, checked, sampler, seed))
    .batch(local_batch, drop_remainder=True)
    .slice(slice(start_step, total_steps))
  )
  reader = iter(_reading(batches, data_config))
  num_steps = max(total_steps - start_step, 0)
  return BatchIterator(reader, reader, num_steps * local_batch, checked)


# By `data.augmentation`: a function of an image, its label and a draw, and
# which keys of `data` are its options.
_AUGMENTATIONS = {
  'mmseg': (transforms.augment, 'image_scale scale_range cat_max_ratio'),
  'encoding': (transforms.augment_encoding, 'image_scale scale_range'),
  'imagenet': (
    crops.augment,
    'policy random_crop interpolation flip_probability color_jitter lighting',
  ),
}


def make_augment(data_config: Any) -> Callable[..., dict[str, np.ndarray]]:
  """Returns the configured function of an image, its label and a draw."""
  augment, names = _AUGMENTATIONS[data_config.augmentation]
  names = ('crop_size', *names.split())
  options = {name: getattr(data_config, name) for name in names}
  return functools.partial(augment, **options)


def _sample_maker(
  data_config: Any, split: CheckedSplit, sampler: Sampler, seed: int
) -> Callable[[int], dict[str, np.ndarray]]:
  key = sample_key(seed)
  make_draw = functools.partial(
    transforms.draw_augmentation,
    flip_probability=data_config.flip_probability,
    photometric=data_config.photometric,
  )
  if data_config.augmentation == 'imagenet':
    make_draw = crops.draw
  labels = getattr(split.split, 'labels', None)
  classes = len(labels.classes) if labels else IGNORE
  augment = make_augment(data_config)
  more = MoreAugmentation(data_config, classes)

  def make_sample(position: int) -> dict[str, np.ndarray]:
    skipped, sample = -1, split[sampler(position)]
    if isinstance(sample, Unreadable):
      skipped = sample.index
      # Stream 1: the augmentation's draws do not depend on replacements.
      sample = replacement(split, sample_rng(key, position, stream=1))
    draw = make_draw(sample_rng(key, position))
    rng = sample_rng(key, position, stream=2)
    sample = more(sample, rng, functools.partial(augment, draw=draw))
    # In all samples or none, because they are stacked.
    if split.skip_unreadable:
      sample['skipped'] = np.array(skipped, np.int32)
    return sample

  return make_sample


def _reading(batches: grain.MapDataset, data_config: Any) -> grain.IterDataset:
  num_workers = data_config.num_workers
  # Up to `prefetch` batches ahead in every process: this bounds the memory.
  batches = batches.to_iter_dataset(
    _read_options(data_config.num_threads, num_workers, data_config.prefetch)
  )
  if num_workers == 0:
    return batches
  # Grain reads absl flags, which raises where absl.app has not parsed them.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
  return batches.mp_prefetch(options, worker_init_fn=_init_worker)


def training_batches(
  config: ConfigDict,
  split: Split,
  mesh: Mesh,
  start_step: int = 0,
  cache: Path | None = None,
) -> BatchIterator:
  """Makes the batches of a training on the devices; close after use.

  Args:
    start_step: finished steps; batches continue as if never interrupted.
    cache: .npy file that keeps pixel counts for the next start, if given.

  Returns:
    An iterator of `train.total_steps - start_step` batches for the step of
    `create_training`: 'image' uint8 (B, h, w, 3), 'label' uint8 (B, h, w),
    'size' int32 (B, 2) and 'photometric' float32 (B, 5). Of a classifier
    'label' is int32 (B,), and 'shift' float32 (B, 3) instead of 'photometric'.
  """
  host, num_hosts = sharding.host_share(mesh)
  with messages.first_goes_ahead('sampler'):
    sampler, shares = open_sampler(config.data, split, config.seed, cache)
  if shares:
    console().print(shares)
  batches = make_train_iterator(
    config.data,
    split,
    seed=config.seed,
    batch_size=config.train.batch_size,
    start_step=start_step,
    total_steps=config.train.total_steps,
    sampler=sampler,
    process_index=host,
    process_count=num_hosts,
  )
  batches.place = functools.partial(sharding.shard_batch, mesh=mesh)
  return batches


def resize_sample(
  index: int,
  sample: dict[str, Any] | Unreadable,
  *,
  image_scale: tuple[int, int] | None,
  center_crop: str = '',
) -> dict[str, Any] | Unreadable:
  """Resizes an image within two edges, or crops it by a rule of `crops`."""
  if isinstance(sample, Unreadable):
    return sample
  # The label keeps its size: predictions are compared with it there.
  image = sample['image']
  if center_crop:
    image = crops.center_crop(image, image_scale[0], center_crop)
  elif image_scale is not None:
    size = resize.resized_size(*image.shape[:2], 1.0, image_scale)
    image = resize.resize_image(image, size)
  return sample | {'image': image, 'index': index}


def make_eval_batch(
  samples: Sequence[dict[str, Any]],
  batch_size: int,
  image_shape: tuple[int, int],
  label_shape: tuple[int, ...],
) -> Batch:
  """Pads samples to common shapes and fills the batch with empty slots.

  `label_shape` is () where an image has one class; empty slots then have -1.
  """
  label = (IGNORE, np.uint8) if label_shape else (-1, np.int32)
  image = samples[0]['image']
  image_shape = (*image_shape, image.shape[2])
  batch = {
    'image': np.zeros((batch_size, *image_shape), image.dtype),
    # Empty slots have size 1 and not 0, by which code downstream may divide.
    'size': np.ones((batch_size, 2), np.int32),
    'label': np.full((batch_size, *label_shape), *label),
    'label_size': np.ones((batch_size, 2), np.int32),
    'index': np.full(batch_size, -1, np.int32),
    'name': [sample['name'] for sample in samples],
  }
  batch['name'] += [''] * (batch_size - len(samples))
  for slot, sample in enumerate(samples):
    batch['index'][slot] = sample['index']
    for key, size in ('image', 'size'), ('label', 'label_size'):
      shape = np.shape(sample[key])[:2]
      batch[key][slot, *map(slice, shape)] = sample[key]
      batch[size][slot] = shape or 1
  return batch


def _group_by_shape(
  samples: Iterator[dict[str, Any] | Unreadable],
  batch_size: int,
  bucket: int,
  keep_size: bool,
) -> Iterator[Batch]:
  waiting: dict[tuple, list] = {}
  for sample in samples:
    if isinstance(sample, Unreadable):
      continue
    shapes = padded_shapes([sample], bucket)
    group = waiting.setdefault(shapes, [])
    group.append(sample)
    if len(group) == batch_size:
      yield make_eval_batch(waiting.pop(shapes), batch_size, *shapes)

  # The rest share shapes with neighbours in aspect ratio: a few padded pixels
  # cost less than many empty slots. Images of their own size differ in area.
  def likeness(sample: dict[str, Any]) -> tuple:
    height, width = sample['image'].shape[:2]
    if keep_size:
      return width > height, height * width
    return width / height, height, np.shape(sample['label'])

  rest = sorted((s for group in waiting.values() for s in group), key=likeness)
  for start in range(0, len(rest), batch_size):
    group = rest[start : start + batch_size]
    yield make_eval_batch(group, batch_size, *padded_shapes(group, bucket))


def padded_shapes(
  samples: Sequence[dict[str, Any]], bucket: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the smallest shapes that hold all images, and all labels."""
  images = np.max([sample['image'].shape[:2] for sample in samples], 0)
  labels = np.max([np.shape(sample['label']) for sample in samples], 0)
  return tuple(resize.padded_size(x.tolist(), bucket) for x in (images, labels))


def make_eval_iterator(
  data_config: Any,
  split: Split,
  *,
  batch_size: int,
  bucket: int,
  skip_unreadable: bool = False,
  keep_size: bool = False,
  process_index: int = 0,
  process_count: int = 1,
) -> BatchIterator:
  """Makes batches that hold every image of a split once; close after use.

  Args:
    batch_size: for each host.
    bucket: padded sides are multiples of this many pixels.
    skip_unreadable: leave out unreadable samples instead of raising.
    process_index: this host h, which reads images h, h + process_count, ...

  Returns:
    An iterator of `num_images` images in batches: `image` uint8 (B, H, W, 3),
    resized within `data.image_scale` and padded with 0 at the bottom and right;
    `size` int32 (B, 2), height and width before padding; `label` uint8 (B, Hl,
    Wl) at its original size, padded with 255, and its `label_size`; `index`
    int32 (B,), the place in the split, and `name`. Empty slots have index -1.
    Of a classifier, images are the crops that it sees, and `label` int32 (B,),
    or -1.
  """
  if bucket < 1:
    raise UserError(f'eval.bucket is {bucket}; it must be 1 or more.')
  cv2.setNumThreads(0)
  rule = ''
  if not keep_size and data_config.augmentation == 'imagenet':
    rule, bucket = data_config.center_crop, 1
  image_scale = None if keep_size else tuple(data_config.image_scale)
  resize_one = functools.partial(
    resize_sample, image_scale=image_scale, center_crop=rule
  )
  checked = CheckedSplit(split, skip_unreadable)
  mine = slice(process_index, None, process_count)
  # Threads even if training uses processes, which take long to start.
  reader = iter(
    grain.MapDataset.source(checked)
    .map_with_index(resize_one)
    .slice(mine)
    .to_iter_dataset(_read_options(data_config.num_threads, 0, batch_size))
  )
  batches = _group_by_shape(reader, batch_size, bucket, keep_size)
  return BatchIterator(batches, reader, len(range(len(split))[mine]), checked)
