"""A run's folder as training leaves it, of a tiny network."""

import json

import numpy as np
from golden import reference

from resnest_jax.checkpoints import store
from resnest_jax.checkpoints.state import TrainState
from resnest_jax.config import config_to_json, load_config
from resnest_jax.data.labels import ADE20K
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import variable_shapes

STEP = 7
# One padded shape for all images, so that the network compiles once.
OVERRIDES = {
  'model.stem_width': 8,
  'model.width': 8,
  'model.head_channels': 16,
  'model.aux_channels': 8,
  'data.image_scale': (64, 64),
  'eval.bucket': 64,
  'eval.batch_size': 3,
  'eval.overlays': 3,
  'eval.report_images': 2,
}


def write_run(path, overrides=OVERRIDES):
  """Gives the folder one checkpoint, of random weights; returns it."""
  config = load_config('configs/ade20k_pspnet.py:mini', overrides)
  shapes = variable_shapes(create_segmentor(config.model))
  state = TrainState(
    step=np.int32(STEP),
    **reference.filled_variables(shapes),
    opt_state={'momentum': np.zeros(1)},
  )
  with store.open_checkpoints(path) as manager:
    about = {
      'config': json.loads(config_to_json(config)),
      'classes': ADE20K.classes,
      'dilation_rule': 'mmseg',
      'step': STEP,
    }
    store.save(manager, state, about)
  return path
