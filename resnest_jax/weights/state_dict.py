"""Converts state dicts of ResNeSt models to our variables and back.

A state dict maps names to arrays. Its names follow one of the `KINDS`:

  mmseg       mmsegmentation's segmentors and mmpretrain's classifiers
  mmdet       mmdetection's backbones, which have mmsegmentation's names
  encoding    the authors' segmentors, of PyTorch-Encoding, where classifiers
              and backbones alone have the names of `official`
  official    the authors' classifiers
  timm        timm's, which have the authors' names
  detectron2  backbones of the authors' detectron2-ResNeSt
  ours        our own variables, by their path

Only axes change: a convolution's (out, in / groups, k, k) is our
(k, k, in / groups, out), a linear layer's (out, in) our (in, out).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnest_jax.errors import UserError
from resnest_jax.models.initial import variable_shapes
from resnest_jax.models.resnest import ResNeSt
from resnest_jax.text import listed, share_of
from resnest_jax.weights.names import (
  COUNTER,
  WHOSE,
  WHOSE_READ,
  check_names,
  head_modules,
  head_of,
  top_module,
  unwrapped,
)

KINDS = tuple(WHOSE)
LEAVES = {
  **{'kernel': 'weight', 'bias': 'bias', 'scale': 'weight'},
  **{'mean': 'running_mean', 'var': 'running_var'},
}
CLASS_LAYERS = (
  *(f'{x}_head/classifier/conv_seg' for x in ('decode', 'auxiliary')),
  'fc',
)

# Our module path (joined by '/') -> theirs, first match wins. PyTorch's
# sequences count pools: downsample.0, psp_modules.N.0, image_pool.0.
BLOCK = [
  (r'layer(\d)_(\d+)/downsample_conv', r'layer\1.\2.downsample.1'),
  (r'layer(\d)_(\d+)/downsample_bn', r'layer\1.\2.downsample.2'),
  (r'layer(\d)_(\d+)/(\w+)/(\w+)', r'layer\1.\2.\3.\4'),
  (r'layer(\d)_(\d+)/(\w+)', r'layer\1.\2.\3'),
]
# 'res1' stands for theirs of `layer1`, which is res2.
DETECTRON2 = [
  (r'fc', 'linear'),
  (r'stem_conv(\d)', r'stem.conv1_\1'),
  (r'stem_bn(\d)', r'stem.conv1_\1.norm'),
  (r'layer(\d)_(\d+)/downsample_conv', r'res\1.\2.shortcut'),
  (r'layer(\d)_(\d+)/downsample_bn', r'res\1.\2.shortcut.norm'),
  (r'layer(\d)_(\d+)/bn(\d)', r'res\1.\2.conv\3.norm'),
  (r'layer(\d)_(\d+)/conv2/(\w+)', r'res\1.\2.conv2.\3'),
  (r'layer(\d)_(\d+)/(\w+)', r'res\1.\2.\3'),
]
MMSEG_HEAD = [
  (r'classifier/conv_seg', 'conv_seg'),
  (r'pyramid_(\d)/(\w+)', r'psp_modules.\1.1.\2'),
  (r'convs_(\d)/(\w+)', r'convs.\1.\2'),
  (r'pyramid/image_pool/(\w+)', r'image_pool.1.\1'),
  (r'pyramid/aspp_(\d)/(\w+)/(\w+)', r'aspp_modules.\1.\2_conv.\3'),
  (r'pyramid/aspp_(\d)/(\w+)', r'aspp_modules.\1.\2'),
  (r'pyramid/bottleneck/(\w+)', r'bottleneck.\1'),
  (r'low_level/(\w+)', r'c1_bottleneck.\1'),
  (r'refine_(\d)/(\w+)/(\w+)', r'sep_bottleneck.\1.\2_conv.\3'),
  (r'(\w+)/(\w+)', r'\1.\2'),
]


def _sequence(ours: str, theirs: str, start: int = 0) -> list[tuple[str, str]]:
  # Convolution and norm, as `_translate` takes them.
  return [
    (f'{ours}/conv', f'{theirs}.{start}'),
    (f'{ours}/bn', f'{theirs}.{start + 1}'),
  ]


_ENCODING_FCN = [
  *_sequence('convs_0', 'conv5'),
  ('classifier/conv_seg', 'conv5.4'),
]
ENCODING_HEADS = {
  'encoding_fcn': _ENCODING_FCN,
  'encoding_pspnet': [
    *_sequence('pyramid_0', 'conv5.0.conv1'),
    *_sequence('pyramid_1', 'conv5.0.conv2'),
    *_sequence('pyramid_2', 'conv5.0.conv3'),
    *_sequence('pyramid_3', 'conv5.0.conv4'),
    *_sequence('bottleneck', 'conv5', 1),
    ('classifier/conv_seg', 'conv5.5'),
  ],
  'encoding_deeplabv3': [
    *_sequence('pyramid/image_pool', 'aspp.b4.gap', 1),
    *_sequence(r'pyramid/aspp_(\d)', r'aspp.b\1'),
    *_sequence('pyramid/bottleneck', 'aspp.project'),
    *_sequence('refine', 'block'),
    ('classifier/conv_seg', 'block.4'),
  ],
}


def _translate(path: str, table: list[tuple[str, str]]) -> str:
  for pattern, replacement in table:
    if match := re.fullmatch(pattern, path):
      return match.expand(replacement)
  raise KeyError(path)


def _torch_module(path: str, kind: str, head: str | None) -> str:
  part, _, rest = path.partition('/')
  mmseg = kind in ('mmseg', 'mmdet')
  if part == 'backbone':
    prefix = 'backbone.' if mmseg else ''
    if kind == 'encoding' and head:
      prefix = 'pretrained.'
    return prefix + _torch_module(rest, kind, head)
  if part == 'fpn':
    return _pyramid_module(rest, kind)
  if kind == 'detectron2':
    name = _translate(path, DETECTRON2)
    return re.sub(r'^res\d', lambda x: f'res{int(x[0][3]) + 1}', name)
  if part == 'fc':
    return 'head.fc' if mmseg else 'fc'
  if part == 'decode_head' and not mmseg:
    return f'head.{_translate(rest, ENCODING_HEADS[head])}'
  if part == 'auxiliary_head' and not mmseg:
    return f'auxlayer.{_translate(rest, _ENCODING_FCN)}'
  if part.endswith('_head'):
    return f'{part}.{_translate(rest, MMSEG_HEAD)}'
  match = re.fullmatch(r'stem_(conv|bn)(\d)', path)
  if not match:
    return _translate(path, BLOCK)
  # PyTorch's stem is one sequence: conv, norm, relu, conv, norm, relu, ...
  index = 3 * (int(match[2]) - 1) + (match[1] == 'bn')
  if mmseg:
    return f'stem.{index}'
  # The last norm is no part of conv1, as in torchvision's ResNet.
  return 'bn1' if index == 7 else f'conv1.{index}'


def _pyramid_module(path: str, kind: str) -> str:
  which, level = path.split('_')
  if kind == 'detectron2':
    return f'fpn_{which}{level}'
  if kind in ('mmseg', 'mmdet'):
    which = {'output': 'fpn'}.get(which, which)
    return f'neck.{which}_convs.{int(level) - 2}.conv'
  raise UserError(
    f'{WHOSE_READ[kind]} names have no place for a pyramid; those of mmdet and '
    'detectron2 have, and all for the variables of model.backbone.'
  )


def recognise(names: Iterable[str]) -> str:
  """The kind of a state dict; of equal names 'mmseg' and 'official'."""
  names = set(names)
  if any(name.startswith('params/') for name in names):
    return 'ours'
  if names & {'backbone.stem.0.weight', 'stem.0.weight'}:
    return 'mmseg'
  if 'pretrained.conv1.0.weight' in names:
    return 'encoding'
  if 'conv1.0.weight' in names:
    return 'official'
  wrappers = ('', 'backbone.', 'backbone.bottom_up.')
  if names & {f'{x}stem.conv1_1.weight' for x in wrappers}:
    return 'detectron2'
  raise UserError(
    'this state dict is of no known kind: it has none of '
    'backbone.stem.0.weight (mmsegmentation, mmpretrain, mmdetection), '
    'pretrained.conv1.0.weight (PyTorch-Encoding), conv1.0.weight (the '
    'authors, timm), stem.conv1_1.weight (detectron2) or params/... (ours). '
    'It has '
    f'{listed(sorted(names), 3) or "no tensors"}.'
  )


def segmentor_kind(model: nn.Module) -> str:
  """The kind of names that a model's heads have, 'mmseg' or 'encoding'."""
  head = getattr(model, 'decode_head', None)
  return 'encoding' if head is not None and head.align_corners else 'mmseg'


