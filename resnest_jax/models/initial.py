"""What parameters and statistics are before any training.

Kernels are normal: He's initialisation over the outputs (arXiv 1502.01852), or
a standard deviation of 0.01 in the layer that makes the logits. Scales are 1,
but 0 in the last batch normalisation of a residual block, which so begins as
its shortcut (arXiv 1706.02677). Biases are 0.

`model.init` draws them by these rules. `initial_variables` does the same
without compiling anything: XLA takes minutes for the few hundred draws of a
deep network.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

# Names of modules with rules of their own.
LOGITS = 'conv_seg'
LAST_NORM = 'bn3'
LOGITS_STD = 0.01


def kernel_std(path: Sequence[str], shape: Sequence[int]) -> float:
  """The standard deviation of a kernel's values.

  Args:
    path: names from the network to the layer that has the kernel; empty where
      it is used alone.
    shape: (..., inputs, outputs).
  """
  if LOGITS in path[-1:]:
    return LOGITS_STD
  fan_out = math.prod(shape) / shape[-2]
  return math.sqrt(2 / fan_out)


def norm_scale(path: Sequence[str]) -> float:
  """What the scale of the batch normalisation at `path` is."""
  return 0.0 if LAST_NORM in path[-1:] else 1.0


def variable_shapes(model: nn.Module) -> dict[str, Any]:
  """Shapes and types of a model's variables; nothing is computed."""
  return unflatten_dict(_flat_shapes(model, jax.config.jax_enable_x64))


def initial_variables(model: nn.Module, seed: int) -> dict[str, Any]:
  """The variables of an untrained segmentor, as NumPy arrays.

  Each is a function of the seed, of its path and of its shape, on any machine.

  Args:
    model: a `Segmentor` or a backbone.
    seed: non-negative.

  Returns:
    `params` and `batch_stats`.
  """
  shapes = flatten_dict(variable_shapes(model))
  return unflatten_dict(
    {path: _initial(path, leaf, seed) for path, leaf in shapes.items()}
  )


def _initial(
  path: tuple[str, ...], leaf: jax.ShapeDtypeStruct, seed: int
) -> np.ndarray:
  """One parameter or statistic; its name says of which kind it is."""
  *module, name = path
  if name == 'kernel':
    where = zlib.crc32('/'.join(path).encode())
    rng = np.random.default_rng([seed, where])
    std = leaf.dtype.type(kernel_std(module, leaf.shape))
    return rng.standard_normal(leaf.shape, leaf.dtype) * std
  values = {'scale': norm_scale(module), 'bias': 0, 'mean': 0, 'var': 1}
  return np.full(leaf.shape, values[name], leaf.dtype)


@functools.lru_cache(maxsize=4)  # Tracing a deep network takes seconds.
def _flat_shapes(model: nn.Module, x64: bool) -> dict[tuple, Any]:
  del x64  # What float64 becomes depends on it.
  return flatten_dict(
    jax.eval_shape(
      lambda: model.init(
        jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False
      )
    )
  )
