"""Initialises a run: random weights, or pretrained ones with fresh heads."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from resnest_jax.bands import COLOURS, network_order
from resnest_jax.data.preprocess import IMAGENET
from resnest_jax.errors import UserError
from resnest_jax.models.classifier import Classifier
from resnest_jax.models.initial import initial_variables
from resnest_jax.models.segmentor import Segmentor, scanned
from resnest_jax.text import listed, without_secrets
from resnest_jax.weights.infer import backbone_of, fields_of, same_shapes
from resnest_jax.weights.names import (
  CLASS_MODULES,
  WHOSE,
  WHOSE_READ,
  backbone_part,
)
from resnest_jax.weights.pretrained import Weights, check_same, load_weights
from resnest_jax.weights.state_dict import (
  import_state_dict,
  reinitialised,
  segmentor_kind,
)


def start_variables(
  model: nn.Module, config: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """Initialises the variables of a run from its configuration alone.

  `model` is from `create_training` or `create_network`; of the configuration
  `seed`, `pretrained` and `data.bands` are read. Returns `params` and
  `batch_stats` as NumPy arrays, each block by itself, and lines to print about
  their origin.
  """
  # State dicts name single blocks, so the unrolled twin of `model` is filled.
  source, by_name = config['pretrained'], scanned(model, False)
  # Drawing takes seconds, and a mistyped name should fail at once.
  weights = load_weights(source) if source else None
  fresh = initial_variables(by_name, config['seed'])
  if weights is None:
    return fresh, ['starting from random weights (config.pretrained is empty)']
  given = weights.normalized().bands, config.get('data', {}).get('bands')
  theirs, ours = (
    [bands[i] for i in network_order(bands)]
    for bands in (x or COLOURS for x in given)
  )
  twin = by_name.backbone.clone(channels=len(theirs))
  twin = by_name.clone(backbone=twin)
  variables, notes = start_from(twin, fresh, source, weights)
  if theirs != ours:
    notes += _to_bands(variables['params']['backbone'], theirs, ours)
  return variables, notes


def _to_bands(
  backbone: dict[str, Any], theirs: Sequence[str], ours: Sequence[str]
) -> list[str]:
  """Gives the first layer's kernels to bands of their names; lines about it.

  New bands begin at zero: the network starts as one without them.
  """
  kernel = backbone['stem_conv1']['kernel']
  kept = [x for x in ours if x in theirs]
  other, begin = np.zeros_like(kernel[:, :, 0]), 'begin at zero'
  if not kept:  # As timm: a grey picture gets what an equal RGB one does.
    other, begin = kernel.sum(2) / len(ours), 'share the mean kernel'
  parts = [kernel[:, :, theirs.index(x)] if x in kept else other for x in ours]
  backbone['stem_conv1'] = {'kernel': np.stack(parts, 2)}
  new = [x for x in ours if x not in kept]
  said = {'keep their kernels': kept, begin: new}
  return [f'bands {listed(x)} {does}' for does, x in said.items() if x]


def start_from(
  model: nn.Module,
  variables: Mapping[str, Any],
  source: str,
  weights: Weights | None = None,
) -> tuple[dict[str, Any], list[str]]:
  """Merges pretrained weights into fresh variables of a network.

  `weights` are those of `source`, if they are loaded already. Those of the same
  task give all layers but the ones for another number of classes; the others
  give the backbone. Returns what `start_variables` does.
  """
  weights = weights or load_weights(source)
  which = f'{WHOSE_READ[weights.kind]} names'
  if 'step' in weights.provenance:
    which = f'step {weights.provenance["step"]}'
  notes = [f'starting from {without_secrets(str(source))} ({which})']
  notes += weights.notes()
  theirs = weights.normalized()
  if theirs != IMAGENET and not theirs.bands:
    notes.append(
      f'its images were normalised by {theirs.order} mean {theirs.mean}, std '
      f'{theirs.std}; here by {IMAGENET.mean} and {IMAGENET.std}'
    )
  _check_backbone(source, model.backbone, weights)
  classify, (task, config) = isinstance(model, Classifier), weights.description
  if task == ('classifier' if classify else 'segmentor'):
    if not classify:
      _check_segmentor(source, model, weights)
    if layers := reinitialised(model, weights.state_dict):
      notes.append(
        f'{" and ".join(layers)} {"are" if layers[1:] else "is"} freshly '
        'initialised: the number of classes differs'
      )
    # As after --drop: the fresh one stays.
    if not classify and config['aux_channels'] is None:
      model = model.clone(auxiliary_head=None)
      notes.append(
        'the auxiliary head is freshly initialised: the weights have none'
      )
    merged = import_state_dict(model, weights.state_dict, fresh=variables)
    return {k: {**tree, **merged[k]} for k, tree in variables.items()}, notes
  kept, left = backbone_part(weights.state_dict)
  if left:
    said = f'{listed(left)} {"are" if left[1:] else "is"}'
    if task == 'segmentor':
      said = f'the heads {" and ".join(left)} are'
    elif left[0] in CLASS_MODULES:
      said = f"the classifier's layer {said}"
    notes.append(f'{said} left out')
  backbone = import_state_dict(model.backbone, kept)
  begun = "the classifier's layer is" if classify else 'the heads are'
  notes.append(f'{begun} freshly initialised')
  merged = {k: {**v, 'backbone': backbone[k]} for k, v in variables.items()}
  return merged, notes


def _check_segmentor(source: str, model: Segmentor, weights: Weights) -> None:
  # The two PSPNets have the same shapes, and so have all rules: the weights
  # would load and be wrong.
  config, kind = weights.description.config, segmentor_kind(model)
  if segmentor_kind(weights.description.create()) != kind:
    check_same(source, 'head', config['head'], f'one of {WHOSE[kind]} networks')
  ours = model.backbone.dilation_rule
  check_same(source, 'dilation_rule', config['dilation_rule'], ours)


def _check_backbone(source: str, backbone: nn.Module, weights: Weights) -> None:
  config = weights.description.config
  theirs, ours = backbone_of(config), fields_of(backbone)
  pairs = zip(theirs._fields, theirs, ours, strict=True)
  differ = [x for x in pairs if x[1] != x[2] and x[0] != 'avd_first']
  if differ:
    said = '; '.join(f'its {k} is {x}, the model has {y}' for k, x, y in differ)
    # A published network's name says more than each width.
    if same_shapes(theirs) and same_shapes(ours):
      differ = [('backbone', config['backbone'], None)]
    flags = (f"'--config.model.{key}={value}'" for key, value, _ in differ)
    raise UserError(
      f'{source} has another backbone than the model: {said}. Add '
      f'{" ".join(flags)}.'
    )
  # No shape shows `avd_first`: a guessed name gets the benefit of the doubt.
  known = weights.provenance['backbone_known']
  if known and theirs.avd_first != backbone.avd_first:
    raise UserError(
      f'the weights are of {config["backbone"]}, whose average pool stands '
      f'{"before" if theirs.avd_first else "behind"} the split attention '
      "(avd_first); the model's does not. Set config.model.backbone to theirs."
    )