def _names(
  model: nn.Module, variables: Mapping[str, Any], kind: str, advice: str
) -> dict[tuple, str]:
  if kind not in KINDS:
    raise UserError(f'kind {kind!r} is not one of {", ".join(KINDS)}.')
  paths = flatten_dict(variables)
  if kind == 'ours':
    return {path: '/'.join(path) for path in paths}
  modules = {'/'.join(path[1:-1]) for path in paths}
  heads, head = head_modules(modules), head_of(modules)
  _check_detector(kind, getattr(model, 'backbone', model))
  fitting = segmentor_kind(model)
  # The names of the two PSPNets are equal here.
  if fitting == 'encoding' and head == 'pspnet':
    head = 'encoding_pspnet'
  if heads and kind != fitting:
    raise UserError(
      f'{WHOSE_READ[kind]} names have no place for {" and ".join(heads)} of '
      f'{head}. {advice}'
    )
  names = {}
  for path in paths:
    module = _torch_module('/'.join(path[1:-1]), kind, head)
    names[path] = f'{module}.{LEAVES[path[-1]]}'
  return names


def _check_detector(kind: str, backbone: ResNeSt) -> None:
  """Raises `UserError` if a detector's library would compute others."""
  # `avd_first` is in no weight: the file would load, and be wrong.
  odd = 'avd_first' if backbone.avd_first else ''
  if kind == 'detectron2' and backbone.radix == 1:
    odd = 'radix 1'
  if kind in ('detectron2', 'mmdet') and odd:
    raise UserError(
      f'{WHOSE[kind]} ResNeSt has no backbone with {odd}; with these weights '
      "it would compute something else. Take another, such as 'resnest50'."
    )


