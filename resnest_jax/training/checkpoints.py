"""Checkpoints with Orbax: written in the background, found again, checked.

A checkpoint holds three items: `model` (params and batch_stats), `optimizer`
(step and its state) and `about`, JSON that says where the run stood and what
the weights are (configuration, dilation rule, position in the data). Orbax
writes into a temporary folder and renames it, so what carries a step's number
is whole.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from resnest_jax.errors import UserError
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.training.step import TrainState
from resnest_jax.weights.files import SAFETENSORS, TORCH
from resnest_jax.weights.state_dict import variable_shapes

METRIC = 'mIoU'


def checkpoint_dir(workdir: Path) -> Path:
  """Where a run keeps its checkpoints (Orbax wants an absolute path)."""
  return Path(workdir).absolute() / 'checkpoints'


def has_checkpoint(workdir: Path) -> bool:
  """Whether a training has left a whole checkpoint there."""
  folder = checkpoint_dir(workdir)
  return folder.is_dir() and any(x.name.isdigit() for x in folder.iterdir())


def open_checkpoints(
  workdir: Path, *, keep: int = 1, read_only: bool = False
) -> ocp.CheckpointManager:
  """Opens a run's checkpoints.

  Args:
    workdir: the run's folder.
    keep: how many of the newest stay; the one with the best mIoU stays too.
    read_only: nothing is created or removed.
  """
  policy = checkpoint_managers.AnyPreservationPolicy(
    [
      checkpoint_managers.LatestN(keep),
      checkpoint_managers.BestN(
        get_metric_fn=lambda metrics: metrics[METRIC],
        n=1,
        keep_checkpoints_without_metrics=False,
      ),
    ]
  )
  options = ocp.CheckpointManagerOptions(
    best_fn=lambda metrics: metrics[METRIC],
    preservation_policy=policy,
    create=not read_only,
    read_only=read_only,
    cleanup_tmp_directories=not read_only,
  )
  return ocp.CheckpointManager(
    checkpoint_dir(workdir),
    options=options,
    item_handlers={
      'model': ocp.StandardCheckpointHandler(),
      'optimizer': ocp.StandardCheckpointHandler(),
      'about': ocp.JsonCheckpointHandler(),
    },
  )


def save(
  manager: ocp.CheckpointManager,
  state: TrainState,
  about: Mapping[str, Any],
  metrics: Mapping[str, float] | None = None,
) -> None:
  """Starts writing a checkpoint; returns once the state may change again.

  Args:
    manager: from `open_checkpoints`.
    state: what to write; its step is the checkpoint's number.
    about: JSON-able description.
    metrics: of an evaluation of this state, with 'mIoU'; None without one.
  """
  manager.save(
    int(state.step),
    args=ocp.args.Composite(
      model=ocp.args.StandardSave(state.variables()),
      optimizer=ocp.args.StandardSave(_optimizer_item(state)),
      about=ocp.args.JsonSave(dict(about)),
    ),
    metrics=dict(metrics) if metrics else None,
  )


def _optimizer_item(state: TrainState) -> dict[str, Any]:
  return {'step': state.step, 'opt_state': state.opt_state}


def restore(
  manager: ocp.CheckpointManager, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]]:
  """The newest checkpoint, placed as `abstract` says.

  Args:
    manager: holds at least one checkpoint.
    abstract: from `abstract_state`.

  Returns:
    The state, and the checkpoint's `about`.

  Raises:
    UserError: the weights are those of another network, or damaged.
  """
  restored = _read(
    manager,
    manager.latest_step(),
    model=abstract.variables(),
    optimizer=_optimizer_item(abstract),
  )
  return TrainState(**restored.model, **restored.optimizer), restored.about


def find_step(manager: ocp.CheckpointManager, which: str | int) -> int:
  """The number of the checkpoint that is meant.

  Args:
    manager: of the run.
    which: 'latest', 'best' (by mIoU of the periodic evaluations), or a step.

  Raises:
    UserError: there is none such; the message lists those that are there.
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
    evaluated = [step for step in steps if manager.metrics(step)]
    if not evaluated:
      raise UserError(
        f'no checkpoint in {manager.directory} was evaluated in training; '
        f'choose one by its step: {", ".join(map(str, steps))}.'
      )
    return max(evaluated, key=lambda step: manager.metrics(step)[METRIC])
  if str(which).isdigit() and int(which) in steps:
    return int(which)
  raise UserError(
    f"there is no checkpoint {which!r}; accepted are 'latest', 'best', "
    f'{", ".join(map(str, steps))}.'
  )


