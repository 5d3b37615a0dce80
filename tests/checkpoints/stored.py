"""States of a small tree, and checkpoints of any tree."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnest_jax.checkpoints.integrity import read_items
from resnest_jax.checkpoints.state import Run, TrainState
from resnest_jax.checkpoints.store import find_step, open_checkpoints, save
from resnest_jax.sharding import make_mesh, replicated

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
ABOUT = {'best': {'step': 10, 'mIoU': 0.5}, 'classes': ['a', 'b']}


def make_state(step=0, width=2000):
  """Of noise, which no compression makes smaller."""
  noise = np.random.default_rng(step).random((2, width), np.float32)
  params = {'conv': {'kernel': jnp.asarray(noise)}}
  return TrainState(
    step=jnp.asarray(step, jnp.int32),
    params=params,
    batch_stats={'bn': {'mean': jnp.full(3, 2.0 * step)}},
    opt_state=OPTIMIZER.init(params),
  )


def abstract(state, devices=1):
  """Its shapes, to be restored onto so many devices."""
  place = replicated(make_mesh(devices=jax.devices()[:devices]))
  shapes = jax.eval_shape(lambda: state)
  return jax.tree.map(lambda x: x.update(sharding=place), shapes)


ABSTRACT = abstract(make_state())


def write(workdir, *steps, keep=3):
  with open_checkpoints(workdir, keep=keep) as manager:
    for step in steps:
      save(manager, make_state(step), ABOUT | {'step': step})


def save_steps(opened, *steps):
  """Gives a `Store` the states of these steps, ten after each other."""
  for step in steps:
    run = Run(make_state(step), step=step, saved_step=step - 10)
    opened.save(run, None)


def largest(folder):
  """The file with the values of the arrays of a checkpoint."""
  return max(folder.rglob('d/*'), key=os.path.getsize)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def assert_is(state, step):
  jax.tree.map(np.testing.assert_array_equal, state, make_state(step))


def variables_of(workdir, which, wanted):
  """Variables, and the step of the checkpoint."""
  with open_checkpoints(workdir, read_only=True) as manager:
    step = find_step(manager, which)
    return read_items(manager, step, model=wanted)[0]['model'], step
