"""Loads weights from any source, with their model and origin."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

import resnest_jax
from resnest_jax.data.own.classes import label_set
from resnest_jax.data.preprocess import IMAGENET, Normalization
from resnest_jax.distributed import messages
from resnest_jax.errors import UserError, ending
from resnest_jax.models.classifier import described
from resnest_jax.models.description import check_description
from resnest_jax.models.initial import variable_shapes
from resnest_jax.text import listed, without_secrets
from resnest_jax.weights import files, infer, mmseg_config
from resnest_jax.weights.fetch import fetch
from resnest_jax.weights.names import WHOSE_READ, blocks_of, head_modules
from resnest_jax.weights.published import (
  CLASSIFIERS,
  PUBLISHED,
  SEGMENTORS,
  Published,
  find,
  known_file,
)
from resnest_jax.weights.state_dict import import_state_dict, recognise, without
from resnest_jax.weights.temperature import Place

# Applied to RGB from 0 to 255: minus mean, over std.
NORMALIZATION = IMAGENET.described()
# detectron2-ResNeSt's, in the files whose names end in _d2.
DETECTRON_NORMALIZATION = NORMALIZATION | {
  'mean': [123.68, 116.779, 103.939],
  'std': [58.393, 57.12, 57.375],
}
READ_BY = f'resnest_jax {resnest_jax.__version__}'
# Of pictures in training.
_SIZES = ('image_scale', 'crop_size', 'center_crop')
# PyTorch-Encoding trains with: long and short edge, and height and width.
ENCODING_SCALE, ENCODING_CROP = [520, 520], [480, 480]
HEAD_KEYS = ('head', 'head_channels', 'aux_channels', 'num_classes', 'dropout')
# Tasks of networks that are evaluated, predict and are exported.
_GIVES = {'segmentor': 'label maps', 'classifier': 'class of a picture'}
_PUBLISHED = {'segmentor': SEGMENTORS, 'classifier': CLASSIFIERS}
Config = Mapping[str, Any]
Variables = dict[str, Any]  # `params` and `batch_stats`.


class Weights(NamedTuple):
  """A state dict, the model that it belongs to, and its origin."""

  state_dict: dict[str, Any]  # Name -> NumPy array.
  kind: str  # Whose names these are, as `recognise` tells.
  description: infer.Description
  classes: list[str] | None
  palette: list[list[int]] | None  # Colours (R, G, B) of the classes.
  normalization: dict[str, Any]  # Of images, as `Normalization.described`.
  provenance: dict[str, Any]  # JSON-able; its `notes` say what was assumed.
  image_scale: list[int] | None = None  # (long, short) edge in training.
  crop_size: list[int] | None = None  # (height, width) in training.
  center_crop: str | None = None  # Of a classifier's training.
  # As the tree of a run's checkpoint; None: `create` imports the state dict.
  variables: Variables | None = None
  temperature: float = 1.0  # By which logits are divided; 1: not calibrated.
  place: Place | None = None  # Where `eval.py --calibrate` keeps it.

  def about(self) -> dict[str, Any]:
    """All but the arrays, JSON-able; `load_weights` understands it."""
    task, config = self.description
    keys = ['classes', 'palette', 'normalization', 'image_scale', 'crop_size']
    keys += ['provenance', *['center_crop'] * (task == 'classifier')]
    keys += ['temperature'] * (self.temperature != 1 and task != 'backbone')
    rest = {key: getattr(self, key) for key in keys}
    return {'format': 1, 'task': task, 'model': config} | rest

  def normalized(self) -> Normalization:
    """`normalization` as `preprocess` takes it."""
    return Normalization.of(self.normalization)

  def notes(self) -> list[str]:
    """What was assumed or chosen, as lines to print."""
    return [f'note: {x}' for x in self.provenance.get('notes', ())]

  def create(self, dtype: str | None = None) -> tuple[nn.Module, Variables]:
    """The model, its activations in `dtype`, and its variables in NumPy."""
    task, config = self.description
    more = {'dtype': dtype} if dtype else {}
    model = infer.Description(task, config | more).create()
    variables = self.variables or import_state_dict(model, self.state_dict)
    return model, variables


def load_weights(
  source: str | Path,
  *,
  drop: Sequence[str] = (),
  backbone: str | None = None,
  checkpoint: str | int = 'latest',
  part: str | None = None,
  published: Mapping[str, Published] = PUBLISHED,
  model_config: Config | None = None,
) -> Weights:
  """Reads weights of any known kind, as `load_pretrained`.

  `published` are the accepted names; `model_config` is `config.model`, and then
  `source` a workdir; None takes the one that the source describes. Raises
  `UserError` also for values that are not finite.
  """
  # Nothing may be downloaded instead of a workdir that is missing.
  path = fetch(source, published) if model_config is None else Path(source)
  if model_config is not None or (path / 'checkpoints').is_dir():
    weights = _of_run(path, checkpoint, drop, backbone, model_config)
    if part:
      raise UserError(f'{source} is a training, which has no part {part!r}.')
  elif checkpoint != 'latest':
    raise UserError(
      f'{source} is not the workdir of a training, which alone has a '
      f'checkpoint {checkpoint!r}; leave --checkpoint out.'
    )
  else:
    path = files.weight_file(path)
    weights = _of_file(source, path, drop, backbone, part)
    # Many published files share a folder.
    kept = path.with_name(f'{path.name}.temperature.json')
    place = Place(kept, f'{weights.provenance["sha256"]} {part or ""}'.strip())
    weights = weights._replace(
      temperature=place.read(weights.temperature), place=place
    )
  check_description(weights.about(), f'the description of {source}')
  # NaN weights give label maps without any error.
  tensors = weights.state_dict
  if bad := [k for k, v in tensors.items() if not np.isfinite(v).all()]:
    raise UserError(
      f'{source} has values that are not finite (NaN or infinity) in '
      f'{len(bad)} of {len(tensors)} tensors: {listed(sorted(bad))}. The '
      'training has diverged or the file is damaged; take an earlier '
      'checkpoint, or another source.'
    )
  return weights


def load_pretrained(
  source: str | Path,
  *,
  drop: Sequence[str] = (),
  backbone: str | None = None,
  checkpoint: str | int = 'latest',
  dtype: str | None = None,
  part: str | None = None,
) -> tuple[nn.Module, Variables, dict[str, Any]]:
  """Loads a model with its weights, ready to apply, from any source.

  Args:
    source: the workdir of a training, a file, a folder that convert wrote, a
      published name ('resnest50', 'ade20k_pspnet'), an address, or
      'hf://owner/repository/file'.
    drop: modules to leave out, by their names in the source: ('fc',) leaves
      a classifier's backbone.
    backbone: its name, if the source does not tell; see `describe`.
    checkpoint: of a training: 'latest', 'best' (by mIoU or top1) or a step.
    dtype: of the activations: 'float32', 'bfloat16' or 'float64'; None: as
      trained here, and float32 for weights of others.
    part: of a file that holds several networks, as convert lists them.

  Returns:
    The `Segmentor`, `Classifier` or `ResNeSt`, its variables as NumPy arrays,
    and their description: `task`, `model` (its configuration), `classes`,
    `palette`, `normalization`, `image_scale`, `crop_size` and `provenance`.

  Raises:
    UserError: not found, damaged, or not a ResNeSt.
  """
  weights = load_weights(
    source, drop=drop, backbone=backbone, checkpoint=checkpoint, part=part
  )
  return *weights.create(dtype), weights.about()


def load_trained(
  source: str | Path,
  checkpoint: str | int = 'latest',
  dtype: str | None = None,
  model_config: Config | None = None,
  tasks: Collection[str] = tuple(_GIVES),
) -> tuple[nn.Module, Variables, Weights]:
  """As `load_weights`, with the network; `UserError` for other tasks, too."""
  # What is published for another task is refused before it is downloaded.
  others = (x for x in _PUBLISHED if x not in tasks)
  named = (x for x in others if find(str(source), _PUBLISHED[x]))
  task, weights = None if Path(source).exists() else next(named, None), None
  if task is None:
    weights = load_weights(
      source,
      checkpoint=checkpoint,
      published={k: v for x in tasks for k, v in _PUBLISHED[x].items()},
      model_config=model_config,
    )
    task = weights.description.task
  if task not in tasks:
    gives = ' or '.join(_GIVES[x] for x in tasks)
    raise UserError(
      f'{source} is a {task}, which gives no {gives}; a '
      f'{" or ".join(tasks)} is needed.'
    )
  return *weights.create(dtype), weights


def _of_run(
  workdir: Path,
  which: str | int,
  drop: Sequence[str],
  backbone: str | None,
  model_config: Config | None,
) -> Weights:
  # Imported late: Orbax takes a second, and weight files do not need it.
  from resnest_jax.checkpoints.store import load_checkpoint

  _, variables, about = load_checkpoint(workdir, which, model_config)
  variables = jax.device_get(variables)
  # Old checkpoints, which have none, are refused without a `model_config`.
  config = about.get('config') or {'name': None, 'data': {}}
  trained = config.get('model', model_config)
  if model_config is not None:
    _check_same_network(about, trained, model_config)
  description = infer.Description(*described(model_config or trained))
  state_dict = without(flatten_dict(variables, sep='/'), drop)
  if backbone:
    description = infer.with_backbone(description, backbone, known=True)
  classes, palette = about.get('classes'), about.get('palette')
  # Older checkpoints have class names only.
  if palette is None and classes and description.task == 'segmentor':
    labels = label_set(len(classes), classes, None)
    palette = None if labels.name == 'own' else labels.palette.tolist()
  sizes = {x: config['data'].get(x) or None for x in _SIZES}
  provenance = {
    'source': str(workdir),
    'step': about['step'],
    'config': config.get('name'),
    'dropped': list(drop),
    'backbone_known': True,
    'read_by': READ_BY,
  }
  if drop:
    description, variables = remaining(description, state_dict), None
  kept = Path(workdir) / 'calibration' / f'{about["step"]}.json'
  place = Place(kept, about['digests']['model'])
  return Weights(
    *(state_dict, 'ours', description, classes, palette),
    *(about.get('data', {}).get('normalization', NORMALIZATION), provenance),
    **sizes,
    variables=variables,
    temperature=place.read(1.0),
    place=place,
  )


def _check_same_network(about: Config, trained: Config, config: Config) -> None:
  # The arrays have equal shapes under all rules and strides, and in both
  # PSPNets. Another stride is legitimate (cheaper or finer), the others compute
  # something else.
  theirs = trained | {'dilation_rule': about['dilation_rule']}
  for key in ('head', 'dilation_rule'):
    check_same('the checkpoint', key, theirs[key], config[key])
  before, stride = trained['output_stride'], config['output_stride']
  if before != stride and messages.is_first():
    print(f'note: trained at output stride {before}, not {stride}', flush=True)


def check_same(source: str, key: str, theirs: str, ours: str) -> None:
  """Raises `UserError` for weights of another value of `config.model`."""
  if theirs != ours:
    raise UserError(
      f'{source} was trained with model.{key} {theirs}, the network here has '
      f'{ours}: its weights would give wrong results. Add '
      f'--config.model.{key}={theirs}.'
    )


def _of_file(
  source: str | Path,
  path: Path,
  drop: Sequence[str],
  backbone: str | None,
  part: str | None,
) -> Weights:
  file = files.read_weights(path, part)
  if not file.state_dict:
    raise UserError(
      f'{path} holds no tensors; get the file again, or save the network again.'
    )
  state_dict = without(file.state_dict, drop)
  kind = recognise(state_dict)
  provenance = {
    'source': without_secrets(str(source)),
    'file': path.name,
    'sha256': files.checksum(path),
    'names': WHOSE_READ[kind],
    'dropped': list(drop),
    'meta': mmseg_config.readable(file.meta),
    'read_by': READ_BY,
  }
  if file.network and file.network.part:
    provenance['part'] = file.network.part
  if len(file.networks) > 1:
    parts = listed(repr(network.part) for network in file.networks)
    _note(
      provenance,
      f'the file holds several networks: {parts}; taken is '
      f'{file.network.part!r} (--part of convert takes another, in Python the '
      'argument part)',
    )
  if file.about:
    given = file.about, state_dict, kind, drop, backbone, provenance
    return _described(path, *given)
  if known := known_file(path.name):
    if backbone not in (None, known.backbone):
      raise UserError(
        f'{source} is published as {known.backbone}, not as {backbone}; leave '
        '--backbone out.'
      )
    backbone, asked = known.backbone, find(str(source))
    if asked and asked.name != path.name:
      _note(
        provenance,
        f'{asked.name} did not come; {path.name} is what GluonCV has published '
        'for the same network and the same scores. Whether the weights are the '
        'same is not known',
      )
  provenance['backbone_known'] = backbone is not None
  if kind == 'ours':
    raise UserError(
      f'{path} has our names but no description of its model, which names do '
      'not tell. Give a file as convert or export.py wrote it, or the workdir '
      'of the training. In Python import_state_dict reads the tensors into a '
      'model that you create.'
    )
  return _of_others(file, path.name, state_dict, kind, backbone, provenance)


def _of_others(file, name, state_dict, kind, backbone, provenance) -> Weights:
  description = infer.describe(state_dict, kind, backbone)
  known, heads = known_file(name), description.task == 'segmentor'
  stored = mmseg_config.Stored()
  if not known:
    wanted = head_modules(file.state_dict) if heads else []
    stored = mmseg_config.read_stored(file.meta, wanted)
  if stored.output_stride:
    description.config['output_stride'] = stored.output_stride
  # segmentation_models.pytorch has timm's networks.
  if file.network and file.network.in_encoder:
    description.config['dilation_rule'] = 'timm'
  encoding = heads and kind == 'encoding'
  assumed = []
  if heads and stored.output_stride is None:
    assumed = ['output stride 8', 'align_corners False']
  if encoding:
    edges = f'long edge {ENCODING_SCALE[0]}, crops of {ENCODING_CROP}'
    assumed = [*assumed[:1], edges]
  normalization = stored.normalization
  if normalization is None:
    whose, normalization = 'ImageNet', NORMALIZATION
    if kind == 'detectron2' or name.partition('-')[0].endswith('_d2'):
      whose, normalization = 'detectron2-ResNeSt', DETECTRON_NORMALIZATION
    assumed.append(
      f"{whose}'s normalisation (RGB, mean {normalization['mean']}, std "
      f'{normalization["std"]})'
    )
  if assumed and not known:
    text = ', '.join(assumed)
    _note(provenance, f'assumed, as the file does not say: {text}')
  classes, palette = mmseg_config.classes_in(file.meta)
  if encoding and known:
    labels = label_set(description.config['num_classes'], None, None)
    classes, palette = list(labels.classes), labels.palette.tolist()
  return Weights(
    *(state_dict, kind, description, classes, palette),
    *(normalization, provenance),
    *((ENCODING_SCALE, ENCODING_CROP) if encoding else ()),
  )


def _note(provenance: dict[str, Any], text: str) -> None:
  provenance['notes'] = [*provenance.get('notes', ()), text]


def _described(path, about, state_dict, kind, drop, backbone, provenance):
  with ending(files.CONVERT_AGAIN):
    check_description(about, f'the description in {path}')
    description = infer.Description(about['task'], dict(about['model']))
    _check_built(path, description, state_dict)
  known = about['provenance'].get('backbone_known', True)
  if backbone:
    description = infer.with_backbone(description, backbone, known)
    known = True
  if drop:
    description = remaining(description, state_dict)
  # Earlier versions wrote secrets.
  before = {'from': files.with_texts(about['provenance'], without_secrets)}
  return Weights(
    *(state_dict, kind, description),
    *(about[key] for key in ('classes', 'palette', 'normalization')),
    provenance | {'backbone_known': known} | before,
    **{x: about.get(x) for x in _SIZES},
    temperature=about.get('temperature', 1.0),
  )


def _check_built(
  path, description: infer.Description, state_dict: Mapping
) -> None:
  there = tuple(blocks_of(state_dict).values())
  try:
    said = tuple(infer.backbone_of(description.config).stage_sizes)
    # Before a network of any depth is traced.
    if there != said:
      raise ValueError(f'it has {said} blocks a stage, the weights {there}')
    variable_shapes(description.create())
  except (UserError, ValueError, TypeError, ArithmeticError) as error:
    first_line = str(error).partition('\n')[0].rstrip('.')
    raise UserError(
      f'the description in {path} is damaged: no network can be built of it '
      f'({first_line}).'
    ) from error


def remaining(
  description: infer.Description, state_dict: Mapping
) -> infer.Description:
  """Describes the model of which `state_dict`, of any kind, is left."""
  heads, (task, config) = head_modules(state_dict), description
  kept = any(x in ('decode_head', 'head') for x in heads)
  if kept and len(heads) == 1:
    return description._replace(config=config | {'aux_channels': None})
  if task == 'classifier':
    layer = re.compile(r'((head\.|params/)?fc|linear)[./]')
    kept = any(map(layer.match, state_dict))
  if kept or task == 'backbone':
    return description
  # Without its main head or its classifier's layer it is a backbone.
  left = {key: value for key, value in config.items() if key not in HEAD_KEYS}
  return infer.Description('backbone', left)
