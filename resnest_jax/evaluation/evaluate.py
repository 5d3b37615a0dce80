"""Evaluates every image of a split once and adds up integer counts.

Counts, unlike means, are the same for every batch size and number of hosts.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.progress
from ml_collections import ConfigDict

from resnest_jax import drawing, sharding
from resnest_jax.data.batches import BatchIterator
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.distributed import messages
from resnest_jax.errors import UserError, enough_memory
from resnest_jax.evaluation import metrics
from resnest_jax.inference.protocols import Protocol
from resnest_jax.inference.steps import Batch, EvalStep, make_eval_step
from resnest_jax.labels import IGNORE
from resnest_jax.models.layers import at_least_float32
from resnest_jax.progress import compile_notice, evaluation_progress

Waiting = Callable[[BatchIterator], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class ImageResult:
  index: int  # Position in the split.
  name: str
  # Views of a batch, at the original size: copy what has to outlast it.
  prediction: np.ndarray | None  # uint8 (H, W), classes.
  label: np.ndarray  # uint8 (H, W), classes or 255.
  confusion: np.ndarray  # int64 (C, C), rows = ground truth.
  loss: float = 0.0  # Summed cross entropy, if asked for.


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Counts and scores of a split, the same on every host."""

  confusion: np.ndarray  # int64 (C, C), rows = ground truth.
  scores: metrics.Scores
  num_images: int
  seconds: float  # Wall time, compilation included.
  # int64 (num_images, 2, C): each image's intersection and union.
  image_counts: np.ndarray
  names: Sequence[str] = ()  # Of the images, by position in the split.
  # Position in the split -> uint8 (H, W), for the images that are kept.
  predictions: Mapping[int, np.ndarray] = dataclasses.field(
    default_factory=dict
  )
  loss: float = 0.0  # Mean cross entropy of the labelled pixels, if asked for.


