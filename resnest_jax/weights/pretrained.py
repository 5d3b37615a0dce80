"""Weights with all that belongs to them, and how a training starts from them.

A `Weights` is what `convert` reads and writes: a state dict of some kind, the
model it is of, and where it comes from.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

import resnest_jax
from resnest_jax.errors import UserError
from resnest_jax.weights.fetch import fetch
from resnest_jax.weights.files import (
  SAFETENSORS,
  WeightFile,
  read_weights,
  sha256,
)
from resnest_jax.weights.infer import Description, describe
from resnest_jax.weights.published import PUBLISHED, known_file
from resnest_jax.weights.state_dict import (
  import_state_dict,
  recognise,
  reinitialised,
  top_module,
  without,
)

# What the networks were trained to see: RGB, 0 to 255, minus mean, over std.
NORMALIZATION = {
  'order': 'RGB',
  'mean': [123.675, 116.28, 103.53],
  'std': [58.395, 57.12, 57.375],
}
# detectron2-ResNeSt's, in the files whose names end in _d2.
DETECTRON_NORMALIZATION = {
  'order': 'RGB',
  'mean': [123.68, 116.779, 103.939],
  'std': [58.393, 57.12, 57.375],
}


# Of `config.model`: what a backbone alone does not have.
HEAD_KEYS = ('head', 'head_channels', 'aux_channels', 'num_classes', 'dropout')


class Weights(NamedTuple):
  """A state dict and what is known of it.

  state_dict: name -> NumPy array.
  kind: 'mmseg', 'official' or 'ours'.
  description: the model it is of.
  classes: names, or None.
  palette: colours (R, G, B) of the classes, or None.
  normalization: of the images.
  provenance: where it comes from, JSON-able.
  """

  state_dict: dict[str, Any]
  kind: str
  description: Description
  classes: list[str] | None
  palette: list[list[int]] | None
  normalization: dict[str, Any]
  provenance: dict[str, Any]

  def about(self) -> dict[str, Any]:
    """All but the arrays, JSON-able; `load_weights` understands it."""
    return {
      'format': 1,
      'task': self.description.task,
      'model': self.description.config,
      'classes': self.classes,
      'palette': self.palette,
      'normalization': self.normalization,
      'provenance': self.provenance,
    }


def load_weights(
  source: str | Path,
  *,
  drop: Sequence[str] = (),
  backbone: str | None = None,
) -> Weights:
  """Finds and reads weights of any known kind.

  Args:
    source: a path, published name, address or hf:// file; see `fetch`.
    drop: modules to leave out, by their names in the state dict.
    backbone: its name, where the file does not tell; see `describe`.

  Raises:
    UserError: no such file, a damaged one, or not a ResNeSt.
  """
  path = fetch(source)
  file = read_weights(path)
  state_dict = without(file.state_dict, drop)
  kind = recognise(state_dict)
  if path.is_dir():
    path = path / SAFETENSORS
  provenance = {
    'source': str(source),
    'file': path.name,
    'sha256': sha256(path),
    'kind': kind,
    'dropped': list(drop),
    'meta': _readable(file.meta),
    'read_by': f'resnest_jax {resnest_jax.__version__}',
  }
  if file.about:
    return _described(path, file, state_dict, kind, drop, provenance)
  known = PUBLISHED.get(str(source)) or known_file(path.name)
  if known and backbone is None:
    backbone = known.backbone
  provenance['backbone_known'] = backbone is not None
  if kind == 'ours':
    raise UserError(
      f'{path} has our names but no description of its model in its header; '
      'convert writes one.'
    )
  classes, palette = _classes(file.meta)
  detectron = path.name.partition('-')[0].endswith('_d2')
  return Weights(
    state_dict,
    kind,
    describe(state_dict, kind, backbone),
    classes,
    palette,
    DETECTRON_NORMALIZATION if detectron else NORMALIZATION,
    provenance,
  )


def load_segmentor(
  source: str | Path, dtype: str = 'float32'
) -> tuple[nn.Module, dict[str, Any], Weights]:
  """A published or converted segmentor, ready to apply.

  Args:
    source: see `load_weights`.
    dtype: of the activations, as `config.model.dtype`.

  Returns:
    The `Segmentor`, its variables as NumPy arrays, and where they are from.

  Raises:
    UserError: not to be found, damaged, or weights of something else.
  """
  weights = load_weights(source)
  task, config = weights.description
  if task != 'segmentor':
    raise UserError(
      f'{source} is a {task}, which gives no label maps; a segmentor is needed.'
    )
  model = Description(task, config | {'dtype': dtype}).create()
  return model, import_state_dict(model, weights.state_dict), weights


def _described(path, file: WeightFile, state_dict, kind, drop, provenance):
  """Weights that `convert` wrote, with its description."""
  about = file.about
  try:
    description = Description(about['task'], dict(about['model']))
    if drop:
      description = remaining(description, state_dict)
    return Weights(
      state_dict,
      kind,
      description,
      about['classes'],
      about['palette'],
      about['normalization'],
      provenance | {'backbone_known': True, 'from': about['provenance']},
    )
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'the description in {path} is damaged: {error!r}. Convert again from '
      'the original.'
    ) from error


def remaining(
  description: Description, state_dict: Mapping[str, Any]
) -> Description:
  """What a model is once a head or a layer has been dropped.

  Args:
    description: of the whole.
    state_dict: what is left of it, of any kind.
  """
  names = '\n'.join(state_dict)
  kept = {
    'segmentor': 'decode_head' in names or 'auxiliary_head' in names,
    'classifier': re.search(r'^(head\.|params/)?fc[./]', names, re.M),
    'backbone': True,
  }[description.task]
  if kept:
    return description
  config = {
    key: value
    for key, value in description.config.items()
    if key not in HEAD_KEYS
  }
  return Description('backbone', config)


def _classes(meta: Mapping[str, Any]) -> tuple[list | None, list | None]:
  """Names and colours from mmsegmentation's meta, of versions 0.x and 1.x."""
  of_data = meta.get('dataset_meta')
  of_data = of_data if isinstance(of_data, Mapping) else {}
  lists = []
  for name in ('classes', 'palette'):
    value = meta.get(name.upper())
    value = of_data.get(name, of_data.get(name.upper(), value))
    lists.append(list(value) if isinstance(value, list | tuple) else None)
  classes, palette = lists
  return classes, palette and [list(map(int, colour)) for colour in palette]


