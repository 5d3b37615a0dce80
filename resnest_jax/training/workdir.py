"""Claims a workdir for one run: one configuration, one process at a time."""

import contextlib
import shlex
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from resnest_jax import runtime
from resnest_jax.checkpoints import store
from resnest_jax.config import SAVED, config_to_json, differences, flatten
from resnest_jax.config_keys import FREE_KEYS, HOST_KEYS
from resnest_jax.distributed import messages
from resnest_jax.errors import UserError, writing
from resnest_jax.files import write_text
from resnest_jax.text import listed
from resnest_jax.untrusted import OBJECT, check_fields, parse_json

# Pixels of each class in each sample, for samplings that balance classes.
CLASS_COUNTS = 'class_pixels.npy'


def same_on_all_hosts(config: ConfigDict) -> dict[str, Any]:
  """Configuration and versions, which `distributed.join` compares."""
  items = flatten(config).items()
  same = {f'config.{k}': v for k, v in items if k not in HOST_KEYS}
  return same | runtime.versions()


def claim_workdir(workdir: Path, config: ConfigDict) -> contextlib.ExitStack:
  """Locks the workdir and writes the configuration into it.

  Raises `UserError` if another process trains there, if the folder has files of
  something else or checkpoints of another configuration, or is not shared. A
  start that left no checkpoint gives way: its logs are removed.
  """
  if not messages.is_first():
    return _find_shared(workdir, config)
  with runtime.lock_folder(workdir, 'trains in') as lock:
    _write_config(workdir, config)
    return lock.pop_all()  # Held where nothing was raised.


def longer(workdir: Path) -> str:
  """Says how to go on from a run's weights; '' if it has no checkpoint."""
  if not store.steps_in(store.checkpoint_dir(workdir)):
    return ''
  flag = shlex.quote(f'--config.pretrained={workdir}')
  return (
    ' To train longer or with other settings, start another run from its '
    f'weights: a new --workdir and {flag}'
  )


def _write_config(workdir: Path, config: ConfigDict) -> None:
  saved = workdir / SAVED
  begun = store.has_checkpoint(workdir)
  if saved.exists():
    lines = differences(_read_saved(saved), config, FREE_KEYS)
    if lines and begun:
      # Weights fit into the same network only.
      same = not any(line.startswith('model.') for line in lines)
      raise UserError(
        f'{workdir} belongs to a run of another configuration '
        f'({"; ".join(lines)}). Choose another --workdir, or give the flags '
        f'it was started with.{longer(workdir) if same else ""}'
      )
    if lines:
      print(
        f'{workdir} holds a start without a checkpoint, of another '
        f'configuration; beginning anew with this one '
        f'({listed(lines, 3, "; ")})',
        flush=True,
      )
      # What would mix with the new run. Other files are the user's and stay.
      events = (workdir / 'tensorboard').glob('events.out.tfevents.*')
      if (workdir / 'tensorboard').is_symlink():
        events = ()  # Those of other runs may be there.
      for path in (workdir / 'log.jsonl', workdir / CLASS_COUNTS, *events):
        path.unlink(missing_ok=True)
  elif begun:
    raise UserError(
      f'{workdir} holds checkpoints but no config.json; choose another '
      '--workdir.'
    )
  with writing(saved):
    write_text(saved, config_to_json(config))


def _find_shared(workdir: Path, config: ConfigDict) -> contextlib.ExitStack:
  saved = workdir / SAVED
  for _ in range(30):  # Network file systems show new files late, in seconds.
    with contextlib.suppress(OSError, ValueError):
      if not differences(saved.read_text('utf-8'), config, FREE_KEYS):
        return contextlib.ExitStack()
    time.sleep(1)
  raise UserError(
    f'{workdir} is not the folder that host 0 writes to. Give a --workdir on '
    'a file system that all hosts share.'
  )


def _read_saved(path: Path) -> str:
  sections = dict.fromkeys(('model', 'data', 'train'), OBJECT)
  try:
    text = path.read_bytes()
    check_fields(parse_json(text, str(path)), sections, str(path))
    return text.decode()
  except (OSError, ValueError, UserError) as error:
    raise UserError(
      f'{path} is there and was not written by train.py, or is damaged '
      f'({error}); choose another --workdir.'
    ) from error
