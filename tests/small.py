"""The small run of all tests: a tiny network, real code around it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from resnest_jax.config import load_config

MINI = 'configs/ade20k_pspnet.py:mini'
NETWORK = {
  'model.width': 8,
  'model.stem_width': 8,
  'model.head_channels': 16,
  'model.aux_channels': 8,
}
# One padded shape for all images, so that the network compiles once.
RUN = NETWORK | {
  'data.image_scale': (64, 64),
  'data.scale_range': (1.0, 1.5),
  'data.crop_size': (32, 32),
  'train.batch_size': 4,
  'eval.batch_size': 4,
  'eval.bucket': 64,
}


def small_config(**changes: Any) -> ConfigDict:
  """MINI as `RUN` and then `changes`, a dict of dotted keys by `**`, say."""
  return load_config(MINI, RUN | changes)


def small_flags(values: Mapping[str, Any] | None = None) -> list[str]:
  """`RUN` and the values, as flags of train.py and eval.py."""
  return [
    f'--config.{key}={_text(value)}'
    for key, value in (RUN | dict(values or {})).items()
  ]


def _text(value: Any) -> str:
  return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)


def scalars(workdir: Path, name: str) -> list[tuple[int, Any]]:
  """(step, value) in the order in which they were logged."""
  rows = map(json.loads, (workdir / 'log.jsonl').read_text().splitlines())
  return [(row['step'], row[name]) for row in rows if name in row]
