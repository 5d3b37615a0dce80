"""Files of small networks, as trainings here and elsewhere write them."""

import copy
import functools

import numpy as np
import pytest
import torch
from golden.reference import TINY, variables_of
from safetensors.numpy import save_file

from resnest_jax import UserError, create_segmentor, export_state_dict
from resnest_jax.weights import convert
from resnest_jax.weights.files import write_weights
from resnest_jax.weights.infer import Description
from resnest_jax.weights.pretrained import NORMALIZATION, Weights, load_weights

NETWORK = TINY | {'dtype': 'float32'}
CLASSES = list('abcdefg')
PALETTE = [[i, 2 * i, 3 * i] for i in range(7)]


def encoding_network(head='encoding_deeplabv3', **changes):
  """A segmentor of PyTorch-Encoding, and its variables."""
  changes |= {'head': head, 'dilation_rule': 'official'}
  model = create_segmentor(NETWORK | changes)
  return model, variables_of(model)


def described(normalization=NORMALIZATION):
  """The description that the segmentor has in our files."""
  return Weights(
    *({}, 'ours', Description('segmentor', NETWORK), CLASSES, PALETTE),
    *(normalization, {'source': 'x'}, [64, 48], [32, 32]),
  ).about()


def changed(about, where, value):
  """A description whose field, 'model.width', say, has another value."""
  about = copy.deepcopy(about)
  *outer, last = where.split('.')
  functools.reduce(dict.__getitem__, outer, about)[last] = value
  return about


def written(folder, network, kind='mmseg', about=None):
  """The path of the weights of a model and its variables."""
  state_dict = export_state_dict(*network, kind)
  return write_weights(folder, kind, state_dict, about or {})[0]


def tensors(content):
  """PyTorch's, of the arrays in a state dict or in mappings with some."""
  if type(content) is dict:
    return {key: tensors(value) for key, value in content.items()}
  return torch.tensor(content) if isinstance(content, np.ndarray) else content


def saved(path, content, old=False):
  """The path of such a content, written as the packages of others do."""
  if path.suffix == '.safetensors':
    # It ignores strides.
    save_file({name: value.copy() for name, value in content.items()}, path)
  else:
    torch.save(tensors(content), path, _use_new_zipfile_serialization=not old)
  return path


def converted(source, out, *flags):
  """What the converter writes."""
  convert.main([str(source), '--out', str(out), *flags])
  return load_weights(out)


def refused(said, call, *arguments, **options):
  """Asserts that the call is refused in these words; returns the message."""
  with pytest.raises(UserError, match=said) as error:
    call(*arguments, **options)
  return str(error.value)
