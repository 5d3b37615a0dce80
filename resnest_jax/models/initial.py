"""Initial parameters and statistics.

Kernels are normal with He's fan-out variance (arXiv 1502.01852). Scales are 0
in a residual block's last batch norm (arXiv 1706.02677). A pyramid's kernels
have the variance 1 / inputs. The authors' heads are uniform between plus and
minus 1 / sqrt(inputs), PyTorch's default. Kernels of their classifiers, of
MXNet, have the variance of He's fan-in.
"""

import math
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

# Modules with rules of their own, recognised by name.
LOGITS = 'conv_seg'
LAST_NORM = 'bn3'
PYRAMID = re.compile(r'(lateral|output)_\d')
LOGITS_STD = 0.01


def kernel_std(path: Sequence[str], shape: Sequence[int]) -> float:
  """Standard deviation of a layer's kernel (..., inputs, outputs)."""
  if LOGITS in path[-1:]:
    return LOGITS_STD
  # No ReLU follows. The variance of Xavier's in Caffe2 and detectron2.
  if PYRAMID.fullmatch(''.join(path[-1:])):
    return 1 / math.sqrt(math.prod(shape[:-1]))
  fan_out = math.prod(shape) / shape[-2]
  return math.sqrt(2 / fan_out)


def norm_scale(path: Sequence[str]) -> float:
  return 0.0 if LAST_NORM in path[-1:] else 1.0


def variable_shapes(model: nn.Module) -> dict[str, Any]:
  """Shapes and types of a model's variables, as a tree; computes nothing."""
  return unflatten_dict(_flat_shapes(model, jax.config.jax_enable_x64))


def initial_variables(model: nn.Module, seed: int) -> dict[str, Any]:
  """Draws `params` and `batch_stats` of a network or backbone, in NumPy.

  An array depends on `seed` (>= 0), its path and its shape, not on the machine.
  """
  # Not `model.init`: XLA compiles its few hundred draws for minutes.

  shapes = flatten_dict(variable_shapes(model))
  head = getattr(model, 'decode_head', None)
  encoding = head is not None and head.align_corners
  classifier = ('params', 'fc', 'kernel') in shapes

  def draw(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    *module, name = path
    kernel = shapes.get((*module, 'kernel'))
    where = zlib.crc32('/'.join(path).encode())
    rng = np.random.default_rng([seed, where])
    if encoding and kernel is not None and 'head' in module[1]:
      bound = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
      return rng.uniform(-bound, bound, leaf.shape).astype(leaf.dtype)
    if name == 'kernel':
      std = kernel_std(module, leaf.shape)
      if classifier:
        std = math.sqrt(2 / math.prod(leaf.shape[:-1]))
      normal = rng.standard_normal(leaf.shape, leaf.dtype)
      return normal * leaf.dtype.type(std)
    values = {'scale': norm_scale(module), 'bias': 0, 'mean': 0, 'var': 1}
    return np.full(leaf.shape, values[name], leaf.dtype)

  return unflatten_dict(
    {path: draw(path, leaf) for path, leaf in shapes.items()}
  )


@lru_cache(maxsize=4)  # Tracing a deep network takes seconds.
def _flat_shapes(model: nn.Module, x64: bool) -> dict[tuple, Any]:
  del x64  # Part of the cache's key, as float64 means float32 without it.
  init = partial(model.init, train=False)
  channels = getattr(model, 'backbone', model).channels
  images = jnp.zeros((1, 64, 64, channels))
  return flatten_dict(jax.eval_shape(init, jax.random.key(0), images))
