"""From where a run goes on, and what it leaves if it is stopped in between.

A regular checkpoint belongs to the run's plan (`train.checkpoint_steps`). The
state that a stopped run leaves does not: it lies in a folder of its own, so
that the checkpoints of a run are the same however often it was stopped, and
an evaluation that was cut off writes the checkpoint that it would have
written.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnest_jax import hosts
from resnest_jax.errors import DamagedCheckpoint, UserError
from resnest_jax.training import checkpoints
from resnest_jax.training.checkpoints import Checkpoints
from resnest_jax.training.step import TrainState

DAMAGED = 'damaged_checkpoints'


def save_interrupted(
  workdir: Path, state: TrainState, about: Mapping[str, Any]
) -> None:
  """Writes the state of a run that stops; returns when it is there.

  Args:
    workdir: of the run.
    state: after its last finished step.
    about: as in a checkpoint, with what else the next start has to know.

  Raises:
    UserError: the system refused it.
  """
  folder = checkpoints.interrupted_dir(workdir)
  manager = Checkpoints(folder, keep=1, read_only=False)
  try:
    checkpoints.save(manager, state, about)
    manager.finish()
  finally:
    manager.close()


def drop_superseded(workdir: Path, number: int = 1) -> None:
  """Removes an interrupted state if `number` checkpoints are as new as it."""
  if not hosts.is_first():
    return
  folder = checkpoints.interrupted_dir(workdir)
  regular = checkpoints.steps_in(checkpoints.checkpoint_dir(workdir))
  newest = max(checkpoints.steps_in(folder), default=0)
  if folder.is_dir() and sum(step >= newest for step in regular) >= number:
    shutil.rmtree(folder)


def restore_newest(
  workdir: Path, manager: Checkpoints, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
  """The newest state that can be read; damaged ones are moved aside.

  Args:
    workdir: of the run.
    manager: its checkpoints.
    abstract: from `abstract_state`.

  Returns:
    The state and its `about`, or None if there is none at all.

  Raises:
    UserError: all are damaged, or of another network.
  """
  # Of the same step the regular one, which was saved after its evaluation.
  found = sorted(
    (step, folder == manager.directory, folder)
    for folder in (manager.directory, checkpoints.interrupted_dir(workdir))
    for step in checkpoints.steps_in(folder)
  )
  if not found:
    return None
  damaged: list[tuple[Path, DamagedCheckpoint]] = []
  for step, is_regular, folder in reversed(found):
    try:
      if is_regular:
        restored = checkpoints.restore(manager, step, abstract)
      else:
        with Checkpoints(folder, keep=1, read_only=True) as interrupted:
          restored = checkpoints.restore(interrupted, step, abstract)
      break
    except DamagedCheckpoint as error:
      damaged.append((folder / str(step), error))
  else:
    raise UserError(
      f'all {len(found)} checkpoints of {workdir} are damaged; of the newest: '
      f'{damaged[0][1]} To begin anew, choose another --workdir.'
    )
  hosts.wait_for_all('restored')  # Before anything is moved.
  with hosts.first_goes_ahead('damaged checkpoints'):
    for path, error in damaged if hosts.is_first() else ():
      aside = _move_aside(path, workdir / DAMAGED)
      reason = str(error).partition(' train.py goes on')[0]
      print(f'{reason} Moved to {aside}', flush=True)
  manager.reload()
  return restored


def _move_aside(path: Path, folder: Path) -> Path:
  """Moves a checkpoint to where nothing of that name is yet."""
  folder.mkdir(exist_ok=True)
  target, number = folder / path.name, 1
  while target.exists():
    number += 1
    target = folder / f'{path.name}-{number}'
  return path.rename(target)