def restore_variables(
  workdir: Path, which: str | int, abstract: Mapping[str, Any]
) -> tuple[dict[str, Any], int, dict[str, Any]]:
  """Weights and running statistics alone, for evaluation and prediction.

  Args:
    workdir: of the run.
    which: 'latest', 'best' or a step.
    abstract: {'params', 'batch_stats'} as `jax.ShapeDtypeStruct`s, with
      shardings where they shall be placed.

  Returns:
    The variables, the checkpoint's step and its `about`.

  Raises:
    UserError: no such checkpoint, one of another network, or damaged.
  """
  _check_is_run(workdir)
  with open_checkpoints(workdir, read_only=True) as manager:
    step = find_step(manager, which)
    restored = _read(manager, step, model=dict(abstract))
  return restored.model, step, restored.about


def load_checkpoint(
  workdir: Path, which: str | int = 'latest'
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
  """A trained model, ready to apply.

  Args:
    workdir: of the run.
    which: 'latest', 'best' or a step.

  Returns:
    The `Segmentor`, its variables, and the checkpoint's `about`: `config`,
    `classes`, `palette`, `step` and more.

  Raises:
    UserError: no such checkpoint, or a damaged one.
  """
  _check_is_run(workdir)
  with open_checkpoints(workdir, read_only=True) as manager:
    step = find_step(manager, which)
    about = _read(manager, step).about
    if 'config' not in about:
      raise UserError(
        f'checkpoint {manager.directory / str(step)} has no configuration, so '
        'its network is not known; train.py of this version writes one.'
      )
    model = create_segmentor(about['config']['model'])
    restored = _read(manager, step, model=variable_shapes(model))
  return model, restored.model, about | {'step': step}


def check_classes(about: Mapping[str, Any], classes: Sequence[str]) -> None:
  """Raises `UserError` if a checkpoint's classes are not these, in order."""
  there = about.get('classes', list(classes))
  if there != list(classes):
    first = next(
      f'{theirs} there, {ours} now'
      for theirs, ours in itertools.zip_longest(there, classes)
      if theirs != ours
    )
    raise UserError(
      f'the checkpoint was trained with other classes ({first}). Their names '
      'and order are part of a run: restore them, or train in another '
      '--workdir.'
    )


def _check_is_run(workdir: Path) -> None:
  if checkpoint_dir(workdir).is_dir():
    return
  if any((Path(workdir) / name).is_file() for name in (SAFETENSORS, TORCH)):
    raise UserError(
      f'{workdir} holds no run but converted weights: eval.py and predict.py '
      'take them with --weights, Python with '
      f"rj.load_pretrained('{workdir}')."
    )
  raise UserError(
    f'{workdir} holds no run (it has no folder "checkpoints"); train first, '
    'or give the --workdir that was given to train.py.'
  )


def _read(manager: ocp.CheckpointManager, step: int, **abstract: Any) -> Any:
  """Restores items as they are described, and `about`."""
  items = {
    name: ocp.args.StandardRestore(item) for name, item in abstract.items()
  }
  try:
    if 'model' in abstract:
      _check_shapes(manager, step, abstract['model'])
    return manager.restore(
      step, args=ocp.args.Composite(about=ocp.args.JsonRestore(), **items)
    )
  except UserError:
    raise
  except Exception as error:  # Orbax and TensorStore have no common type.
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(
      f'checkpoint {manager.directory / str(step)} cannot be read '
      f'({reason[0][:200]}). It is damaged; move this folder away to use the '
      'checkpoint before it.'
    ) from error


def _check_shapes(
  manager: ocp.CheckpointManager, step: int, abstract: Mapping[str, Any]
) -> None:
  """Compares names and shapes before anything is read."""
  stored = manager.item_metadata(step)['model']
  if stored is None:
    raise UserError(
      f'{manager.directory / str(step)} holds no model; it is damaged or not '
      'a checkpoint of train.py. Remove this folder to use the one before.'
    )
  there, wanted = _shapes(stored), _shapes(abstract)
  differ = [
    f'{name}: {there.get(name, "absent")} there, '
    f'{wanted.get(name, "absent")} in the configuration'
    for name in sorted(there.keys() | wanted.keys())
    if there.get(name) != wanted.get(name)
  ]
  if differ:
    raise UserError(
      f'checkpoint {manager.directory / str(step)} is of another network than '
      f'the configuration: {len(differ)} arrays differ ({"; ".join(differ[:3])}'
      f'{"; ..." if len(differ) > 3 else ""}). Give the --config and the '
      '--config.model flags it was trained with.'
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    '/'.join(str(getattr(key, 'key', key)) for key in path): tuple(leaf.shape)
    for path, leaf in leaves
  }
