"""The checkpoints of a run: where they are, how it resumes, how it is read.

The state that a stopped run leaves lies in a folder of its own, so that the
checkpoints of a run are the same however often it was stopped.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from resnest_jax.checkpoints.integrity import read_about, read_items
from resnest_jax.checkpoints.manager import (
  Checkpoints,
  find_step,
  restore,
  save,
  steps_in,
)
from resnest_jax.checkpoints.state import Run, TrainState, unlogged_scalars
from resnest_jax.config import config_to_json
from resnest_jax.data.datasets import CLASSES, FILES
from resnest_jax.distributed import messages
from resnest_jax.errors import DamagedCheckpoint, UserError
from resnest_jax.files import remove_folder
from resnest_jax.labels import LabelSet
from resnest_jax.models.classifier import create_network, described
from resnest_jax.models.description import check_network
from resnest_jax.models.initial import variable_shapes
from resnest_jax.text import differing, listed
from resnest_jax.untrusted import OBJECT, check_fields

DAMAGED = 'damaged_checkpoints'


def checkpoint_dir(workdir: Path) -> Path:
  """The folder of a run's checkpoints, absolute as Orbax wants it."""
  return Path(workdir).absolute() / 'checkpoints'


def interrupted_dir(workdir: Path) -> Path:
  """The folder of the state that a stopped run leaves."""
  return Path(workdir).absolute() / 'interrupted'


def open_checkpoints(
  workdir: Path, *, keep: int = 1, read_only: bool = False
) -> Checkpoints:
  """Opens a run's regular checkpoints; see `Checkpoints`."""
  return Checkpoints(checkpoint_dir(workdir), keep, read_only)


def has_checkpoint(workdir: Path) -> bool:
  """Whether a training has left a state from which it can resume."""
  return bool(_states(workdir))


def _states(workdir: Path) -> list[tuple[int, bool, Path]]:
  """Step, whether it is a regular checkpoint, and folder; the newest first."""
  # Of two states of one step the regular one was saved after its evaluation.
  regular, other = checkpoint_dir(workdir), interrupted_dir(workdir)
  found = ((x, folder) for folder in (regular, other) for x in steps_in(folder))
  return sorted(((x, y == regular, y) for x, y in found), reverse=True)


def data_of(workdir: Path) -> dict[str, Any]:
  """The facts of the data that the newest readable state of a run has."""
  for step, _, folder in _states(workdir):
    with contextlib.suppress(DamagedCheckpoint):
      return read_about(folder / str(step)).get('data', {})
  return {}


class Store(contextlib.AbstractContextManager):
  """Writes the checkpoints of a run, and finds the newest that is whole."""

  def __init__(
    self,
    workdir: Path,
    config: ConfigDict,
    labels: LabelSet,
    data: Mapping[str, Any],
  ):
    """`data`: facts of what the run reads, which a resume compares."""
    self._workdir, self._train = workdir, config.train
    self._about = {
      'config': json.loads(config_to_json(config)),
      'classes': list(labels.classes),
      'palette': labels.palette.tolist(),
      'dilation_rule': config.model.dilation_rule,
      'data': dict(data),
    }
    # What `resume` finds to be other data than the checkpoint's, in words.
    self.changes: list[str] = []
    keep = config.train.keep_checkpoints
    self._manager = open_checkpoints(workdir, keep=keep)
    self._proved = False  # That what is written here can be read.

  def resume(self, abstract: TrainState) -> Run:
    """The newest state that is whole; damaged ones are moved aside.

    Raises `UserError` if all are, or are of another network or other classes.
    """
    state, about = restore_newest(self._workdir, self._manager, abstract)
    self._proved = True
    check_classes(about, self._about['classes'])
    self.changes = data_changes(about.get('data', {}), self._about['data'])
    run = Run(state, step=int(state.step), saved_step=int(state.step))
    run.best, run.stale = about['best'], about.get('stale', 0)
    # The state of an interrupted run also has the scalars that no log line has.
    run.unlogged.extend(about.get('unread', ()))
    run.evaluating = about.get('evaluating', False)
    # A kill may have come before `finish` did it.
    if run.is_over(self._train):
      drop_superseded(self._workdir)
    return run

  def save(self, run: Run, metrics: Mapping[str, float] | None) -> None:
    # The interrupted state stays until two checkpoints are as new as it: should
    # the newest one be damaged, the run resumes from the one before.
    drop_superseded(self._workdir, 2)
    # Early: a fault of the place would spoil all that follow.
    if not self._proved and run.saved_step:
      self._prove()
    save(self._manager, run.state, self._describe(run), metrics)

  def save_interrupted(self, run: Run) -> None:
    # Called from the stopper's thread, or between two steps.
    self._manager.finish()
    if run.step > run.saved_step:
      more = {'unread': unlogged_scalars(run), 'evaluating': run.evaluating}
      save_interrupted(self._workdir, run.state, self._describe(run) | more)

  def check(self) -> None:
    self._manager.check()

  def finish(self) -> None:
    self._prove()
    drop_superseded(self._workdir)

  def _prove(self) -> None:
    """Reads the newest checkpoint back; raises `UserError` if it cannot."""
    self._manager.finish()
    newest = self._manager.latest_step()
    try:
      read_items(self._manager, newest, model=None, optimizer=None)
    except DamagedCheckpoint as error:
      raise UserError(
        f'{error.why}, just after it was written. See whether the storage is '
        'in order; the same command then resumes from the checkpoint before, '
        'and another --workdir begins anew.'
      ) from error
    self._proved = True

  def __exit__(self, *_: Any) -> None:
    self._manager.close()

  def _describe(self, run: Run) -> dict[str, Any]:
    where = {'step': run.step, 'position': run.step * self._train.batch_size}
    return self._about | {'best': run.best, 'stale': run.stale, **where}