def _names_in(
  model: nn.Module, shapes: Mapping[str, Any], state_dict: Mapping[str, Any]
) -> tuple[str, dict[tuple, str]]:
  """The kind of a state dict, and its names for the variables of a model."""
  kind = recognise(state_dict)
  advice = (
    'Such weights are of a backbone: import them for model.backbone (with '
    "drop=('fc',) if a classifier's layer is among them)."
  )
  if head := head_of(state_dict):
    advice = f"The weights have {head}; set the model's head to that."
  return kind, _names(model, shapes, kind, advice)


def without(
  state_dict: Mapping[str, Any], drop: Sequence[str]
) -> dict[str, Any]:
  """Leaves out tensors, or modules with everything below them.

  Our own names are without the collection: 'fc' stands for params/fc and
  batch_stats/fc. A name that nothing has raises `UserError`.
  """
  kept = dict(state_dict)
  for module in drop:
    pattern = re.compile(
      rf'((params|batch_stats)/)?{re.escape(module)}([./]|$)'
    )
    inside = [name for name in kept if pattern.match(name)]
    if not inside:
      modules = {top_module(name) for name in kept}
      raise UserError(
        f'the state dict has nothing named {module!r} to drop; it has '
        f'{listed(sorted(modules), 12)}.'
      )
    for name in inside:
      del kept[name]
  return kept


