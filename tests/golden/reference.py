"""The reference's stored outputs, and the weights they were made with.

The npz files hold float64 outputs of mmsegmentation 1.2.2, timm 1.0.31 and
the ResNeSt authors' code on PyTorch's CPU. Their weights are not stored:
every tensor is drawn from its own name, here as there. `manifest` gives the
names and shapes of the reference's state dicts.
"""

import functools
import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnest_jax.models.initial import variable_shapes

FOLDER = Path(__file__).parent

# Compiler options that halve its time, for what runs once or twice.
QUICK = {'xla_backend_optimization_level': 0}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)

# mmsegmentation's ResNeSt-101-D8 with a PSP head, in `config.model`'s keys.
CONFIG = {
  'backbone': 'resnest101',
  'output_stride': 8,
  'dilation_rule': 'mmseg',
  'head': 'pspnet',
  'head_channels': 512,
  'aux_channels': 256,
  'num_classes': 19,
  'dropout': 0.1,
  'dtype': 'float64',
}
# A network of the same kind that compiles in a second or two.
TINY = CONFIG | {
  'backbone': 'resnest14',
  'stem_width': 8,
  'width': 8,
  'head_channels': 16,
  'aux_channels': 8,
  'num_classes': 7,
}
# What timm calls otherwise than the authors, besides a last letter.
TIMM = {
  'resnest50d_4s2x40d': 'resnest50_fast_4s2x40d',
  'resnest50d_1s4x24d': 'resnest50_fast_1s4x24d',
}


def load(name: str) -> dict[str, np.ndarray]:
  """The arrays of `name`.npz."""
  with np.load(FOLDER / f'{name}.npz') as file:
    return dict(file)


@functools.cache
def _manifests() -> dict[str, dict[str, list[int]]]:
  with gzip.open(FOLDER / 'state_dict_manifests.json.gz', 'rt') as file:
    return json.load(file)


def manifest_names() -> list[str]:
  """All there are: 'mmseg/ade20k_pspnet', 'timm/resnest50d', ..."""
  return sorted(_manifests())


def backbone_of(name: str) -> str:
  """What 'official/resnest50' or 'timm/resnest50d' is called here."""
  row = name.partition('/')[2]
  return row if name[0] == 'o' else TIMM.get(row, row.rstrip('de'))


def manifest(name: str) -> dict[str, tuple[int, ...]]:
  """Tensor name -> shape of one reference state dict."""
  return {key: tuple(shape) for key, shape in _manifests()[name].items()}


def fill(name: str, shape: Iterable[int]) -> np.ndarray:
  """The tensor that the reference had under this name."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  shape = tuple(shape)
  leaf = name.rpartition('.')[2]
  if leaf == 'num_batches_tracked':
    return np.zeros(shape, np.int64)
  if leaf == 'running_var' or (leaf == 'weight' and len(shape) == 1):
    return rng.uniform(0.5, 1.5, shape)
  if leaf in ('running_mean', 'bias'):
    return 0.1 * rng.standard_normal(shape)
  return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))


def filled(shapes: Mapping[str, Iterable[int]]) -> dict[str, np.ndarray]:
  """A whole state dict of such tensors."""
  return {name: fill(name, shape) for name, shape in shapes.items()}


def filled_variables(shapes: Mapping[str, Any], seed: int = 0) -> Any:
  """Random variables of our own naming, of the same distributions.

  Args:
    shapes: variables as ShapeDtypeStructs.
    seed: of the draws.
  """
  rng = np.random.default_rng(seed)

  def draw(leaf: str, struct: jax.ShapeDtypeStruct) -> np.ndarray:
    if leaf in ('scale', 'var'):
      value = rng.uniform(0.5, 1.5, struct.shape)
    elif leaf in ('bias', 'mean'):
      value = 0.1 * rng.standard_normal(struct.shape)
    else:
      value = rng.standard_normal(struct.shape)
      value /= np.sqrt(np.prod(struct.shape[:-1]))
    return value.astype(struct.dtype)

  flat = flatten_dict(shapes)
  return unflatten_dict({path: draw(path[-1], flat[path]) for path in flat})


def variables_of(model: Any, seed: int = 0) -> Any:
  """Such variables of a model."""
  return filled_variables(variable_shapes(model), seed)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def evaluate(model: Any, variables: Any, images: Any, size: Any = None) -> Any:
  """What the model gives in evaluation."""
  return model.apply(variables, images, train=False, size=size)


def images(seed: int, batch: int, height: int, width: int) -> np.ndarray:
  """The reference's input, (B, H, W, 3)."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((batch, 3, height, width))
  return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def relative_error(actual: Any, expected: Any) -> float:
  """Largest difference over the largest expected magnitude."""
  expected = np.asarray(expected)
  return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def assert_same_bits(
  state_dict: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> None:
  """The same names, types, shapes and bits."""
  assert state_dict.keys() == expected.keys()
  for name, value in expected.items():
    ours, bits = state_dict[name], f'u{value.itemsize}'
    assert (ours.dtype, ours.shape) == (value.dtype, value.shape), name
    assert (ours.view(bits) == value.view(bits)).all(), name