def save_interrupted(
  workdir: Path, state: TrainState, about: Mapping[str, Any]
) -> None:
  folder = interrupted_dir(workdir)
  with Checkpoints(folder, keep=1, read_only=False) as manager:
    save(manager, state, about)
    manager.finish()


def drop_superseded(workdir: Path, number: int = 1) -> None:
  """Removes an interrupted state if `number` checkpoints are as new as it."""
  if not messages.is_first():
    return
  folder = interrupted_dir(workdir)
  regular = steps_in(checkpoint_dir(workdir))
  newest = max(steps_in(folder), default=0)
  if folder.is_dir() and sum(step >= newest for step in regular) >= number:
    remove_folder(folder)


def restore_newest(
  workdir: Path, manager: Checkpoints, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]]:
  """The newest state that is whole, and its `about`; see `Store.resume`."""
  damaged: list[tuple[Path, DamagedCheckpoint]] = []
  for step, _, folder in (found := _states(workdir)):
    try:
      with Checkpoints(folder, keep=1, read_only=True) as opened:
        restored = restore(opened, step, abstract)
      break
    except DamagedCheckpoint as error:
      damaged.append((folder / str(step), error))
  else:
    raise UserError(
      f'all {len(found)} checkpoints of {workdir} are damaged; of the newest: '
      f'{damaged[0][1].why}. To begin anew, choose another --workdir.'
    )
  # All hosts have read before the first one moves anything.
  messages.wait_for_all('restored')
  with messages.first_goes_ahead('damaged checkpoints'):
    for path, error in damaged if messages.is_first() else ():
      aside = _move_aside(path, workdir / DAMAGED)
      print(f'{error.why}. Moved to {aside}', flush=True)
  manager.reload()
  return restored


def _move_aside(path: Path, folder: Path) -> Path:
  folder.mkdir(exist_ok=True)
  target, number = folder / path.name, 1
  while target.exists():
    number += 1
    target = folder / f'{path.name}-{number}'
  return path.rename(target)


def load_checkpoint(
  workdir: Path,
  which: str | int = 'latest',
  model_config: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
  """A trained model, ready to apply.

  Args:
    workdir: the folder of a run.
    which: 'latest', 'best' (by mIoU or top1 in the training) or a step.
    model_config: `config.model` of another network with the same arrays, to be
      built instead.

  Returns:
    The `Segmentor` or `Classifier`, its variables, and the checkpoint's
    `about`: `config`, `classes`, `palette`, `step` and more.

  Raises:
    UserError: no such checkpoint, one of another network, or a damaged one.
  """
  with opened(workdir, which) as (manager, step, about):
    if model_config is None:
      where = f'the configuration in checkpoint {step} of {workdir}'
      check_fields(about, {'config': OBJECT}, where)
      check_fields(about['config'], {'model': OBJECT, 'data': OBJECT}, where)
      model_config = about['config']['model']
      check_network(model_config, described(model_config)[0], where)
    model = create_network(model_config)
    # Else Orbax would look for the devices that wrote it.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = variable_shapes(model)
    placed = jax.tree.map(lambda x: x.update(sharding=here), shapes)
    restored, _ = read_items(manager, step, model=placed)
  return model, restored['model'], about | {'step': step}


@contextlib.contextmanager
def opened(
  workdir: Path, which: str | int
) -> Iterator[tuple[Checkpoints, int, dict[str, Any]]]:
  """A run's checkpoints, the step of one of them, and its `about`."""
  if not checkpoint_dir(workdir).is_dir():
    places = Path(workdir), checkpoint_dir(workdir)
    absent = next(place for place in places if not place.is_dir())
    raise UserError(
      f'{workdir} holds no run (there is no folder {absent}). Train first, '
      'or give the --workdir that was given to train.py; published and '
      'converted weights are read with --weights, in Python with '
      f"rj.load_pretrained('{workdir}')."
    )
  with open_checkpoints(workdir, read_only=True) as manager:
    step = find_step(manager, which)
    yield manager, step, read_about(manager.folder / str(step))


def check_classes(about: Mapping[str, Any], classes: Sequence[str]) -> None:
  """Raises `UserError` if a checkpoint's classes are not these, in order."""
  there = about.get('classes') or list(classes)
  if there != list(classes):
    missing = [name for name in there if name not in classes]
    new = [name for name in classes if name not in there]
    said = [f'missing now: {listed(missing, 3)}'] if missing else []
    said += [f'new: {listed(new, 3)}'] if new else []
    pairs = zip(there, classes, strict=False)
    said = said or [f'{x} there, {y} now' for x, y in pairs if x != y][:1]
    head = about.get('config', {}).get('model', {}).get('head')
    raise UserError(
      f'the checkpoint was trained with other classes ({"; ".join(said)}). '
      'Their names and order are part of a run: restore them, or train in '
      f'another --workdir{f" (it has model.head={head})" if head else ""}.'
    )


def data_changes(
  there: Mapping[str, Any], here: Mapping[str, Any]
) -> list[str]:
  """What differs in the data now; `UserError` for other values of classes."""
  # Earlier versions wrote less or nothing.
  changes = differing({**here, **there}, here, 'before', 'now')
  for line in changes:
    if line.startswith(CLASSES):
      raise UserError(
        f'the checkpoint was trained with other mask values ({line}). They are '
        'part of a run: restore the classes file, or train in another '
        '--workdir.'
      )
  # Fingerprints tell nobody anything.
  return [re.sub(f'({FILES}.*):.*', r'\1 have changed', x) for x in changes]
