"""Whose a workdir is: one run, one configuration, one process."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from resnest_jax import runtime
from resnest_jax.checkpoints import store
from resnest_jax.config import config_to_json, differences, flatten
from resnest_jax.config_keys import FREE_KEYS, HOST_KEYS
from resnest_jax.distributed import messages
from resnest_jax.errors import UserError, writing
from resnest_jax.files import write_text

# Pixels of each class in each sample, where the sampling asks for them.
CLASS_COUNTS = 'class_pixels.npy'


def same_on_all_hosts(config: ConfigDict) -> dict[str, Any]:
  """What `host_join.joined` compares: configuration and versions."""
  flat = {
    f'config.{key}': value
    for key, value in flatten(config).items()
    if key not in HOST_KEYS
  }
  return flat | runtime.versions()


def claim_workdir(workdir: Path, config: ConfigDict) -> contextlib.ExitStack:
  """Locks the workdir and writes the configuration into it.

  What was started there with another configuration and left no checkpoint has
  nothing to lose: its logs and counts are removed. Of several hosts the first
  one does that, and the others look whether they see it.

  Raises:
    UserError: another process trains there, or the folder has checkpoints of
      another configuration, or files of something else, or is not shared.
  """
  if not messages.is_first():
    return _find_shared(workdir, config)
  with runtime.lock_folder(workdir, 'trains in') as lock:
    _write_config(workdir, config)
    return lock.pop_all()  # Held where nothing was raised.


def _write_config(workdir: Path, config: ConfigDict) -> None:
  """Compares the configuration with an earlier start's, and writes it."""
  saved = workdir / 'config.json'
  begun = store.has_checkpoint(workdir)
  if saved.exists():
    lines = differences(_read_saved(saved), config, FREE_KEYS)
    if lines and begun:
      raise UserError(
        f'{workdir} belongs to a run of another configuration '
        f'({"; ".join(lines)}). Choose another --workdir, or give the flags '
        'it was started with.'
      )
    if lines:
      more = f'; and {len(lines) - 3} more' if len(lines) > 3 else ''
      print(
        f'{workdir} holds a start without a checkpoint, of another '
        f'configuration; beginning anew with this one '
        f'({"; ".join(lines[:3])}{more})',
        flush=True,
      )
      _remove_start(workdir)
  elif begun:
    raise UserError(
      f'{workdir} holds checkpoints but no config.json; choose another '
      '--workdir.'
    )
  with writing(saved):
    write_text(saved, config_to_json(config))


def _find_shared(workdir: Path, config: ConfigDict) -> contextlib.ExitStack:
  """Waits for the configuration that the first host has written there."""
  saved = workdir / 'config.json'
  for _ in range(30):  # Network file systems show new files late.
    with contextlib.suppress(OSError):
      if not differences(saved.read_text('utf-8'), config, FREE_KEYS):
        return contextlib.ExitStack()
    time.sleep(1)
  raise UserError(
    f'{workdir} is not the folder that host 0 writes to. Give a --workdir on '
    'a file system that all hosts share.'
  )


def _read_saved(path: Path) -> str:
  """The configuration of an earlier start, as it was written."""
  text = path.read_text('utf-8')
  try:
    if json.loads(text).keys() >= {'model', 'data', 'train'}:
      return text
  except (ValueError, AttributeError):
    pass
  raise UserError(
    f'{path} is there and was not written by train.py, or is damaged; choose '
    'another --workdir.'
  )


def _remove_start(workdir: Path) -> None:
  """Removes what would mix with a run of another configuration."""
  events = (workdir / 'tensorboard').glob('events.out.tfevents.*')
  for path in (workdir / 'log.jsonl', workdir / CLASS_COUNTS, *events):
    path.unlink(missing_ok=True)
