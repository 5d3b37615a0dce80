"""The checkpoints in a folder, with Orbax: written in the background, checked.

A checkpoint has three items. `model` is what is evaluated: params and
batch_stats, or their moving averages. `optimizer` has the step, the optimizer's
state, and with moving averages the trained variables. `about` is JSON:
configuration, classes, position in the data, scores, and checksums of
everything. Orbax renames a finished folder, so one with a step's number was
whole once; the checksums tell whether it still is.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from resnest_jax.checkpoints import integrity
from resnest_jax.checkpoints.state import TrainState
from resnest_jax.config_keys import main_score_in
from resnest_jax.distributed import messages
from resnest_jax.errors import (
  DamagedCheckpoint,
  NotWrittenInTime,
  UserError,
  writing,
)
from resnest_jax.files import plain_name
from resnest_jax.models.stacking import stack, stacked, unstack
from resnest_jax.sharding import replicate

# Seconds that a write may take. By the clock that a suspended machine stops:
# Orbax's own limit is one of the day's time, which may jump.
PATIENCE = 1200
# Orbax moves checkpoints there, whole, and we delete them: a kill leaves no
# part of one among the others.
DELETED = '.deleted'


def steps_in(folder: Path) -> list[int]:
  """The steps of the whole checkpoints in a folder, in order."""
  names = [x.name for x in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(x) for x in names if x.isascii() and x.isdigit())


class Checkpoints(ocp.CheckpointManager):
  """The checkpoints in `folder`; `scores` has those of evaluated steps.

  Orbax's own `directory` is another name of it where it has special characters.
  """

  # Scores lie in `about`, under its checksum. With Orbax's own metrics one
  # damaged file of theirs would keep the whole folder from being opened.

  def __init__(self, folder: Path, keep: int, read_only: bool):
    """Opens an absolute path; if `read_only` nothing is created or removed.

    The `keep` newest stay, and the one with the best score.
    """
    self.scores: dict[int, float] = {}
    self._deleted = None if read_only else folder / DELETED
    self._told = False  # A refused write was raised already.
    self._stuck = False
    self.folder, self._links = folder, contextlib.ExitStack()
    for step in steps_in(folder):
      with contextlib.suppress(DamagedCheckpoint):
        if metrics := integrity.read_about(folder / str(step))['metrics']:
          self.scores[step] = main_score_in(metrics)
    kept = [policies.LatestN(keep), _Best(self.scores)]
    with writing(folder):
      if not read_only:
        folder.mkdir(parents=True, exist_ok=True)
      name = self._links.enter_context(plain_name(folder))
      options = partial(
        ocp.CheckpointManagerOptions,
        preservation_policy=policies.AnyPreservationPolicy(kept),
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        async_options=ocp.AsyncOptions(
          timeout_secs=7 * 24 * 60 * 60, create_directories_asynchronously=False
        ),
        todelete_subdir=None if read_only else DELETED,
      )
      handlers = {item: _array_handler() for item in ('model', 'optimizer')}
      handlers['about'] = ocp.JsonCheckpointHandler()
      try:
        super().__init__(name, options=options(), item_handlers=handlers)
      # One damaged file of Orbax's, with a step's time, which nobody needs.
      except (TypeError, ValueError, LookupError, AttributeError):
        bare = options(lightweight_initialize=True)
        super().__init__(name, options=bare, item_handlers=handlers)
    self._delete()

  @contextlib.contextmanager
  def writing(self) -> Iterator[None]:
    try:
      with writing(self.folder):
        yield
    except UserError:
      self._told = True
      raise
    except TimeoutError as error:  # Of Orbax, which reads the day's time.
      raise self._not_in_time() from error

  def _not_in_time(self) -> NotWrittenInTime:
    self._stuck = True
    return NotWrittenInTime(
      f'the checkpoint in {self.folder} was not written in time: the '
      'storage hangs, or the clock of this machine was changed. The same '
      'command resumes from the newest checkpoint.'
    )

  def finish(self) -> None:
    """Waits for all writes; raises `UserError` if one is refused."""
    until = time.monotonic() + PATIENCE
    while self.is_saving_in_progress():
      if time.monotonic() > until:
        raise self._not_in_time()
      time.sleep(0.01)
    with self.writing():
      self.wait_until_finished()
    self._delete()

  def close(self) -> None:
    """Waits as `finish` does, and closes; raises no refusal a second time."""
    if self._stuck:
      return
    try:
      with writing(self.folder), self._links:
        super().close()
    except UserError:
      if not self._told:
        raise
    self._delete()

  def _delete(self) -> None:
    if self._deleted and messages.is_first():
      shutil.rmtree(self._deleted, ignore_errors=True)

  def check(self) -> None:
    """Raises what `finish` would raise by now; does not wait."""
    if not self.is_saving_in_progress():
      self.finish()


class _Best(policies.PreservationPolicy):
  def __init__(self, scores: Mapping[int, float]):
    self._scores = scores

  def should_preserve(self, checkpoints, *, context):
    del context
    steps = [info.step for info in checkpoints]
    best = best_step(self._scores, steps)
    return [step == best for step in steps]


def best_step(scores: Mapping[int, float], steps: Sequence[int]) -> int | None:
  """The step with the highest score, the first among equals; None: no score."""
  scored = sorted(step for step in steps if step in scores)
  return max(scored, key=lambda step: scores[step], default=None)


def save(
  manager: Checkpoints,
  state: TrainState,
  about: Mapping[str, Any],
  metrics: Mapping[str, float] | None = None,
) -> None:
  """Starts writing a checkpoint; returns once the state may be donated.

  Its number is the step. `about` is JSON-able, `metrics` are of an evaluation
  of this state, with one of `MAIN_SCORES`. Raises `UserError` if this
  checkpoint, or the one before it, cannot be written.
  """
  manager.finish()
  # Files have each block by its name, whether or not a platform stacks blocks.
  step, counts = int(state.step), stacked(state.params)
  optimizer = unstack(_optimizer_item(state), counts)
  variables = unstack(state.eval_variables(), counts)
  about = dict(about) | {'metrics': dict(metrics) if metrics else None}
  digests = {
    'model': integrity.tree_digest(variables),
    'optimizer': integrity.tree_digest(optimizer),
    'shapes': integrity.json_digest(integrity.shapes(variables)),
    'optimizer_shapes': integrity.json_digest(integrity.shapes(optimizer)),
  }
  # The digest is of what will be read: JSON has no tuples, only string keys.
  about = json.loads(json.dumps(about | {'digests': digests}))
  about['digest'] = integrity.json_digest(about)
  if metrics:
    manager.scores[step] = main_score_in(metrics)
  with manager.writing():
    manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.PyTreeSave(variables),
        optimizer=ocp.args.PyTreeSave(optimizer),
        about=ocp.args.JsonSave(about),
      ),
    )


def _array_handler() -> ocp.PyTreeCheckpointHandler:
  # By default Orbax has every device write a slice of a replicated array, and
  # XLA compiles a program for each shape of a slice: seconds at the first save.
  handlers = ocp.type_handlers
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=handlers.create_type_handler_registry(
      (jax.Array, handlers.ArrayHandler(use_replica_parallel=False)),
      (np.ndarray, handlers.NumpyHandler()),
      (np.number, handlers.ScalarHandler()),
    )
  )


def _optimizer_item(state: TrainState) -> dict[str, Any]:
  item = {'step': state.step, 'opt_state': state.opt_state}
  # With averages these are the item `model`; what they average is here.
  if state.ema is not None:
    item['trained'] = state.variables()
  return item


def restore(
  manager: Checkpoints, step: int, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]]:
  """The state of a checkpoint, placed as `abstract` says, and its `about`.

  Raises:
    DamagedCheckpoint: it is not what was written.
    UserError: the weights belong to another network.
  """
  counts = stacked(abstract.params)
  restored, about = integrity.read_items(
    manager,
    step,
    model=unstack(abstract.eval_variables(), counts),
    optimizer=unstack(_optimizer_item(abstract), counts),
  )
  model, optimizer = restored['model'], dict(restored['optimizer'])
  trained = optimizer.pop('trained', model)
  ema = None if abstract.ema is None else model
  state = TrainState(**trained, **optimizer, ema=ema)
  if counts:
    mesh = abstract.step.sharding.mesh
    state = replicate(stack(jax.device_get(state), counts), mesh)
  return state, about


def find_step(manager: Checkpoints, which: str | int) -> int:
  """The step of 'latest', of 'best' (by mIoU or top1), or the step itself.

  Raises a `UserError` that lists the checkpoints if there is no such one.
  """
  steps = sorted(manager.all_steps())
  if not steps:
    raise UserError(
      f'there is no checkpoint in {manager.folder}; train first, with the '
      'same --config and --workdir.'
    )
  if which == 'latest':
    return steps[-1]
  best = best_step(manager.scores, steps)
  if which == 'best' and best is not None:
    return best
  if str(which) in map(str, steps):
    return int(which)
  evaluated = 'none was' if best is None else "'best' of those that were"
  raise UserError(
    f"there is no checkpoint {which!r}; accepted are 'latest', "
    f'{", ".join(map(str, steps))}, and {evaluated} evaluated in training.'
  )
