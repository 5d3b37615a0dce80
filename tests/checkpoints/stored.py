"""Reads the variables of a checkpoint of any tree."""

from resnest_jax.checkpoints.integrity import read_items
from resnest_jax.checkpoints.store import find_step, open_checkpoints


def variables_of(workdir, which, wanted):
  """Variables, and the step of the checkpoint."""
  with open_checkpoints(workdir, read_only=True) as manager:
    step = find_step(manager, which)
    return read_items(manager, step, model=wanted)[0]['model'], step