def _readable(meta: Mapping[str, Any]) -> dict[str, Any]:
  """Short plain values: versions, time, iteration; not whole configs."""
  return {
    key: value
    for key, value in meta.items()
    if isinstance(value, int | float)
    or (isinstance(value, str) and len(value) < 200)
  }


def start_from(
  model: nn.Module, variables: Mapping[str, Any], source: str
) -> tuple[dict[str, Any], list[str]]:
  """The variables a training begins with.

  Args:
    model: a segmentor.
    variables: freshly initialised; what the weights do not hold stays.
    source: see `load_weights`. Of a segmentor all is taken, and layers with
      another number of classes stay fresh; of a classifier or a backbone
      the backbone is taken, and a classifier's layer (fc, head) left out.

  Returns:
    The variables as NumPy arrays, and sentences that say what was done.

  Raises:
    UserError: they are of another backbone, head or dilation rule.
  """
  weights = load_weights(source)
  notes = [f'starting from {source} ({weights.kind} names)']
  _check_backbone(model.backbone, weights)
  if weights.description.task == 'segmentor':
    rule = weights.description.config['dilation_rule']
    if rule != model.backbone.dilation_rule:
      raise UserError(
        f'{source} was trained with dilation rule {rule!r}, the model has '
        f'{model.backbone.dilation_rule!r}, with which its weights give wrong '
        f'results. Add --config.model.dilation_rule={rule}.'
      )
    layers = reinitialised(model, weights.state_dict)
    if layers:
      notes.append(
        f'{" and ".join(layers)} are drawn anew: the number of classes differs'
      )
    merged = import_state_dict(model, weights.state_dict, fresh=variables)
    return merged, notes
  modules = {top_module(name) for name in weights.state_dict}
  drop = sorted(modules & {'fc', 'head'})
  if drop:
    notes.append(f"the classifier's layer {drop[0]} is left out")
  backbone = import_state_dict(model.backbone, weights.state_dict, drop=drop)
  merged = {
    key: {**tree, 'backbone': backbone[key]} for key, tree in variables.items()
  }
  notes.append('the heads are drawn anew')
  return merged, notes


def _check_backbone(backbone: nn.Module, weights: Weights) -> None:
  """The one difference between backbones that no shape shows."""
  if not weights.provenance['backbone_known']:
    return
  config = weights.description.config
  theirs = Description('backbone', config).create().avd_first
  if theirs != backbone.avd_first:
    raise UserError(
      f'the weights are of {config["backbone"]}, whose average pool stands '
      f'{"before" if theirs else "behind"} the split attention (avd_first); '
      "the model's does not. Set config.model.backbone to theirs."
    )
