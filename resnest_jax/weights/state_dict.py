"""PyTorch state dicts of ResNeSt models, to our variables and back.

A state dict is a mapping from name to array. Names follow one of the
`KINDS`: 'mmseg' (mmsegmentation's segmentors) prefixes the network's parts
and numbers the stem as one sequence. Values only change their axes: a
convolution's (out, in / groups, k, k) is our (k, k, in / groups, out).
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnest_jax.errors import UserError

LEAVES = {
  ('params', 'kernel'): 'weight',
  ('params', 'bias'): 'bias',
  ('params', 'scale'): 'weight',
  ('batch_stats', 'mean'): 'running_mean',
  ('batch_stats', 'var'): 'running_var',
}
# Counts batches; PyTorch keeps it in each normalisation, nothing reads it.
COUNTER = 'num_batches_tracked'

# Our module path (joined by '/') -> theirs, first match wins.
BLOCK = [
  (r'layer(\d)_(\d+)/downsample_conv', r'layer\1.\2.downsample.1'),
  (r'layer(\d)_(\d+)/downsample_bn', r'layer\1.\2.downsample.2'),
  (r'layer(\d)_(\d+)/(\w+)/(\w+)', r'layer\1.\2.\3.\4'),
  (r'layer(\d)_(\d+)/(\w+)', r'layer\1.\2.\3'),
]
MMSEG_HEAD = [
  (r'classifier/conv_seg', 'conv_seg'),
  (r'pyramid_(\d)/(\w+)', r'psp_modules.\1.1.\2'),
  (r'convs_(\d)/(\w+)', r'convs.\1.\2'),
  (r'(\w+)/(\w+)', r'\1.\2'),
]


def _mmseg(path: str) -> str:
  part, rest = path.split('/', 1)
  if part != 'backbone':
    return f'{part}.{_translate(rest, MMSEG_HEAD)}'
  if stem := re.fullmatch(r'stem_(conv|bn)(\d)', rest):
    index = 3 * (int(stem[2]) - 1) + (stem[1] == 'bn')
    return f'backbone.stem.{index}'
  return f'backbone.{_translate(rest, BLOCK)}'


KINDS = {'mmseg': _mmseg}


def _translate(path: str, table: list[tuple[str, str]]) -> str:
  for pattern, replacement in table:
    if match := re.fullmatch(pattern, path):
      return match.expand(replacement)
  raise KeyError(path)


def _kind(names) -> str:
  if any(name.startswith('decode_head.') for name in names):
    return 'mmseg'
  raise UserError(
    'this state dict is of no known kind: none of its names starts with '
    "'decode_head.' (mmsegmentation). It begins with "
    f'{", ".join(sorted(names)[:3])}.'
  )


def variable_shapes(model: nn.Module) -> dict[str, Any]:
  """Shapes and types of a model's variables; nothing is computed."""
  return jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False
    )
  )


def _names(variables: Mapping[str, Any], kind: str) -> dict[tuple, str]:
  """Path of each variable -> its name in a state dict of this kind."""
  if kind not in KINDS:
    raise UserError(f'kind {kind!r} is not one of {", ".join(KINDS)}.')
  return {
    path: f'{KINDS[kind]("/".join(path[1:-1]))}.{LEAVES[path[0], path[-1]]}'
    for path in flatten_dict(variables)
  }


def _listed(names, limit: int = 5) -> str:
  names = sorted(names)
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return ', '.join(names[:limit]) + more


def import_state_dict(
  model: nn.Module, state_dict: Mapping[str, Any]
) -> dict[str, Any]:
  """Variables of `model` from a PyTorch state dict.

  Args:
    model: from `create_segmentor`.
    state_dict: name -> NumPy array (or anything NumPy takes). Its kind is
      recognised from the names.

  Returns:
    {'params': ..., 'batch_stats': ...} of NumPy arrays in the model's types.

  Raises:
    UserError: names that are missing or left over, or shapes that differ;
      the message lists them.
  """
  kind = _kind(state_dict)
  shapes = variable_shapes(model)
  names = _names(shapes, kind)
  given = {name for name in state_dict if not name.endswith(COUNTER)}
  missing, left_over = set(names.values()) - given, given - set(names.values())
  problems = []
  if missing:
    problems.append(f'{len(missing)} missing ({_listed(missing)})')
  if left_over:
    problems.append(f'{len(left_over)} left over ({_listed(left_over)})')
  if problems:
    raise UserError(
      f'the state dict ({kind}) does not fit the model: '
      f'{", ".join(problems)}. Check the backbone, the head and whether the '
      'checkpoint is whole.'
    )
  variables, wrong = {}, []
  for path, struct in flatten_dict(shapes).items():
    value = _from_torch(np.asarray(state_dict[names[path]]))
    if value.shape != struct.shape:
      wrong.append(f'{names[path]} is {value.shape}, not {struct.shape}')
    variables[path] = value.astype(struct.dtype)
  if wrong:
    raise UserError(
      f'shapes in the state dict ({kind}) differ from the model (axes in our '
      f'order): {_listed(wrong)}. Check num_classes, widths and the backbone.'
    )
  return unflatten_dict(variables)


def export_state_dict(
  model: nn.Module, variables: Mapping[str, Any], kind: str
) -> dict[str, np.ndarray]:
  """A PyTorch state dict with the values of `variables`.

  Args:
    model: from `create_segmentor`.
    variables: {'params': ..., 'batch_stats': ...}; params alone will do, so
      that gradients can be exported too.
    kind: whose names to use, 'mmseg'.

  Returns:
    name -> NumPy array with PyTorch's axes.
  """
  flat = flatten_dict(variables)
  names = _names(variables, kind)
  expected = {
    path
    for path in flatten_dict(variable_shapes(model))
    if path[0] in variables
  }
  if set(flat) != expected:
    paths = ['/'.join(path) for path in set(flat) ^ expected]
    raise UserError(f"variables are not this model's: {_listed(paths)}.")
  state_dict = {}
  for path, value in flat.items():
    state_dict[names[path]] = _to_torch(np.asarray(value))
    if path[-1] == 'var':
      module = names[path].rsplit('.', 1)[0]
      state_dict[f'{module}.{COUNTER}'] = np.zeros((), np.int64)
  return state_dict


def _from_torch(value: np.ndarray) -> np.ndarray:
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value


def _to_torch(value: np.ndarray) -> np.ndarray:
  return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
