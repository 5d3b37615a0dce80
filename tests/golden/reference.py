"""The reference's stored outputs, and the weights they were made with.

The npz files hold float64 outputs of mmsegmentation 1.2.2, timm 1.0.31 and
the ResNeSt authors' code on PyTorch's CPU. Their weights are not stored:
every tensor is drawn from its own name, here as there.
"""

import functools
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnest_jax.jax_private import jaxprs_in_params
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.segmentor import create_segmentor
from resnest_jax.weights.state_dict import export_state_dict, import_state_dict

Tensors = Mapping[str, np.ndarray]
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
# Heads of mmsegmentation's rows.
MMSEG_HEADS = ('fcn', 'pspnet', 'deeplabv3', 'deeplabv3plus')
# A network of the same kind that compiles in a second or two.
TINY = CONFIG | {
  'backbone': 'resnest14',
  'stem_width': 8,
  'width': 8,
  'head_channels': 16,
  'aux_channels': 8,
  'num_classes': 7,
}


def load(name: str) -> dict[str, np.ndarray]:
  with np.load(FOLDER / f'{name}.npz') as file:
    return dict(file)


@functools.cache
def _manifests() -> dict[str, dict[str, list[int]]]:
  with gzip.open(FOLDER / 'state_dict_manifests.json.gz', 'rt') as file:
    return json.load(file)


def manifest_names() -> list[str]:
  """Of state dicts: 'mmseg/ade20k_pspnet', 'timm/resnest50d', ..."""
  # GluonCV's is of a file that is read as one of PyTorch-Encoding.
  return sorted(x for x in _manifests() if not x.startswith('gluon/'))


def backbone_of(name: str) -> str:
  """That of 'official/resnest50', 'timm/resnest50d' or a segmentor."""
  source, row = name.split('/')
  if source in ('mmseg', 'encoding'):
    return 'resnest101' if source == 'mmseg' else row.split('_')[1]
  if source == 'official':
    return row
  return row.replace('d_', '_fast_') if '_' in row else row.rstrip('de')


def manifest(name: str) -> dict[str, tuple[int, ...]]:
  """Tensor name -> shape of one reference state dict."""
  return {key: tuple(shape) for key, shape in _manifests()[name].items()}


def _drawn(rng, kind, shape, inputs):
  if len(shape) == 1 and kind in ('weight', 'scale', 'var', 'running_var'):
    return rng.uniform(0.5, 1.5, shape)
  if kind in ('bias', 'mean', 'running_mean'):
    return 0.1 * rng.standard_normal(shape)
  return rng.standard_normal(shape) / np.sqrt(np.prod(inputs))


def filled(shapes: Mapping[str, Iterable[int]]) -> dict[str, np.ndarray]:
  """The state dict that the reference had under these names."""
  state_dict = {}
  for name, shape in shapes.items():
    kind, shape = name.rpartition('.')[2], tuple(shape)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    state_dict[name] = _drawn(rng, kind, shape, shape[1:])
    if kind == 'num_batches_tracked':
      state_dict[name] = np.zeros(shape, np.int64)
  return state_dict


def filled_variables(shapes: Mapping[str, Any], seed: int = 0) -> Any:
  """Variables of our own naming for such shapes, of the same distributions."""
  rng = np.random.default_rng(seed)
  return unflatten_dict(
    {
      path: _drawn(rng, path[-1], x.shape, x.shape[:-1]).astype(x.dtype)
      for path, x in flatten_dict(shapes).items()
    }
  )


def variables_of(model: Any, seed: int = 0) -> Any:
  return filled_variables(variable_shapes(model), seed)


def filled_as(model: Any, kind: str) -> Any:
  """The variables that the reference had, under the names of that kind."""
  named = export_state_dict(model, variables_of(model), kind)
  return import_state_dict(
    model, filled({name: x.shape for name, x in named.items()})
  )


def encoding(golden: Tensors, **changes: Any) -> tuple[Any, Any]:
  """PyTorch-Encoding's network of a golden file, and its variables."""
  head, backbone = str(golden['head']), str(golden['backbone'])
  head = {'psp': 'pspnet', 'deeplab': 'deeplabv3'}.get(head, head)
  classes = {'ade20k': 150, 'pcontext': 59, 'citys': 19}
  model = create_segmentor(
    CONFIG
    | {
      # The first two are no published networks.
      'backbone': {'s14': 'resnest14', 's26': 'resnest26'}.get(
        backbone, backbone
      ),
      'dilation_rule': 'official',
      'head': f'encoding_{head}',
      'head_channels': 256 if head == 'deeplabv3' else 512,
      'num_classes': classes[str(golden['dataset'])],
    }
    | changes
  )
  return model, filled_as(model, 'encoding')


def head_of(name: str, dtype: str = 'float64') -> tuple[Any, Any]:
  """A tiny network's decode head, or its 'auxiliary' one, and variables."""
  part = 'auxiliary_head' if name == 'auxiliary' else 'decode_head'
  head = {'auxiliary': 'fcn'}.get(name, name)
  model = create_segmentor(TINY | {'head': head, 'dtype': dtype})
  variables = {key: tree[part] for key, tree in variables_of(model).items()}
  return getattr(model, part), variables


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def evaluate(model: Any, variables: Any, images: Any, size: Any = None) -> Any:
  return model.apply(variables, images, train=False, size=size)


def random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape)


def images(seed: int, batch: int, height: int, width: int) -> np.ndarray:
  """The reference's input, (B, H, W, 3)."""
  x = random(batch, 3, height, width, seed=seed)
  return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
  """Stands for such an array where a function is traced."""
  return jax.ShapeDtypeStruct(shape, dtype)


def equations(jaxpr: Any) -> Iterator[Any]:
  """Those of a traced function, inner ones too."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


def with_gradients(function: Callable, *arguments: Any) -> tuple[Any, ...]:
  """The function's array, and its gradients for a random direction."""
  y, back = jax.vjp(jax.jit(function), *arguments)
  return y, *back(jnp.asarray(random(*y.shape, seed=3)))


def relative_error(actual: Any, expected: Any, least: float = 0.0) -> float:
  """Largest difference over the largest expected magnitude, or `least`."""
  expected = np.asarray(expected)
  scale = max(np.abs(expected).max(), least)
  return np.abs(np.asarray(actual) - expected).max() / scale


def assert_close(ours: Any, theirs: Any, limit: float, least=0.0) -> None:
  """The same tree, and no larger `relative_error` of any array."""
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  leaves = map(jax.tree.leaves_with_path, (ours, theirs))
  for (path, one), (_, other) in zip(*leaves, strict=True):
    assert relative_error(one, other, least) < limit, path


def assert_same_bits(state_dict: Tensors, expected: Tensors) -> None:
  """The same names, types, shapes and bits."""
  assert state_dict.keys() == expected.keys()
  for name, value in expected.items():
    ours, bits = state_dict[name], f'u{value.itemsize}'
    assert (ours.dtype, ours.shape) == (value.dtype, value.shape), name
    assert (ours.view(bits) == value.view(bits)).all(), name
