"""The small run of all tests: a tiny network, real code around it."""

import json

from resnest_jax.config import load_config

MINI = 'configs/ade20k_pspnet.py:mini'
# One padded shape for all images, so that the network compiles once.
RUN = {
  **{'model.width': 8, 'model.stem_width': 8},
  **{'model.head_channels': 16, 'model.aux_channels': 8},
  **{'data.image_scale': (64, 64), 'data.scale_range': (1.0, 1.5)},
  **{'data.crop_size': (32, 32), 'train.batch_size': 4},
  **{'eval.batch_size': 4, 'eval.bucket': 64},
}


def small_config(**changes):
  """MINI as `RUN` and then `changes`, a dict of dotted keys by `**`, say."""
  return load_config(MINI, RUN | changes)


def small_flags(values=()):
  """`RUN` and the values, as flags of train.py and eval.py."""
  return [f'--config.{k}={_text(v)}' for k, v in (RUN | dict(values)).items()]


def _text(value):
  return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)


def scalars(workdir, name):
  """(step, value) in the order in which they were logged."""
  rows = map(json.loads, (workdir / 'log.jsonl').read_text().splitlines())
  return [(row['step'], row[name]) for row in rows if name in row]
