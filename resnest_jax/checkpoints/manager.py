"""The checkpoints in a folder, with Orbax: written in the background, checked.

A checkpoint has three items. `model` is what is evaluated: params and
batch_stats, or their moving averages. `optimizer` is what training needs
besides: the step, the optimizer's state, and with moving averages the trained
variables. `about` is JSON: configuration, classes, dilation rule, position in
the data, scores, and checksums of everything. Orbax writes into a temporary
folder and renames it, so a folder with a step's number was whole once; the
checksums tell whether it still is.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from resnest_jax.checkpoints.integrity import (
  json_digest,
  read_about,
  read_items,
  shapes_digest,
  tree_digest,
)
from resnest_jax.checkpoints.state import TrainState
from resnest_jax.errors import DamagedCheckpoint, UserError, writing
from resnest_jax.models.stacking import stack, stacked, unstack

METRIC = 'mIoU'


def steps_in(folder: Path) -> list[int]:
  """The steps of the whole checkpoints in a folder, in order."""
  names = [x.name for x in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


class Checkpoints(ocp.CheckpointManager):
  """The checkpoints in a folder.

  Attributes:
    scores: step -> mIoU of the checkpoints that were evaluated.
  """

  # Scores lie in `about`, under its checksum. With Orbax's own metrics one
  # damaged file of theirs would keep the whole folder from being opened.

  def __init__(self, folder: Path, keep: int, read_only: bool):
    """Opens the folder, an absolute path.

    Args:
      folder: is created unless it is only read.
      keep: so many of the newest stay, and the one with the best mIoU.
      read_only: nothing is created or removed.
    """
    self.scores: dict[int, float] = {}
    self._told = False  # A refused write was raised already.
    for step in steps_in(folder):
      try:
        metrics = read_about(folder / str(step))['metrics']
      except DamagedCheckpoint:
        continue
      if metrics:
        self.scores[step] = metrics[METRIC]
    policies = [checkpoint_managers.LatestN(keep), _Best(self.scores)]
    with writing(folder):
      super().__init__(
        folder,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=checkpoint_managers.AnyPreservationPolicy(
            policies
          ),
          create=not read_only,
          read_only=read_only,
          cleanup_tmp_directories=not read_only,
        ),
        item_handlers={
          'model': _array_handler(),
          'optimizer': _array_handler(),
          'about': ocp.JsonCheckpointHandler(),
        },
      )

  @contextlib.contextmanager
  def writing(self) -> Iterator[None]:
    try:
      with writing(self.directory):
        yield
    except UserError:
      self._told = True
      raise

  def finish(self) -> None:
    """Waits until all is written; raises `UserError` if that is refused."""
    with self.writing():
      self.wait_until_finished()

  def close(self) -> None:
    """Waits as `finish` does, and closes; raises no refusal a second time."""
    told = self._told
    try:
      with self.writing():
        super().close()
    except UserError:
      if not told:
        raise

  def check(self) -> None:
    """Raises what `finish` would raise by now; does not wait."""
    if not self.is_saving_in_progress():
      self.finish()


class _Best(checkpoint_managers.PreservationPolicy):
  """Keeps the checkpoint of the best score, the first among equals."""

  def __init__(self, scores: Mapping[int, float]):
    self._scores = scores

  def should_preserve(self, checkpoints, *, context):
    del context
    steps = [info.step for info in checkpoints]
    scored = [step for step in steps if step in self._scores]
    best = best_step(self._scores, scored) if scored else None
    return [step == best for step in steps]


def best_step(scores: Mapping[int, float], steps: Sequence[int]) -> int:
  """The step with the highest score, the first among equals."""
  return max(sorted(steps), key=lambda step: scores[step])


def save(
  manager: Checkpoints,
  state: TrainState,
  about: Mapping[str, Any],
  metrics: Mapping[str, float] | None = None,
) -> None:
  """Starts writing a checkpoint; returns once the state may be donated.

  Args:
    manager: of the folder.
    state: its step is the checkpoint's number.
    about: JSON-able description.
    metrics: of an evaluation of this state, with 'mIoU'; None without one.

  Raises:
    UserError: this checkpoint, or the one before it, cannot be written.
  """
  # Files have each block by its name, so that they do not depend on which
  # platform stacks blocks.
  step, counts = int(state.step), stacked(state.params)
  optimizer = unstack(_optimizer_item(state), counts)
  variables = unstack(state.eval_variables(), counts)
  about = dict(about) | {'metrics': dict(metrics) if metrics else None}
  digests = {
    'model': tree_digest(variables),
    'optimizer': tree_digest(optimizer),
    'shapes': shapes_digest(variables),
    'optimizer_shapes': shapes_digest(optimizer),
  }
  # The digest is of what will be read: JSON knows no tuples, and only strings
  # as keys.
  about = json.loads(json.dumps(about | {'digests': digests}))
  about['digest'] = json_digest(about)
  if metrics:
    manager.scores[step] = metrics[METRIC]
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
  # Each array is written by the first device that has it. By default Orbax has
  # every device write a slice of a replicated array, and XLA compiles a program
  # for each shape of a slice: seconds at the first save.
  handlers = ocp.type_handlers
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=handlers.create_type_handler_registry(
      (jax.Array, handlers.ArrayHandler(use_replica_parallel=False)),
      (np.ndarray, handlers.NumpyHandler()),
      (np.number, handlers.ScalarHandler()),
      (int, handlers.ScalarHandler()),
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
  restored, about = read_items(
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
    state = jax.tree.map(
      lambda x, wanted: jax.make_array_from_process_local_data(
        wanted.sharding, np.asarray(x)
      ),
      stack(jax.device_get(state), counts),
      abstract,
    )
  return state, about


def find_step(manager: Checkpoints, which: str | int) -> int:
  """The step of 'latest', of 'best' (by mIoU), or the step itself.

  Raises:
    UserError: there is no such checkpoint; the message lists them.
  """
  steps = sorted(manager.all_steps())
  if not steps:
    raise UserError(
      f'there is no checkpoint in {manager.directory}; train first, with the '
      'same --config and --workdir.'
    )
  if which == 'latest':
    return steps[-1]
  if which == 'best':
    evaluated = [step for step in steps if step in manager.scores]
    if not evaluated:
      raise UserError(
        f'no checkpoint in {manager.directory} was evaluated in training; '
        f'choose one by its step: {", ".join(map(str, steps))}.'
      )
    return best_step(manager.scores, evaluated)
  if str(which).isdigit() and int(which) in steps:
    return int(which)
  raise UserError(
    f"there is no checkpoint {which!r}; accepted are 'latest', 'best', "
    f'{", ".join(map(str, steps))}.'
  )
