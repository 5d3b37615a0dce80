"""Evaluates every image of a split once and adds up integer counts.

Counts, unlike means, are the same for every batch size and number of hosts.
"""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import rich.progress
from ml_collections import ConfigDict

from resnest_jax import config_keys, drawing, sharding
from resnest_jax.data.batches import BatchIterator
from resnest_jax.data.pipeline import make_eval_iterator
from resnest_jax.distributed import messages
from resnest_jax.errors import enough_memory
from resnest_jax.evaluation.classification import Classification
from resnest_jax.evaluation.segmentation import Segmentation
from resnest_jax.inference import steps
from resnest_jax.inference.label_maps import Measure
from resnest_jax.inference.protocols import CenterCrop, Protocol
from resnest_jax.models.layers import at_least_float32
from resnest_jax.progress import compile_notice, evaluation_progress

Waiting = Callable[[BatchIterator], contextlib.AbstractContextManager]


class Evaluator:
  """Evaluates a network on every image of a split, any number of times.

  Each process evaluates its share of the images on its own devices, of which
  `batch_size` are in a batch.
  """

  def __init__(
    self,
    config: ConfigDict,
    model: Any,
    split: Any,
    *,
    protocol: Protocol | CenterCrop | None = None,
    keep: int = 0,
    watchers: Sequence[Any] = (),
    with_loss: bool = False,
    measure: Measure | None = None,
  ):
    """Builds the step; nothing is compiled yet.

    Args:
      config: the whole configuration; `data`, `eval` and the dtype are read.
      model: a `Segmentor` or `Classifier`.
      split: from `open_data`.
      protocol: None: the whole image, whatever `config.eval` names. That of a
        classifier has its normalisation; `config.data` has its crop.
      keep: number of predictions to return, spread over the split; a
        classifier's are all kept.
      watchers: `add(image)` gets every `ImageResult` or `ClassResult` of this
        host; `gather()`, called on all hosts after the last image, joins the
        hosts' results.
      with_loss: whether to compute `Evaluation.loss`; not with a protocol. A
        classifier's is always computed.
      measure: gives what is summed in `measured` of the result, where logits
        decide; a function of arrays.
    """
    self._config, self._split, self._watchers = config, split, watchers
    self._protocol = protocol
    # Hosts' batches differ in shape and number: no program may span hosts.
    self._mesh = sharding.local_mesh()
    wanted = config.eval.batch_size
    self.batch_size = sharding.divisible_batch_size(wanted, self._mesh)
    classes, self._kept = split.labels.classes, []
    options = {
      'mesh': self._mesh,
      'dtype': at_least_float32(config.model.dtype),
      'measure': measure,
      # Looked up late: each call has a progress bar of its own.
      'on_compile': lambda height, width: self._notice(height, width),
    }
    if config_keys.classifies(config):
      if protocol:
        options['normalization'] = protocol.normalization
      self._task = functools.partial(Classification, classes)
      self._step = steps.make_class_step(model, len(classes), **options)
      return
    self._kept = drawing.spread(len(split), keep)
    options |= {'protocol': protocol, 'with_loss': with_loss}
    self._step = steps.make_eval_step(model, len(classes), **options)
    self._task = functools.partial(
      Segmentation,
      classes,
      config.eval.fscore_beta,
      # Label maps stay on the device if nobody looks at them.
      with_maps=bool(self._kept or watchers),
    )

  def __call__(
    self, variables: Any, waiting: Waiting = contextlib.nullcontext
  ) -> Any:
    """Evaluates one set of weights; every host has to call it.

    `variables` are `params` and `batch_stats`, on the host or on devices.
    `waiting` makes a context from the batches; the images are evaluated in it.
    Returns an `Evaluation`, or a `ClassEvaluation` of a classifier. Raises
    `UserError` if data cannot be used, or the device has too little memory.
    """
    predictions = {}

    def look(image: Any) -> None:
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
        self._task(),
        len(self._split),
        progress=progress,
        on_image=look,
      )
    # All hosts have the same watchers, so that their exchanges match.
    for watcher in self._watchers:
      watcher.gather()
    if not self._kept:
      return evaluation
    kept = dict(collections.ChainMap(*messages.gather(lambda: predictions)))
    return dataclasses.replace(evaluation, predictions=kept)


def evaluate(
  step: steps.EvalStep,
  variables: Any,
  batches: Iterable[steps.Batch],
  task: Any,
  num_images: int,
  *,
  progress: rich.progress.Progress | None = None,
  on_image: Callable[[Any], None] | None = None,
) -> Any:
  """Evaluates every image of a split once; every process has to call it.

  `step` is from `inference.steps`, and `task`, a new `Segmentation` or
  `Classification`, says what is counted. `batches` are this process' share of
  the `num_images` of the split, maybe none; empty slots have index -1.
  `on_image` gets the result of each of its images. Returns what the task's
  `join` makes of the counts of all processes. Raises `UserError` if a label is
  no class, or another process failed.
  """
  started = time.perf_counter()
  total = len(messages.share(num_images))
  bar = progress and progress.add_task('evaluate', total=total)

  def count_mine():
    counted = []
    run = functools.partial(step, variables)
    for batch, outputs in steps.run_ahead(run, batches):
      for result in task.read(batch, outputs):
        counted.append((result.index, result.name, task.count(result)))
        if on_image:
          on_image(result)
        if progress:
          progress.advance(bar)
    return task.total, counted

  # A host that fails in here tells the others.
  parts = messages.gather(count_mine)
  seen = {}
  for index, name, counts in (each for _, mine in parts for each in mine):
    if index in seen:
      raise RuntimeError(f'image {index} ({name}) came twice')
    seen[index] = name, counts
  if len(seen) != num_images:
    raise RuntimeError(
      f'the pipeline gave {len(seen)} images, the split has {num_images}'
    )
  # By position: batches come in another order for every batch size.
  by_position = [seen[index] for index in sorted(seen)]
  names, counts = ([x[i] for x in by_position] for i in (0, 1))
  seconds = time.perf_counter() - started
  return task.join([total for total, _ in parts], counts, names, seconds)