def import_state_dict(
  model: nn.Module,
  state_dict: Mapping[str, Any],
  *,
  drop: Sequence[str] = (),
  fresh: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Reads the variables of `model` from a state dict.

  Args:
    model: from `create_segmentor`, `create_classifier` or `create_backbone`.
    state_dict: name -> array that NumPy accepts, of any kind.
    drop: see `without`; ('fc',) leaves a classifier's backbone.
    fresh: initialised variables, from which layers for another number of
      classes are taken; None: such layers are an error.

  Returns:
    {'params': ..., 'batch_stats': ...} of NumPy arrays in the model's types.

  Raises:
    UserError: lists missing or surplus names, whole numbers, or shapes that
      differ.
  """
  state_dict, shapes = without(state_dict, drop), variable_shapes(model)
  kind, names = _names_in(model, shapes, state_dict)
  # The backbone is no module but the model, or has no prefix when written.
  alone = isinstance(model, ResNeSt) and kind != 'official'
  if alone or kind == 'detectron2':
    state_dict = {unwrapped(k): v for k, v in state_dict.items()}
  check_names(kind, set(names.values()), state_dict)
  there, back = (
    (np.asarray, np.asarray) if kind == 'ours' else (_to_torch, _from_torch)
  )
  spare = flatten_dict(fresh or {})
  variables, wrong, whole = {}, [], []
  for path, struct in flatten_dict(shapes).items():
    value = np.asarray(state_dict[names[path]])
    if value.dtype.kind in 'iub':
      whole.append(names[path])
    expected = there(np.broadcast_to(0, struct.shape)).shape
    if value.shape == expected:
      value = back(value)
    elif path in spare and '/'.join(path[1:-1]) in CLASS_LAYERS:
      value = np.asarray(spare[path])
    else:
      wrong.append(f'{names[path]} is {value.shape}, the model has {expected}')
    variables[path] = value.astype(struct.dtype)
  if whole:
    raise UserError(
      f'{share_of(whole, names, "weight", "are")} whole numbers, which no '
      f'trained network has: {listed(sorted(whole))}. They may be quantised or '
      'damaged; use the floating-point original.'
    )
  if wrong:
    raise UserError(
      f'{len(wrong)} of the weights ({WHOSE_READ[kind]} names) have another '
      f'shape than in the model: {listed(sorted(wrong))}. Check num_classes, '
      'widths and the backbone.'
    )
  return unflatten_dict(variables)


def reinitialised(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
  """Layers that `import_state_dict` would take from `fresh`, in our paths."""
  shapes = variable_shapes(model)
  kind, names = _names_in(model, shapes, state_dict)
  # Classes are the first axis of PyTorch's tensors and the last of ours.
  axis = -1 if kind == 'ours' else 0
  layers = {
    layer
    for path, struct in flatten_dict(shapes).items()
    if (layer := '/'.join(path[1:-1])) in CLASS_LAYERS
    and names[path] in state_dict
    and np.shape(state_dict[names[path]])[axis] != struct.shape[-1]
  }
  return sorted(layers)


def export_state_dict(
  model: nn.Module, variables: Mapping[str, Any], kind: str
) -> dict[str, np.ndarray]:
  """Writes variables as a state dict: name -> NumPy array.

  `model` is as of `import_state_dict`, `variables` are params and batch_stats,
  or gradients: params alone; `kind` is of `KINDS`. Raises `UserError` for one
  that has no names for the model's heads, or variables of another model.
  """
  flat = flatten_dict(variables)
  heads = head_modules('/'.join(path[1:]) for path in flat)
  fitting = segmentor_kind(model)
  names = _names(
    model,
    variables,
    kind,
    f'Leave them out (--drop {" ".join(heads)}; in Python export the variables '
    f'of model.backbone), or write {WHOSE[fitting]} names (--to {fitting}).',
  )
  shapes = flatten_dict(variable_shapes(model))
  expected = {path for path in shapes if path[0] in variables}
  if set(flat) != expected:
    paths = ['/'.join(path) for path in set(flat) ^ expected]
    raise UserError(f"variables are not this model's: {listed(sorted(paths))}.")
  state_dict = {}
  for path, value in flat.items():
    value = np.asarray(value)
    state_dict[names[path]] = value if kind == 'ours' else _to_torch(value)
    # PyTorch's strict loading wants the counter of every normalisation.
    if path[-1] == 'var' and kind != 'ours':
      module = names[path].rsplit('.', 1)[0]
      state_dict[f'{module}.{COUNTER}'] = np.zeros((), np.int64)
  return state_dict


def _from_torch(value: np.ndarray) -> np.ndarray:
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _to_torch(value: np.ndarray) -> np.ndarray:
  return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
