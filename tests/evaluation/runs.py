"""A run's folder as training leaves it, of a tiny network."""

import numpy as np
from golden import reference
from small import MINI, RUN

from resnest_jax.checkpoints import store
from resnest_jax.checkpoints.state import TrainState
from resnest_jax.config import load_config
from resnest_jax.labels import ADE20K
from resnest_jax.models.segmentor import create_segmentor

STEP = 7
OVERRIDES = RUN | {'eval.batch_size': 3, 'eval.overlays': 3}
OVERRIDES |= {'eval.report_images': 2}


def write_run(path, overrides=OVERRIDES):
  # Gives the folder one checkpoint, of random weights; returns it.
  config = load_config(MINI, overrides)
  variables = reference.variables_of(create_segmentor(config.model))
  about = {'classes': ADE20K.classes, 'dilation_rule': 'mmseg'}
  return save_run(path, STEP, config, variables, about)


def save_run(path, step, config, variables, about, *scores):
  optimizer = {'momentum': np.zeros(1)}
  state = TrainState(step=np.int32(step), **variables, opt_state=optimizer)
  about = {'config': config.to_dict(), 'step': step} | about
  with store.open_checkpoints(path) as manager:
    store.save(manager, state, about, *scores)
  return path
