"""Reads what mmsegmentation stores of its configuration next to weights.

mmengine and mmcv write it as the text of a Python file, which is parsed and not
run. Strides, poolings and normalisation are in no name and no shape.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from resnest_jax.errors import UserError
from resnest_jax.models.description import CLASSES, PALETTE
from resnest_jax.untrusted import brief, parse_json
from resnest_jax.weights.names import DROP

LENGTH = 1_000_000  # Characters; real ones have 10,000.
# strides and dilations of the four stages -> output stride.
_STRIDES = {
  ((1, 2, 2, 2), (1, 1, 1, 1)): 32,
  ((1, 2, 2, 1), (1, 1, 1, 2)): 16,
  ((1, 2, 1, 1), (1, 1, 2, 4)): 8,
}
# What the networks here compute, of parts that no name or shape shows.
_BACKBONE = {
  'style': 'pytorch',
  'avg_down_stride': True,
  'multi_grid': None,
  'conv_cfg': None,
  'plugins': None,
}
_HEAD = {
  'align_corners': False,
  'conv_cfg': None,
  'dilation': 1,
  'pool_scales': (1, 2, 3, 6),
  'dilations': (1, 12, 24, 36),
}
_ASPP = {'dilations': (1, 6, 12, 18)}  # Defaults that differ from ours.


class Stored(NamedTuple):
  """Facts of a stored configuration; None: it does not say."""

  output_stride: int | None = None
  normalization: dict[str, Any] | None = None  # As `Weights` have it.
  found: bool = False


def read_stored(meta: Mapping[str, Any], heads: Sequence[str]) -> Stored:
  """Reads the configuration in a checkpoint's `meta`, if there is one.

  `heads`: the modules of all, if they are wanted; they alone are dilated here.
  Raises `UserError` if the network computes something else than ours with its
  weights.
  """
  # mmengine's name, and that of mmcv before it.
  text = meta.get('cfg', meta.get('config'))
  content = _evaluated(text) if isinstance(text, str) else text
  model = content.get('model') if isinstance(content, Mapping) else None
  if not isinstance(model, Mapping):
    return Stored()
  backbone = _section(model, 'backbone')
  fatal = _differences('model.backbone', backbone, _BACKBONE)
  stride, of_heads = None, []
  if heads:
    head = _section(model, 'decode_head')
    if 'ASPP' in str(head.get('type')):
      head = _ASPP | head
    of_heads = _differences('model.decode_head', head, _HEAD)
    stride = _output_stride(backbone, of_heads)
  if fatal or of_heads:
    advice = 'Predict with mmsegmentation'
    if not fatal:
      advice += f', or take its backbone alone: {DROP} {" ".join(heads)}'
    raise UserError(
      'the file stores the configuration of another network than can be built '
      f'here: {"; ".join(fatal + of_heads)}. With its weights ours would give '
      f'other results. {advice}.'
    )
  return Stored(stride, _normalization(content, model), True)


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  section = content.get(name)
  # Cascades have lists of heads.
  if isinstance(section, list | tuple) and section:
    section = section[-1]
  return section if isinstance(section, Mapping) else {}


def _differences(
  where: str, section: Mapping[str, Any], accepted: Mapping[str, Any]
) -> list[str]:
  found = {key: _plain(section.get(key, x)) for key, x in accepted.items()}
  inner = {'norm_cfg.eps': 1e-5, 'act_cfg.type': 'ReLU'}
  for path, ours in inner.items():
    part, _, key = path.partition('.')
    found[path] = _section(section, part).get(key, ours)
  return [
    f'{where}.{key} is {brief(found[key])}, here it is {ours!r}'
    for key, ours in (accepted | inner).items()
    if found[key] != ours
  ]


def _output_stride(
  backbone: Mapping[str, Any], differ: list[str]
) -> int | None:
  if not backbone:
    return None
  undilated = zip(('strides', 'dilations'), next(iter(_STRIDES)), strict=True)
  key = tuple(_plain(backbone.get(name, usual)) for name, usual in undilated)
  # No look-up: there may be anything in place of numbers.
  stride = next((x for known, x in _STRIDES.items() if known == key), None)
  if stride is None:
    differ.append(
      f'model.backbone.strides are {brief(key[0])} and dilations '
      f'{brief(key[1])}, here they give an output stride of 8, 16 or 32'
    )
  elif stride < 32 and not backbone.get('contract_dilation', False):
    differ.append(
      'model.backbone.contract_dilation is not True, here dilations contract'
    )
  return stride


def _normalization(
  content: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any] | None:
  # Of 1.x in the model or next to it; of 0.x next to the pipelines, or in them.
  ours, beside = (_section(x, 'data_preprocessor') for x in (model, content))
  ours = ours or beside
  sections = [ours, _section(content, 'img_norm_cfg'), *_transforms(content)]
  for found in sections:
    if found.get('mean') is not None and found.get('std') is not None:
      # The defaults of 1.x and 0.x differ.
      rgb = found.get('bgr_to_rgb', found.get('to_rgb', found is not ours))
      numbers = {'mean': found['mean'], 'std': found['std']}
      return {'order': 'RGB' if rgb else 'BGR', **numbers}
  if not ours:
    return None
  order = 'RGB' if ours.get('bgr_to_rgb') else 'BGR'
  return {'order': order, 'mean': [0, 0, 0], 'std': [1, 1, 1]}


def _transforms(content: Any) -> Iterator[Mapping[str, Any]]:
  # Normalisations in pipelines. A list may stand in many places.
  rest, seen = [content], set()
  while rest:
    item = rest.pop()
    if id(item) in seen:
      continue
    seen.add(id(item))
    if isinstance(item, Mapping):
      if item.get('type') == 'Normalize':
        yield item
      rest += item.values()
    elif isinstance(item, list | tuple):
      rest += item


def _plain(value: Any) -> Any:
  return tuple(value) if isinstance(value, list | tuple) else value


def _evaluated(text: str) -> dict[str, Any]:
  # Names of the file -> values; an expression that is no literal becomes None.
  if len(text) > LENGTH:
    return {}
  names: dict[str, Any] = {}
  try:
    if text.lstrip().startswith('{'):
      return parse_json(text, 'the stored configuration')
    for statement in ast.parse(text).body:
      if isinstance(statement, ast.Assign):
        value = _value(statement.value, names)
        targets = (x for x in statement.targets if isinstance(x, ast.Name))
        names |= {target.id: value for target in targets}
  except (SyntaxError, ValueError, RecursionError, MemoryError, UserError):
    return {}
  return names


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
  if isinstance(node, ast.Name):
    return names.get(node.id)
  if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'dict':
    return {x.arg: _value(x.value, names) for x in node.keywords if x.arg}
  if isinstance(node, ast.Dict):
    pairs = zip(node.keys, node.values, strict=True)
    keys = ((x.value, y) for x, y in pairs if isinstance(x, ast.Constant))
    return {key: _value(value, names) for key, value in keys}
  if isinstance(node, ast.List | ast.Tuple):
    return [_value(item, names) for item in node.elts]
  try:
    return ast.literal_eval(node)
  except (ValueError, TypeError):
    return None


def classes_in(meta: Mapping[str, Any]) -> tuple[list | None, list | None]:
  """Classes and palette in a checkpoint's `meta`."""
  # mmsegmentation 1.x has `dataset_meta`, in small letters or in capitals.
  found = {key: meta.get(key.upper()) for key in ('classes', 'palette')}
  if isinstance(of_data := meta.get('dataset_meta'), Mapping):
    for key, value in found.items():
      found[key] = of_data.get(key, of_data.get(key.upper(), value))
  classes, palette = found.values()
  # Not part of the network: what is no name or no colour is left out.
  return (
    list(classes) if CLASSES.holds(classes) and classes else None,
    list(map(list, palette)) if PALETTE.holds(palette) and palette else None,
  )


def readable(meta: Mapping[str, Any]) -> dict[str, Any]:
  """Versions, time and iteration, not the texts of whole configurations."""

  def short(value: Any) -> bool:
    if isinstance(value, str):
      return len(value) < 200
    # Neither NaN nor infinity.
    return isinstance(value, int | float) and abs(value) < 2**63

  return {k: v for k, v in meta.items() if isinstance(k, str) and short(v)}