class Evaluator:
  """Evaluates a network on every image of a split, any number of times.

  Each process evaluates its share of the images on its own devices.

  Attributes:
    batch_size: images at a time on this host.
  """

  def __init__(
    self,
    config: ConfigDict,
    model: Any,
    split: Any,
    *,
    protocol: Protocol | None = None,
    keep: int = 0,
    watchers: Sequence[Any] = (),
    with_loss: bool = False,
  ):
    """Builds the step; nothing is compiled yet.

    Args:
      config: the whole configuration; `data`, `eval` and the dtype are read.
      model: a `Segmentor`.
      split: from `open_data`.
      protocol: None: the whole image, whatever `config.eval` names.
      keep: number of predictions to return, spread over the split.
      watchers: `add(image)` gets every `ImageResult` of this host; `gather()`,
        called on all hosts after the last image, joins the hosts' results.
      with_loss: whether to compute `Evaluation.loss`; not with a protocol.
    """
    self._config, self._split, self._watchers = config, split, watchers
    self._protocol = protocol
    # Hosts' batches differ in shape and number: no program may span hosts.
    self._mesh = sharding.local_mesh()
    wanted = config.eval.batch_size
    self.batch_size = sharding.divisible_batch_size(wanted, self._mesh)
    self._kept = drawing.spread(len(split), keep)
    self._step = make_eval_step(
      model,
      len(split.labels.classes),
      protocol=protocol,
      mesh=self._mesh,
      dtype=at_least_float32(config.model.dtype),
      # Looked up late: each call has a progress bar of its own.
      on_compile=lambda height, width: self._notice(height, width),
      with_loss=with_loss,
    )

  def __call__(
    self, variables: Any, waiting: Waiting = contextlib.nullcontext
  ) -> Evaluation:
    """Evaluates one set of weights; every host has to call it.

    Args:
      variables: `params` and `batch_stats`, on the host or on devices.
      waiting: makes a context from the batches; the images are evaluated in it.

    Raises:
      UserError: data cannot be used, or the device has too little memory.
    """
    predictions = {}

    def look(image: ImageResult) -> None:
      if image.index in self._kept:
        predictions[image.index] = image.prediction.copy()
      for watcher in self._watchers:
        watcher.add(image)

    batches = make_eval_iterator(
      self._config.data,
      self._split,
      batch_size=self.batch_size,
      bucket=self._config.eval.bucket,
      keep_size=self._protocol is not None and self._protocol.keep_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    with (
      # Outermost: a stop signal may end the process at any point below.
      waiting(batches),
      contextlib.closing(batches),  # Ends the reading threads.
      evaluation_progress(quiet=not messages.is_first()) as progress,
      enough_memory(
        'Set eval.batch_size or eval.bucket lower, model.dtype to bfloat16 or '
        'eval.protocol to slide, or use more devices; docs/memory.md.'
      ),
    ):
      self._notice = compile_notice(progress)
      evaluation = evaluate(
        self._step,
        sharding.place_locally(variables, self._mesh),
        batches,
        self._split.labels.classes,
        len(self._split),
        progress=progress,
        # None leaves the label maps on the device, as nobody looks at them.
        on_image=look if self._kept or self._watchers else None,
        fscore_beta=self._config.eval.fscore_beta,
      )
    # All hosts have the same watchers, so that their exchanges match.
    for watcher in self._watchers:
      watcher.gather()
    kept = dict(collections.ChainMap(*messages.gather(lambda: predictions)))
    return dataclasses.replace(evaluation, predictions=kept)


def image_results(
  eval_step: EvalStep, variables: Any, batches: Iterable[Batch], with_maps: bool
) -> Iterator[ImageResult]:
  """Yields each image's result, in the order of the batches."""

  def results(batch, maps, counts, losses=None):
    # Waits for the device. Sums over a split may not fit in int32.
    counts = np.asarray(counts).astype(np.int64)
    losses = np.zeros(len(counts)) if losses is None else np.asarray(losses)
    maps = np.asarray(maps) if with_maps else None
    for slot, index in enumerate(batch['index']):
      if index < 0:  # An empty slot.
        continue
      _check_counts(counts[slot], batch, slot)
      height, width = batch['label_size'][slot]
      prediction = maps[slot, :height, :width] if with_maps else None
      label = batch['label'][slot, :height, :width]
      yield ImageResult(
        int(index),
        batch['name'][slot],
        prediction,
        label,
        counts[slot],
        float(losses[slot]),
      )

  # A batch is dispatched before the results of the previous one are awaited:
  # the device computes meanwhile. None makes room for the last results.
  pending = None
  for batch in itertools.chain(batches, [None]):
    started = batch and (batch, *eval_step(variables, batch))
    if pending:
      yield from results(*pending)
    pending = started


def evaluate(
  eval_step: EvalStep,
  variables: Any,
  batches: Iterable[Batch],
  class_names: Sequence[str],
  num_images: int,
  *,
  progress: rich.progress.Progress | None = None,
  on_image: Callable[[ImageResult], None] | None = None,
  fscore_beta: float = 1.0,
) -> Evaluation:
  """Evaluates every image of a split once; every process has to call it.

  Args:
    eval_step: from `make_eval_step`.
    variables: `params` and `batch_stats`, on the step's devices.
    batches: this process' share, maybe none; empty slots have index -1.
    class_names: C names.
    num_images: images in the split, over all processes.
    progress: gets a task 'evaluate'.
    on_image: called for every image of this process.
    fscore_beta: see `metrics.scores`.

  Raises:
    UserError: a label is neither a class nor 255, or another process failed.
    RuntimeError: an image came twice, or not at all.
  """
  started = time.perf_counter()
  total = len(messages.share(num_images))
  task = progress and progress.add_task('evaluate', total=total)

  def count_mine():
    confusion = np.zeros((len(class_names), len(class_names)), np.int64)
    counted = []
    for result in image_results(eval_step, variables, batches, bool(on_image)):
      counts = metrics.intersection_and_union(result.confusion)
      counted.append((result.index, result.name, counts, result.loss))
      confusion += result.confusion
      if on_image:
        on_image(result)
      if progress:
        progress.advance(task)
    return confusion, counted

  # A host that fails in here tells the others.
  parts = messages.gather(count_mine)
  confusion = sum(part for part, _ in parts)
  seen = {}
  for index, name, *counted in (each for _, mine in parts for each in mine):
    if index in seen:
      raise RuntimeError(f'image {index} ({name}) came twice')
    seen[index] = name, *counted
  if len(seen) != num_images:
    raise RuntimeError(
      f'the pipeline gave {len(seen)} images, the split has {num_images}'
    )
  # By position: batches come in another order for every batch size.
  by_position = [seen[index] for index in sorted(seen)]
  image_counts = [counts for _, counts, _ in by_position]
  return Evaluation(
    confusion,
    metrics.scores(confusion, class_names, fscore_beta),
    num_images,
    time.perf_counter() - started,
    np.reshape(image_counts, (num_images, 2, len(class_names))),
    [name for name, _, _ in by_position],
    loss=math.fsum(x for _, _, x in by_position) / max(confusion.sum(), 1),
  )


def _check_counts(counts: np.ndarray, batch: Batch, slot: int) -> None:
  # `count_confusion` drops labels that are no class: those of another data set
  # would pass as ignored pixels.
  label = batch['label'][slot]
  labelled = np.count_nonzero(label != IGNORE)
  if counts.sum() != labelled:
    raise UserError(
      f'{labelled - counts.sum()} of {labelled} labelled pixels of '
      f'{batch["name"][slot]} have no class: its labels go up to '
      f'{label[label != IGNORE].max()}; accepted are '
      f'0..{len(counts) - 1} and {IGNORE} (ignored). Prepare the data '
      'set again.'
    )
